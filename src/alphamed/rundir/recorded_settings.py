"""Whether a run may train on the rollouts that another one recorded: which settings a replay cannot change."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from alphamed.config.schema import Config
from alphamed.errors import ConfigError
from alphamed.rundir.directory import config_leaves, config_of_run

GRADED_BY = ("reward.name", "reward.signature", "reward.truncated", "reward.answer_after", "data.answer_keys")
SAMPLED_BY = (
    "rollout.temperature",
    "rollout.questions_per_step",
    "rollout.samples_per_question",
    "rollout.max_response_tokens",
    "rollout.max_staleness",
    "prompt",
    "dynamic_sampling",
    "data.levels",
    "data.shuffle_options",
    "data.spread",
)
"""Settings and sections that recorded rewards and rollouts come from: a replay cannot change what is recorded. Temperature
and staleness also determine the distribution of the log-probs, and whether they need correction."""
LIMITS = ("prompt.max_tokens",)
"""Of those, what only refuses."""


def require_recorded(config: Config, run_dir: Path) -> None:
    """Raises ConfigError naming the first setting of a run on the rollouts of `run_dir` that would have no effect, because
    these were sampled or graded otherwise. Advantages are computed again, so those of `config` hold."""
    before, after = (config_leaves(each) for each in (config_of_run(run_dir), config))
    for name in sorted(before.keys() | after.keys()):
        was, now = before.get(name), after.get(name)
        if was == now or name in LIMITS:
            continue
        if _is_of(name, GRADED_BY):
            shown = "null" if now is None else now
            other = (
                f" (what it gives these responses shows `alphamed replay {run_dir} --step N --only reward {name}={shown}`)"
                if name.startswith("reward.")
                else ""
            )
            raise ConfigError(
                f"{name}: {now!r}, but the rewards recorded in {run_dir} were given with {was!r}, and a "
                f"replay trains on those; set it back{other}"
            )
        if _is_of(name, SAMPLED_BY):
            raise ConfigError(
                f"{name}: {now!r}, but the rollouts in {run_dir} were sampled with {was!r}, and a replay "
                f"samples none; set it back"
            )


def _is_of(name: str, settings: Sequence[str]) -> bool:
    return any(name == known or name.startswith(known + ".") for known in settings)
