"""Packing: every response exactly once, prompts shared, budgets kept, ranks equal; rows worked out by hand."""

import random
from dataclasses import replace

import pytest
import torch

from alphamed.algorithms.loss import normalizer, policy_loss, token_weights
from alphamed.batching import attach, pack
from alphamed.records import Layout, Segment, TokenGroup


def group(prompt, responses, advantages=None):
    return TokenGroup(
        torch.tensor(prompt),
        tuple(map(torch.tensor, responses)),
        tuple(torch.arange(len(r)) + 0.5 for r in responses),
        torch.tensor(advantages or [1.0] * len(responses)),
        1,
    )


def rows(batch):
    return [m for mini in batch.mini_batches for m in mini.micro_batches]


def test_one_group_by_hand():
    # prompt 1 2 3; answers 4 5 and 6: prefix 1 2, continuations (3 4 -> labels 4 5) and (3 -> label 6)
    batch = pack([group([1, 2, 3], [[4, 5], [6]], [0.25, -0.5])], Layout(), token_budget=64)
    (row,) = rows(batch)
    assert row.tokens.tolist() == [1, 2, 3, 4, 3]
    assert row.labels.tolist() == [0, 0, 4, 5, 6]
    assert row.positions.tolist() == [0, 1, 2, 3, 2]
    assert row.mask.tolist() == [False, False, True, True, True]
    assert row.sequence.tolist() == [-1, -1, 0, 0, 1]
    assert row.advantages.tolist() == [0, 0, 0.25, 0.25, -0.5]
    assert row.rollout_logprobs.tolist() == [0, 0, 0.5, 1.5, 0.5]
    assert row.segments == (Segment(2, (2, 1)),)
    assert row.samples == ((0, 0), (0, 1))
    assert (batch.mini_batches[0].response_tokens, batch.mini_batches[0].sequences) == (3, 2)
    # unshared the prompt of 3 is read twice: (3 + 2 - 1) + (3 + 1 - 1) = 7 tokens against 5
    assert batch.metrics["batch/shared_fraction"] == pytest.approx(1 - 5 / 7)


def test_response_tokens_without_a_loss_are_read_like_a_prompt():
    """A turn of the user inside a response: 5 of (4 5 6) has no loss."""
    plain = group([1, 2, 3], [[4, 5, 6], [7]], [0.25, -0.5])
    marked = replace(plain, trained=(torch.tensor([True, False, True]), torch.tensor([True])))
    batch = pack([marked], Layout(), token_budget=64)
    (row,) = rows(batch)
    assert row.tokens.tolist() == [1, 2, 3, 4, 5, 3]
    assert row.labels.tolist() == [0, 0, 4, 0, 6, 7]
    assert row.mask.tolist() == [False, False, True, False, True, True]
    assert row.sequence.tolist() == [-1, -1, 0, -1, 0, 1]
    assert row.advantages.tolist() == [0, 0, 0.25, 0, 0.25, -0.5]
    assert row.rollout_logprobs.tolist() == [0, 0, 0.5, 0, 2.5, 0.5]
    assert (batch.mini_batches[0].response_tokens, batch.mini_batches[0].sequences) == (3, 2)
    assert row.segments == rows(pack([plain], Layout(), token_budget=64))[0].segments


def test_without_sharing_a_sample_is_one_plain_segment():
    batch = pack([group([1, 2, 3], [[4, 5], [6]])], Layout(), token_budget=64, share_prompts=False)
    (row,) = rows(batch)
    assert row.tokens.tolist() == [1, 2, 3, 4, 1, 2, 3]
    assert row.labels.tolist() == [0, 0, 4, 5, 0, 0, 6]
    assert row.positions.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert row.segments == (Segment(4), Segment(3))


def test_a_group_over_the_budget_is_split_and_repeats_its_prompt():
    batch = pack([group([1, 2, 3], [[4, 5], [6, 7], [8, 9]])], Layout(), token_budget=6)
    assert sorted(r.samples for r in rows(batch)) == [((0, 0), (0, 1)), ((0, 2),)]
    assert sorted(r.segments[0].continuations for r in rows(batch)) == [(2,), (2, 2)]
    assert all(r.tokens[:2].tolist() == [1, 2] for r in rows(batch))
    assert batch.metrics["batch/micro_batches"] == 2


def test_rows_are_rounded_up_within_the_budget():
    batch = pack([group([1, 2, 3], [[4, 5], [6, 7]])], Layout(tensor=4, sequence_parallel=True), token_budget=9)
    (row,) = rows(batch)
    assert len(row.tokens) == 8 and row.segments[-1] == Segment(2) and not row.mask[6:].any()
    assert batch.metrics["batch/padding_fraction"] == pytest.approx(2 / 8)


def test_what_all_prompts_begin_with_stands_once_in_a_row():
    # 40 common tokens, then 1 2 and 3: prefixes 1 (before the 2) and none, the 2 and the 3 begin the continuations
    stem = list(range(100, 140))
    batch = pack([group([*stem, 1, 2], [[4, 5], [6]]), group([*stem, 3], [[7]])], Layout(), token_budget=64)
    (row,) = rows(batch)
    assert row.segments == (
        Segment(40),
        Segment(1, (2, 1), attends_shared_prefix=True),
        Segment(0, (1,), attends_shared_prefix=True),
    )
    assert row.tokens.tolist() == [*stem, 1, 2, 4, 2, 3]
    assert row.labels.tolist() == [0] * 40 + [0, 4, 5, 6, 7]
    assert row.positions.tolist() == [*range(40), 40, 41, 42, 41, 40]
    assert row.sequence.tolist() == [-1] * 41 + [0, 0, 1, 2]
    # unshared: (42 + 2 - 1) + (42 + 1 - 1) + (41 + 1 - 1)
    assert batch.metrics["batch/shared_fraction"] == pytest.approx(1 - 45 / 126)


def test_a_stem_heads_every_row_within_the_budget():
    groups = [group([*range(50), g, 1], [[g] * 4] * 3) for g in range(6)]  # 13 tokens each behind a stem of 50
    (one, two), (other, last) = (rows(pack(groups, Layout(data=2, data_rank=r), token_budget=80)) for r in range(2))
    for row in (one, two, other, last):
        assert len(row.tokens) <= 80 and row.tokens[:50].tolist() == list(range(50))
        assert row.segments[0] == Segment(50) and all(s.attends_shared_prefix for s in row.segments[1:])
    assert sum(len(row.samples) for row in (one, two, other, last)) == 18


def test_a_short_or_lone_beginning_is_no_stem():
    short = pack([group([1] * 31 + [2, 3], [[4]]), group([1] * 31 + [5, 6], [[4]])], Layout(), token_budget=99)
    lone = pack([group([1] * 60, [[4], [5]])], Layout(), token_budget=99)
    apart = pack([group([1] * 60, [[4]]), group([1] * 60, [[4]])], Layout(), token_budget=99, share_prompts=False)
    assert not any(s.attends_shared_prefix for batch in (short, lone, apart) for row in rows(batch) for s in row.segments)


@pytest.mark.parametrize("seed", range(40))
def test_invariants(seed):
    r = random.Random(seed)
    stem = [7] * r.choice([0, 0, 33])
    groups = [
        group(
            stem + [r.randrange(9) for _ in range(r.randint(2, 30))],
            [[r.randrange(9) for _ in range(r.randint(1, 25))] for _ in range(r.randint(1, 6))],
        )
        for _ in range(r.randint(2, 12))
    ]
    data, tensor, minis = r.randint(1, 4), r.choice([1, 2, 4]), r.randint(1, 2)
    budget, share = r.randint(60, 200) + len(stem), r.random() < 0.7
    stages = random.Random(seed + 1000).choice([1, 2, 3, 4])
    layouts = [
        Layout(
            data=data,
            data_rank=d,
            tensor=tensor,
            sequence_parallel=tensor > 1,
            pipeline=stages,
            virtual_pipeline=2 if stages > 1 else None,
        )
        for d in range(data)
    ]
    batches = [pack(groups, la, token_budget=budget, mini_batches=minis, share_prompts=share) for la in layouts]
    seen = []
    for m in range(minis):
        per_rank = [b.mini_batches[m] for b in batches]
        assert len({len(x.micro_batches) for x in per_rank}) == 1
        assert len(per_rank[0].micro_batches) % stages == 0
        assert len({(x.response_tokens, x.sequences) for x in per_rank}) == 1
        assert sum(int(row.mask.sum()) for x in per_rank for row in x.micro_batches) == per_rank[0].response_tokens
        assert sum(row.sequences for x in per_rank for row in x.micro_batches) == per_rank[0].sequences
    for row in (row for b in batches for row in rows(b)):
        assert len(row.tokens) == sum(s.tokens for s in row.segments) <= budget
        assert len(row.tokens) % layouts[0].token_multiple == 0 and len(row.tokens) > 0
        for s, (g, j) in enumerate(row.samples):
            at = row.sequence == s
            assert row.labels[at].tolist() == groups[g].responses[j].tolist()
            assert row.rollout_logprobs[at].tolist() == groups[g].rollout_logprobs[j].tolist()
            first = int(at.nonzero()[0])
            assert row.positions[first] == len(groups[g].prompt) - 1 and row.tokens[first] == groups[g].prompt[-1]
        seen += row.samples
    assert sorted(seen) == [(g, j) for g, x in enumerate(groups) for j in range(len(x.responses))]
    again = pack(groups, layouts[0], token_budget=budget, mini_batches=minis, share_prompts=share)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(rows(again), rows(batches[0])))


# ---------------------------------------------------------------------------------------------------------- without a signal
def test_responses_without_advantage_are_left_out_and_still_counted():
    groups = [group([1, 2, 3], [[4, 5], [6], [7, 7, 7]], [0.5, 0.0, -0.5]), group([1, 2], [[8], [9, 9]], [0.0, 0.0])]
    batch = pack(groups, Layout(), token_budget=64, skip_no_signal=True)
    (row,) = rows(batch)
    assert row.samples == ((0, 0), (0, 2))
    assert row.tokens.tolist() == [1, 2, 3, 4, 3, 7, 7] and row.labels.tolist() == [0, 0, 4, 5, 7, 7, 7]
    assert row.segments == (Segment(2, (2, 3)),)
    assert (batch.mini_batches[0].response_tokens, batch.mini_batches[0].sequences) == (2 + 1 + 3 + 1 + 2, 5)
    assert batch.metrics["batch/skipped_fraction"] == pytest.approx(3 / 5)
    assert batch.metrics["batch/shared_fraction"] == pytest.approx(1 - 7 / ((2 + 2) + (2 + 3)))  # of what is packed
    assert pack(groups, Layout(), token_budget=64).metrics["batch/skipped_fraction"] == 0


def test_a_mini_batch_without_any_advantage_is_kept():
    groups = [group([1, 2], [[3], [4]], [1.0, -1.0]), group([1, 2], [[5], [6]], [0.0, 0.0])]
    first, second = pack(groups, Layout(), token_budget=64, mini_batches=2, skip_no_signal=True).mini_batches
    assert [m.samples for m in first.micro_batches + second.micro_batches] == [((0, 0), (0, 1)), ((1, 0), (1, 1))]


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
@pytest.mark.parametrize("share", [True, False])
def test_the_gradient_is_that_of_all_responses(aggregation, share):
    """Of the policy loss in a toy policy whose log-prob of a token is a number of its own, summed over rows and data ranks."""
    r = random.Random(4)
    groups = [
        group(
            [1, *(r.randrange(9) for _ in range(r.randint(1, 9)))],
            [[r.randrange(9) for _ in range(r.randint(1, 9))] for _ in range(4)],
            r.choice([[0.0] * 4, [1.5, -0.5, -0.5, -0.5], [1.0, 0.0, -1.0, 0.0]]),
        )
        for _ in range(9)
    ]
    assert any(not g.advantages.any() for g in groups)

    def gradient(skip):
        table = torch.zeros(9, requires_grad=True)
        for rank in range(2):
            packed = dict(token_budget=48, mini_batches=2, share_prompts=share, skip_no_signal=skip)
            for mini in pack(groups, Layout(data=2, data_rank=rank), **packed).mini_batches:
                for row in mini.micro_batches:
                    logprobs, sequence = table[row.labels[row.mask]], row.sequence[row.mask]
                    weights = token_weights(sequence, aggregation, 8)
                    terms = policy_loss(
                        logprobs, logprobs.detach(), row.advantages[row.mask], weights, sequence, "clip", 0.2, 0.28
                    )
                    (terms.loss_sum / normalizer(aggregation, mini.response_tokens, mini.sequences)).backward()
        return table.grad

    assert gradient(False).abs().max() > 0.01
    torch.testing.assert_close(gradient(True), gradient(False), rtol=1e-5, atol=1e-7)


def test_data_ranks_share_the_cost():
    groups = [group(list(range(1, 101)), [[1] * n] * 4) for n in (90, 10, 10, 10, 90, 10, 10, 10)]
    batch = pack(groups, Layout(data=2), token_budget=600)
    assert batch.metrics["batch/micro_batches"] == len(rows(batch))  # of one rank
    assert batch.metrics["batch/dp_imbalance"] < 0.05


def test_rows_are_spread_over_the_interleaved_schedule_and_not_filled_up_with_idle_ones():
    groups = [group([1, 2, 3], [[4] * 8, [5] * 8]) for _ in range(4)]  # 2 + 16 tokens each: one row of 72 holds all
    (plain,) = rows(pack(groups, Layout(pipeline=4), token_budget=100))
    assert len(plain.tokens) == 72
    virtual = rows(pack(groups, Layout(pipeline=4, virtual_pipeline=2), token_budget=100))
    assert [len(row.tokens) for row in virtual] == [18] * 4 and all(row.samples for row in virtual)


def test_rows_are_balanced_by_cost_and_not_by_tokens():
    """A pair costs 1 / 24576: one sequence of 24,576 tokens costs 24576 + 24576 / 2, 320 of 96 tokens 30720 + 60 in all. So
    the long one's row takes none of the others."""
    long, short = 24576, 96
    groups = [group([1, 2], [[3] * (long - 1)])] + [group([1, 2], [[3] * (short - 1)]) for _ in range(320)]
    batch = pack(groups, Layout(), token_budget=40_000)
    first, second = sorted(rows(batch), key=lambda row: -max(s.tokens for s in row.segments))
    assert len(first.tokens) == 24576 and len(second.tokens) == 320 * 96  # by tokens: 64 short ones in the first
    mean = (1.5 * 24576 + 320 * 96 * (1 + 48 / 24576)) / 2
    assert batch.metrics["batch/row_imbalance"] == pytest.approx(1.5 * 24576 / mean - 1, rel=1e-3)


def test_what_can_not_be_packed_says_so():
    with pytest.raises(ValueError, match="micro_batch_tokens: 8 cannot hold"):
        pack([group([1, 2, 3], [[4] * 20])], Layout(), token_budget=8)
    with pytest.raises(ValueError, match="mini_batches: 2"):
        pack([group([1, 2, 3], [[4]])], Layout(), token_budget=8, mini_batches=2)
    with pytest.raises(ValueError, match="empty response"):
        pack([group([1, 2, 3], [[], [4]])], Layout(), token_budget=8)


def test_attach_puts_values_beside_their_micro_batch():
    batch = pack([group([1, 2, 3], [[4, 5], [6, 7], [8, 9]])], Layout(), token_budget=6)
    values = [[torch.full((len(r.tokens),), float(i)) for i, r in enumerate(rows(batch))]]
    done = attach(batch, "old_logprobs", values)
    assert [float(r.old_logprobs[0]) for r in rows(done)] == [0.0, 1.0]
    assert rows(batch)[0].old_logprobs is None
