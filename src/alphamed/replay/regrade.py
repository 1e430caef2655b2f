"""Grade the responses of one recorded step again, by the current rules: `replay --only reward`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from alphamed.answers.thinking import Thinking
from alphamed.config.loading import changed_config
from alphamed.config.schema import Config
from alphamed.errors import ConfigError
from alphamed.records import ScoredGroup
from alphamed.rundir.directory import config_of_run
from alphamed.rundir.rollout_files import read_rollouts, recorded_steps, rollout_path

SHOWN = 20


@dataclass(frozen=True, slots=True)
class GradingDifference:
    """A sample whose grading differs from the record. `field`: outcome, letter, reward or advantage."""

    question_id: str
    group_id: str
    sample_index: int
    field: str
    recorded: object
    now: object

    def __str__(self) -> str:
        return (
            f"question {self.question_id}, group {self.group_id}, sample {self.sample_index}: {self.field} was "
            f"{self.recorded}, is {self.now}"
        )


@dataclass(frozen=True, slots=True)
class Regraded:
    """A step graded again: the recorded groups, the same responses with the current grading, and where the two differ."""

    recorded: tuple[ScoredGroup, ...]
    now: tuple[ScoredGroup, ...]
    differences: tuple[GradingDifference, ...]


def main(run_dir: Path, step: int, overrides: Sequence[str] = ()) -> int:
    """`alphamed replay RUN --step N --only reward [key=value ...]`: 0 where the step comes out as recorded, 1 where
    it does not."""
    result = regrade(run_dir, step, overrides)
    samples = sum(len(group.outcomes) for group in result.recorded)
    touched = {(d.group_id, d.sample_index) for d in result.differences}
    print(
        f"step {step} of {run_dir}: {samples} responses to {len(result.recorded)} questions graded again, "
        f"{len(touched)} come out differently"
    )
    for difference in result.differences[:SHOWN]:
        print(f"  {difference}")
    if len(result.differences) > SHOWN:
        print(f"  and {len(result.differences) - SHOWN} more differences")
    return 1 if result.differences else 0


def regrade(run_dir: Path, step: int, overrides: Sequence[str] = ()) -> Regraded:
    """Grade the recorded responses of a step by the reward of the run's configuration as it is now, with `overrides`.

    Raises ConfigError for a folder that is no run, a step that is not recorded, or a reward that cannot be used.
    """
    config = changed_config(config_of_run(run_dir), tuple(overrides))
    _require_grading_settings(overrides)
    path = rollout_path(run_dir, step)
    if not path.exists():
        steps = recorded_steps(run_dir)
        present = f"it holds steps {steps[0]} to {steps[-1]}" if steps else "it recorded none (logging.rollout_files)"
        raise ConfigError(f"--step: {step} is not among the rollouts of {run_dir}; {present}")
    recorded = read_rollouts(path)
    now = _grade(recorded, config)
    return Regraded(recorded, now, tuple(difference for pair in zip(recorded, now) for difference in _compare(*pair)))


def _require_grading_settings(overrides: Sequence[str]) -> None:
    """Raises ConfigError for an override that does not affect grading."""
    for item in overrides:
        name = item.partition("=")[0]
        if not name.startswith("reward.") and name not in ("algorithm.advantage", "run.seed"):
            raise ConfigError(
                f"{name}: has no effect on --only reward, which grades recorded responses; leave it out, or use --only update"
            )


def _grade(groups: tuple[ScoredGroup, ...], config: Config) -> tuple[ScoredGroup, ...]:
    from alphamed.reward.rules import grade_rollout, opened_rule, try_rule
    from alphamed.reward.shaping import Overlong, scored_group

    thinking, regraded = _thinking(groups, config), []
    with opened_rule(config.reward, config.prompt, config.run.seed) as rule:
        try_rule(rule, groups[0].group.question, thinking)
        for scored in groups:
            graded = [
                grade_rollout(scored.group.question, rollout, rule, config.reward.truncated, thinking)
                for rollout in scored.group.rollouts
            ]
            regraded.append(scored_group(scored.group, graded, str(config.algorithm.advantage), Overlong.of(config)))
    return tuple(regraded)


def _thinking(groups: Sequence[ScoredGroup], config: Config) -> Thinking:
    """What `reward.answer_after` means for the run's model; where that is not on this machine, what the responses show."""
    from alphamed.data.prompts import PromptBuilder
    from alphamed.data.tokenizer import load_tokenizer

    folder = Path(config.model.path)
    if not folder.is_dir():
        return Thinking.of_texts(
            config.reward.answer_after, [rollout.text for scored in groups for rollout in scored.group.rollouts]
        )
    tokenizer = load_tokenizer(folder)
    return Thinking.of(config.reward.answer_after, tokenizer, PromptBuilder(tokenizer, config.prompt))


def _compare(recorded: ScoredGroup, now: ScoredGroup) -> Iterator[GradingDifference]:
    fields = {
        "outcome": (recorded.outcomes, now.outcomes),
        "letter": (recorded.letters, now.letters),
        "reward": (recorded.rewards, now.rewards),
        "advantage": (recorded.advantages, now.advantages),
    }
    for index, rollout in enumerate(recorded.group.rollouts):
        for name, (before, after) in fields.items():
            if not _same(before[index], after[index]):
                yield GradingDifference(
                    rollout.question_id, rollout.group_id, rollout.sample_index, name, before[index], after[index]
                )


def _same(recorded: object, now: object) -> bool:
    """Numbers are the same to 1e-6: another torch may sum in another order."""
    if isinstance(recorded, float) and isinstance(now, float):
        return math.isclose(recorded, now, rel_tol=1e-6, abs_tol=1e-9)
    return recorded == now
