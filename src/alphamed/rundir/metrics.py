"""The metrics of a step: every name with its unit and meaning, and the reduction of graded groups to numbers.

`METRICS` is the only place that declares a name. A metric that is written but not declared fails a test and is
warned about once in a run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from alphamed.data.text import word_count
from alphamed.errors import ConfigError
from alphamed.files import read_json_lines
from alphamed.records import ScoredGroup
from alphamed.response_stats import ResponseStats


@dataclass(frozen=True, slots=True)
class Metric:
    """One column of metrics.jsonl. `unit` is empty for pure numbers; a share is in 0..1."""

    name: str
    unit: str
    meaning: str


def _table(*rows: tuple[str, str, str]) -> dict[str, Metric]:
    return {row[0]: Metric(*row) for row in rows}


METRICS: Mapping[str, Metric] = _table(
    ("step", "", "number of the step, from 1"),
    ("policy_version", "", "weights that generated the step's rollouts (the oldest, where they differ)"),
    # ------------------------------------------------------------------------------------------- what grading found
    ("reward/mean", "", "mean reward of the step's responses, without the penalty on lengths"),
    ("reward/length_penalty", "", "mean penalty on lengths (reward.overlong_buffer_tokens), which only advantages hold"),
    ("reward/correct", "share", "responses whose boxed letter is the answer"),
    ("reward/boxed", "share", "responses that ended in time with a readable boxed letter, right or wrong"),
    ("reward/unparseable", "share", "responses that ended in time without a readable boxed letter"),
    ("reward/truncated", "share", "responses that the token limit cut"),
    ("reward/failed", "share", "responses whose grader crashed or ran out of time"),
    ("reward/effective_groups", "share", "questions whose responses got different rewards, so that they teach"),
    ("reward/bare_box", "share", "boxed responses with fewer than 5 words before the box: answers without reasoning"),
    ("sampling/questions", "questions", "of the step, where run.min_steps sizes it"),
    ("sampling/asked", "groups", "asked of the engines for this step (and, ahead of the policy, for those after it)"),
    ("sampling/kept", "groups", "graded groups whose rewards differ; all of them where none are replaced"),
    ("sampling/dropped", "groups", "graded groups that are all right or all wrong, replaced by others"),
    (
        "sampling/refill_limit_reached",
        "",
        "1 where the limit on refills was hit, so that the step trains on dropped groups as well",
    ),
    ("sampling/groups_per_kept", "", "graded groups per kept one"),
    ("sampling/skipped", "questions", "not asked because they were unlikely to teach"),
    ("sampling/level_mean", "", "mean level of the questions that the curriculum gave (data.levels)"),
    ("sampling/level_skipped", "questions", "of the stream that the weight of their level left out"),
    ("sampling/reward_mean", "", "mean reward of all groups graded for the step, dropped ones included"),
    ("staleness/mean", "pushes", "age of the weights that sampled the step's groups, mean"),
    ("staleness/max", "pushes", "age of the weights that sampled the step's groups, largest"),
    ("staleness/dropped", "groups", "dropped because their weights were older than rollout.max_staleness"),
    ("staleness/dropped_share", "share", "of the groups trained on or dropped as too old, those dropped"),
    ("staleness/dropped_tokens_share", "share", "of the response tokens of these groups, those dropped"),
    ("staleness/dropped_tokens_mean", "tokens", "mean length of the dropped responses (compare response/tokens_mean)"),
    ("response/tokens_mean", "tokens", "mean length of a response"),
    ("response/tokens_max", "tokens", "longest response"),
    ("data/epochs", "", "passes over data.train so far (supervised training)"),
    # ------------------------------------------------------------------------------------------------- the update
    (
        "policy/loss",
        "",
        "policy loss plus KL term, as the optimizer sees it; in supervised training cross entropy in nats per response token",
    ),
    ("policy/kl", "nats", "KL divergence to the reference per response token (the estimator of the config)"),
    ("policy/entropy", "nats", "entropy of the policy per response token"),
    ("policy/clip_fraction", "share", "response tokens whose ratio was clipped"),
    ("policy/corrected_fraction", "share", "response tokens whose importance weight was cut or masked"),
    ("policy/ratio_mean", "", "mean probability ratio to the weights that the update started from"),
    ("policy/ratio_max", "", "largest such ratio"),
    ("policy/approx_kl", "nats", "KL divergence from those weights per response token (k3 estimate)"),
    ("policy/grad_norm", "", "norm of the gradient before clipping"),
    ("policy/lr", "", "learning rate of the update"),
    ("policy/logprob_diff_mean", "nats", "mean |trainer's old - engine's log-prob| over response tokens"),
    ("policy/logprob_diff_max", "nats", "largest |trainer's old - engine's log-prob|"),
    ("policy/skipped_updates", "", "optimizer steps skipped because the gradient was not finite"),
    # ------------------------------------------------------------------------------------------------- the batch
    ("batch/micro_batches", "", "packed rows of a data rank"),
    ("batch/padding_fraction", "share", "packed tokens that are padding"),
    ("batch/shared_fraction", "share", "prompt tokens saved because samples share their prompt"),
    (
        "batch/skipped_fraction",
        "share",
        "responses left out of the update: no advantage, no gradient (algorithm.skip_no_signal)",
    ),
    ("batch/dp_imbalance", "", "largest over mean load of the data ranks, less 1"),
    ("batch/row_imbalance", "", "most expensive over mean row of a data rank, less 1: what pipeline stages wait for"),
    # ------------------------------------------------------------------------------------------- times
    ("time/step_s", "s", "the whole step, without checkpoint and evaluation"),
    ("time/generate_s", "s", "from the step's first request to its last response; ahead of the policy, the wait for groups"),
    ("time/reward_s", "s", "waiting for grading after the last response (the rest of it runs beside generation)"),
    ("time/logprobs_s", "s", "old and reference log-probs"),
    ("time/update_s", "s", "forward, backward and optimizer"),
    ("time/evaluate_s", "s", "waiting for an evaluation that went on beside the step, which does not count this"),
    ("time/sync_s", "s", "new weights to the engines"),
    ("time/wall_s", "s", "since the run began, restarts included, idle time between them not"),
    ("throughput/generated_tokens_per_s", "tokens/s", "response tokens over time/generate_s (ahead: over the step)"),
    ("throughput/trained_tokens_per_s", "tokens/s", "response tokens over time/update_s"),
    ("memory/rss_bytes", "bytes", "resident memory of rank 0"),
    ("memory/gpu_peak_bytes", "bytes", "peak of the memory that torch held on a trainer's GPU, the fullest one"),
    # ---------------------------------------------------------- what `alphamed plan` predicts of a step of these lengths
    ("plan/step_s", "s", "predicted time/step_s"),
    ("plan/generate_s", "s", "predicted time/generate_s"),
    ("plan/logprobs_s", "s", "predicted time/logprobs_s"),
    ("plan/update_s", "s", "predicted time/update_s"),
    ("plan/sync_s", "s", "predicted time/sync_s"),
    ("plan/memory_bytes", "bytes", "predicted peak of the fullest trainer rank"),
)

MAX_STEP = 10**9
"""No run has more; file names hold them with six digits."""
BARE_BOX_WORDS = 5
"""A response whose text before its last box holds fewer words no longer reasons. "The answer is" are three."""


def read_rows(path: Path) -> list[dict[str, float | None]]:
    """The steps in a metrics.jsonl, rising; [] where there is none. ConfigError names a line that is no step's."""
    rows = read_json_lines(path)
    last = 0
    for number, row in enumerate(rows, start=1):
        odd = [name for name, value in row.items() if not _is_number(value)]
        step = row.get("step")
        if odd or not isinstance(step, int):
            raise ConfigError(
                f"{path}: line {number} holds no {'number' if odd else 'whole number'} under "
                f"{(odd or ['step'])[0]!r}; remove it"
            )
        if not last < step <= MAX_STEP:
            why = (
                f"steps go up to {MAX_STEP:,}"
                if step > MAX_STEP
                else f"it comes after step {last}"
                if last
                else "the first is 1"
            )
            raise ConfigError(f"{path}: line {number} holds step {step}, and {why}; remove it")
        last = step
    return rows


def step_of(row: Mapping[str, float | None]) -> int:
    """The step of a row that `read_rows` returned."""
    step = row["step"]
    assert step is not None, row
    return int(step)


def last_step(rows: Iterable[Mapping[str, float | None]]) -> int:
    """The largest step of rows that `read_rows` returned; 0 without any."""
    return max(map(step_of, rows), default=0)


def _is_number(value: object) -> bool:
    """Whether it can be a metric: null too, which stands for NaN, but neither true nor a whole number beyond every float."""
    return (
        not isinstance(value, bool)
        and isinstance(value, int | float | None)
        and (not isinstance(value, int) or abs(value) < 1 << 1000)
    )


def undeclared(names: Iterable[str]) -> list[str]:
    """The names that `METRICS` does not know, sorted."""
    return sorted(set(names) - METRICS.keys())


def reduce_groups(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """The metrics of a step's graded groups. Every sample counts once, every group once; ValueError without any sample."""
    outcomes = [outcome for group in groups for outcome in group.outcomes]
    rollouts = [rollout for group in groups for rollout in group.group.rollouts]
    if not outcomes or len(outcomes) != len(rollouts):
        raise ValueError(
            f"metrics need graded samples: {len(groups)} groups hold {len(rollouts)} rollouts and {len(outcomes)} outcomes"
        )
    stats = ResponseStats.of_groups(groups)
    rewards = [reward for group in groups for reward in group.rewards]
    bare_boxes = sum(is_bare_box(rollout.text) for rollout, outcome in zip(rollouts, outcomes) if outcome.boxed)
    return {
        "reward/mean": sum(rewards) / len(rewards),
        "reward/correct": stats.accuracy,
        "reward/boxed": stats.share(stats.boxed),
        "reward/unparseable": stats.share(stats.unparseable),
        "reward/truncated": stats.share(stats.truncated),
        "reward/failed": stats.share(stats.failed),
        "reward/effective_groups": sum(group.has_signal for group in groups) / len(groups),
        "reward/bare_box": bare_boxes / stats.boxed if stats.boxed else 0.0,
        "response/tokens_mean": stats.tokens_mean,
        "response/tokens_max": float(stats.tokens_max),
    }


def is_bare_box(text: str) -> bool:
    """Whether fewer than BARE_BOX_WORDS words stand before the last `\\boxed` of a response."""
    return word_count(text[: text.rfind("\\boxed")]) < BARE_BOX_WORDS if "\\boxed" in text else False


def rates(metrics: Mapping[str, float], response_tokens: int) -> dict[str, float]:
    """Throughput from the step's times (see METRICS); a rate whose time is absent or 0 is left out."""
    generate = metrics.get("time/generate_s", 0.0)
    train = metrics.get("time/update_s", 0.0)
    rates = {}
    if generate > 0:
        rates["throughput/generated_tokens_per_s"] = response_tokens / generate
    if train > 0:
        rates["throughput/trained_tokens_per_s"] = response_tokens / train
    return rates
