"""Metrics of a step against numbers worked out by hand, the declared names, and the spike rule."""

import math
import re
from pathlib import Path

import pytest

import alphamed
from alphamed.records import (
    Batch,
    FinishReason,
    MicroBatch,
    MiniBatch,
    Outcome,
    Question,
    Rollout,
    RolloutGroup,
    ScoredGroup,
    Segment,
)
from alphamed.rundir.dumps import MAX_SPIKE_DUMPS, SpikeWatch, dump_batch
from alphamed.rundir.metrics import METRICS, is_bare_box, rates, reduce_groups, undeclared

NAMES_OF_THE_ISSUE = """step policy_version reward/mean reward/correct reward/unparseable reward/truncated
    reward/effective_groups response/tokens_mean response/tokens_max policy/loss policy/kl policy/entropy
    policy/clip_fraction policy/grad_norm policy/lr policy/logprob_diff_mean policy/logprob_diff_max time/step_s
    time/generate_s time/reward_s time/logprobs_s time/update_s time/sync_s throughput/generated_tokens_per_s
    throughput/trained_tokens_per_s memory/rss_bytes""".split()

C, W, U, T, X = Outcome.CORRECT, Outcome.WRONG, Outcome.UNPARSEABLE, Outcome.TRUNCATED, Outcome.CRASH


def group(name, outcomes, rewards, lengths, texts=None, cut=()):
    """`cut`: samples that the token limit cut beside those whose outcome says so."""
    question = Question(name, "?", {"A": "a", "B": "b"}, "A")
    texts = texts or ["one two three four five \\boxed{A}"] * len(outcomes)
    ends = [FinishReason.LENGTH if outcome == T or i in cut else FinishReason.STOP for i, outcome in enumerate(outcomes)]
    rollouts = tuple(
        Rollout(name, name, i, tuple(range(n)), (-0.5,) * n, text, ends[i], 3)
        for i, (n, text) in enumerate(zip(lengths, texts))
    )
    return ScoredGroup(
        RolloutGroup(name, question, (1, 2), rollouts),
        tuple(outcomes),
        tuple(rewards),
        tuple(r - sum(rewards) / len(rewards) for r in rewards),
        (None,) * len(outcomes),
    )


def test_reduction_of_two_groups_by_hand():
    metrics = reduce_groups(
        [
            group(
                "a",
                [C, W, U, T],
                [1.0, 0.1, 0.0, 0.0],
                [10, 20, 30, 40],
                texts=["because it is so, therefore \\boxed{A}", "\\boxed{B}", "no", "on and"],
            ),
            group("b", [C, C, C, X], [1.0, 1.0, 1.0, 1.0], [1, 2, 3, 4]),
        ]
    )
    assert metrics == pytest.approx(
        {
            "reward/mean": 5.1 / 8,
            "reward/correct": 4 / 8,
            "reward/boxed": 5 / 8,
            "reward/unparseable": 1 / 8,
            "reward/truncated": 1 / 8,
            "reward/failed": 1 / 8,
            "reward/effective_groups": 1 / 2,
            "reward/bare_box": 1 / 5,
            "response/tokens_mean": 110 / 8,
            "response/tokens_max": 40.0,
        }
    )


def test_the_outcome_shares_add_up_to_one():
    metrics = reduce_groups([group("a", list(Outcome), [0.0] * 6, [1] * 6)])
    assert sum(metrics[f"reward/{kind}"] for kind in ("boxed", "unparseable", "truncated", "failed")) == pytest.approx(1)


def test_a_response_that_was_cut_and_graded_all_the_same_counts_as_cut():
    """reward.truncated: grade."""
    assert reduce_groups([group("a", [C, W, U, T], [1.0, 0.0, 0.0, 0.0], [9] * 4, cut=(0, 2))])["reward/truncated"] == 3 / 4


def test_groups_of_different_size_count_by_sample():
    metrics = reduce_groups([group("a", [C], [1.0], [5]), group("b", [W] * 3, [0.0] * 3, [1] * 3)])
    assert metrics["reward/mean"] == 0.25 and metrics["response/tokens_mean"] == 2.0


@pytest.mark.parametrize("groups", [[], [group("a", [], [], [])]])
def test_nothing_to_reduce_is_refused(groups):
    with pytest.raises(ValueError, match="need graded samples"):
        reduce_groups(groups)


@pytest.mark.parametrize(
    "text, bare",
    [
        ("\\boxed{A}", True),
        ("The answer is \\boxed{A}", True),
        ("So the answer must be \\boxed{A}", False),
        ("\\boxed{A} or rather, all things considered, \\boxed{B}", False),
        ("no box at all", False),
        ("", False),
    ],
)
def test_bare_box_counts_words_before_the_last_box(text, bare):
    assert is_bare_box(text) is bare


def test_rates_are_tokens_over_the_declared_times():
    times = {"time/generate_s": 4.0, "time/logprobs_s": 1.0, "time/update_s": 10.0}
    assert rates(times, 200) == {"throughput/generated_tokens_per_s": 50.0, "throughput/trained_tokens_per_s": 20.0}
    assert rates({"time/generate_s": 0.0}, 200) == {}  # a replay generates nothing


def test_every_name_of_the_issue_is_declared_with_unit_and_meaning():
    assert undeclared(NAMES_OF_THE_ISSUE) == []
    for name, metric in METRICS.items():
        assert metric.name == name and metric.meaning
        assert name.endswith("_s") <= (metric.unit in ("s", "tokens/s"))
        assert name.endswith("_bytes") <= (metric.unit == "bytes")
    assert undeclared(["step", "reward/maen", "a"]) == ["a", "reward/maen"]
    assert undeclared(reduce_groups([group("a", [C], [1.0], [5])])) == []


def test_every_metric_that_the_source_writes_is_declared():
    package = Path(alphamed.__file__).parent
    families = {name.split("/")[0] for name in METRICS if "/" in name}
    literal = re.compile(rf'"((?:{"|".join(families)})/[a-z0-9_]+)"')
    written = {name for file in package.rglob("*.py") for name in literal.findall(file.read_text(encoding="utf-8"))}
    assert len(written) > 20 and undeclared(written) == []


def test_every_declared_metric_is_written_somewhere():
    """As a literal where steps are measured; what only shows metrics does not count, nor does the table itself."""
    package = Path(alphamed.__file__).parent
    measured = [
        package / "run.py",
        package / "batching.py",
        package / "rundir" / "metrics.py",
        package / "lab" / "planner" / "forecast.py",
        package / "train.py",
        package / "data" / "example_supply.py",
        *(package / "megatron").glob("*.py"),
        *(package / "rollout").glob("*.py"),
    ]
    text = "".join(path.read_text(encoding="utf-8") for path in measured)
    assert [name for name in METRICS if text.count(f'"{name}"') < 2] == []


# ---------------------------------------------------------------------------------------------------------- bad updates
def steps(watch, losses, norms):
    return [watch.check({"policy/loss": loss, "policy/grad_norm": norm}) for loss, norm in zip(losses, norms)]


def test_a_gradient_norm_over_ten_times_its_median_is_a_spike():
    watch = SpikeWatch()
    assert steps(watch, [0.01] * 10, [0.5] * 10) == [None] * 10
    assert watch.check({"policy/loss": 0.01, "policy/grad_norm": 4.9}) is None
    assert "policy/grad_norm 5.1 is over 10 times" in watch.check({"policy/loss": 0.01, "policy/grad_norm": 5.1})


def test_small_values_and_a_short_history_are_no_spikes():
    watch = SpikeWatch()
    assert watch.check({"policy/loss": 50.0, "policy/grad_norm": 90.0}) is None  # nothing to compare with yet
    watch = SpikeWatch()
    steps(watch, [1e-6] * 20, [1e-3] * 20)
    assert watch.check({"policy/loss": -0.9, "policy/grad_norm": 0.9}) is None  # a million times, but below 1
    assert "policy/loss -1.5" in watch.check({"policy/loss": -1.5, "policy/grad_norm": 0.9})


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_a_value_that_is_not_finite_is_always_dumped_and_never_remembered(bad):
    watch = SpikeWatch()
    assert watch.check({"policy/loss": bad, "policy/grad_norm": 1.0}) == "policy/loss is not finite"
    steps(watch, [1.0] * 10, [1.0] * 10)
    assert watch.check({"policy/loss": 1.0, "policy/grad_norm": 1.0}) is None


def test_a_run_that_spikes_for_ever_dumps_a_few_times():
    watch = SpikeWatch()
    steps(watch, [0.0] * 30, [1.0] * 30)
    reasons = [watch.check({"policy/loss": 0.0, "policy/grad_norm": 100.0}) for _ in range(MAX_SPIKE_DUMPS + 3)]
    assert [reason is not None for reason in reasons] == [True] * MAX_SPIKE_DUMPS + [False] * 3


def test_a_dumped_batch_reads_back_without_our_classes(tmp_path):
    import torch

    row = MicroBatch(
        torch.tensor([5, 6]),
        torch.tensor([6, 7]),
        torch.arange(2),
        torch.tensor([False, True]),
        torch.tensor([-1, 0]),
        torch.tensor([0.0, -0.25]),
        torch.tensor([0.0, 1.5]),
        (Segment(1, (1,)),),
        ((0, 0),),
    )
    batch = Batch((MiniBatch((row,), 1, 1),), {"batch/dp_imbalance": 0.0})
    path = dump_batch(tmp_path, 7, 2, "policy/loss is not finite", batch)
    assert path == tmp_path / "dumps" / "step_000007" / "rank_2.pt"
    read = torch.load(path, weights_only=True)
    assert read["step"] == 7 and read["reason"] == "policy/loss is not finite"
    assert read["rollouts"] == "rollouts/step_000007.parquet"
    micro_batch = read["batch"]["mini_batches"][0]["micro_batches"][0]
    assert torch.equal(micro_batch["rollout_logprobs"], torch.tensor([0.0, -0.25])) and micro_batch["old_logprobs"] is None
    assert micro_batch["segments"] == [{"prefix": 1, "continuations": [1], "attends_shared_prefix": False}] and micro_batch[
        "samples"
    ] == [[0, 0]]
