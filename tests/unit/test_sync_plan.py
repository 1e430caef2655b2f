"""Buckets, order, digests and the probe's arithmetic, against hand-computed values."""

import numpy
import pytest
import torch

from alphamed.weights.buckets import BLOCK_ROWS, ROW_WORDS, Assembly, digest, pack, unpack
from alphamed.weights.probe import ProbeDifference
from alphamed.weights.sync_plan import Bucket, Link, Member, Slice, SyncPlan, in_turns, members


def link(stage=0, sizes=(3, 4, 2, 9, 1), dtype="float32", bucket_bytes=32, receivers=(0,)):
    slices = tuple(Slice.all_of(f"s{stage}t{i}", n if isinstance(n, tuple) else (n,)) for i, n in enumerate(sizes))
    return Link(f"stage {stage}", stage, stage, receivers, "gloo", dtype, bucket_bytes, slices)


def names(bucket):
    return [part.name for part in bucket.slices]


def test_buckets_are_cut_greedily_and_a_large_tensor_in_rows():
    # 32 bytes hold 8 FP32 elements: 3 + 4, then 2 (9 does not fit beside it), 8 of the 9, the ninth and 1
    buckets = link().buckets()
    assert [names(b) for b in buckets] == [["s0t0", "s0t1"], ["s0t2"], ["s0t3"], ["s0t3", "s0t4"]]
    assert [b.bytes for b in buckets] == [28, 8, 32, 8]
    assert [b.index for b in buckets] == [0, 1, 2, 3]
    assert [(part.start, part.shape) for part in buckets[2].slices + buckets[3].slices] == [
        ((0,), (8,)),
        ((8,), (1,)),
        ((0,), (1,)),
    ]


def test_a_large_matrix_is_cut_between_rows_wherever_it_begins():
    part = Slice("w", (10, 6), (2, 3), (5, 3))  # 5 rows of 3: two rows fit into 8 elements
    buckets = Link("l", 0, 0, (0,), "gloo", "float32", 32, (part,)).buckets()
    assert [b.slices for b in buckets] == [
        (Slice("w", (10, 6), (2, 3), (2, 3)),),
        (Slice("w", (10, 6), (4, 3), (2, 3)),),
        (Slice("w", (10, 6), (6, 3), (1, 3)),),
    ]
    with pytest.raises(AssertionError, match="w: a row of 3 elements does not fit into a bucket of 2"):
        Link("l", 0, 0, (0,), "gloo", "float32", 8, (part,)).buckets()


def test_bf16_buckets_hold_twice_as_much_and_are_padded_to_whole_words():
    first, second = link(dtype="bfloat16").buckets()  # 16 elements: 3 + 4 + 2, then 9 + 1
    assert (names(first), first.elements, first.bytes) == (["s0t0", "s0t1", "s0t2"], 10, 20)
    assert (names(second), second.elements, second.bytes) == (["s0t3", "s0t4"], 10, 20)
    assert [b.bytes for b in link(sizes=(16,), dtype="bfloat16", bucket_bytes=30).buckets()] == [28, 4]  # not 32


def test_a_plan_comes_back_from_json_and_an_empty_link_has_no_buckets():
    plan = SyncPlan("gather", (link(0, sizes=((4, 5), 2)), link(1)), members((1, 2)))
    assert SyncPlan.from_json(plan.to_json()) == plan
    assert link(sizes=()).buckets() == ()


def test_workers_are_numbered_over_engines():
    assert members((2, 1, 2)) == (Member(0, 0), Member(0, 1), Member(1, 0), Member(2, 0), Member(2, 1))


def test_links_take_turns_until_the_longer_one_is_left():
    plan = SyncPlan("gather", (link(0), link(1, sizes=(8, 8))), members((1,)))
    assert [(b.link, b.index) for b in in_turns(plan.links)] == [
        ("stage 0", 0),
        ("stage 1", 0),
        ("stage 0", 1),
        ("stage 1", 1),
        ("stage 0", 2),
        ("stage 0", 3),
    ]
    assert plan.bytes == 76 + 64
    assert plan.deadline_s == pytest.approx(30 + 140 / 50e6)
    assert plan.buffer_bytes(0) == 32 + 32 + 32  # one posted on each link, one being loaded


def test_damage_is_named_by_bucket_engine_and_worker():
    links = link(0, sizes=(8, 8), receivers=(0, 2)), link(1, sizes=(1,), receivers=(1, 2))
    plan = SyncPlan("direct", links, members((1, 2)))
    first, second = {"stage 0": [[1, 2], [3, 4]]}, {"stage 1": [[5, 6]]}
    sent = first | second
    assert plan.corrupted(sent, [first, second, sent]) == []
    assert plan.corrupted(sent, [first, second, sent | {"stage 0": [[1, 2], [3, 5]]}]) == [
        "bucket 1 of stage 0 (s0t1 .. s0t1) at engine 1 worker 1"
    ]
    assert plan.corrupted(sent, [first, {"stage 1": [[5, 7]]}, sent]) == [
        "bucket 0 of stage 1 (s1t0 .. s1t0) at engine 1 worker 0"
    ]


# ----------------------------------------------------------------------------------------------------------------- tensors
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensors_come_out_of_a_bucket_as_they_went_in(dtype):
    bucket = Bucket("l", 0, dtype, (Slice.all_of("a", (2, 3)), Slice.all_of("b", (1,)), Slice.all_of("c", (2, 2))))
    tensors = [torch.arange(6.0).view(3, 2).t(), torch.tensor([-7.5]), torch.full((2, 2), 1.00390625)]
    flat = pack(bucket, tensors, "cpu")
    assert flat.numel() == (11 if dtype == "float32" else 12) and flat.dtype == getattr(torch, dtype)
    unpacked = {part.name: tensor for part, tensor in unpack(bucket, flat)}
    assert unpacked["a"].tolist() == [[0, 2, 4], [1, 3, 5]] and unpacked["b"].tolist() == [-7.5]
    # 1 + 2^-8 needs 8 bits of mantissa: exact in FP32, a tie that rounds to even (1.0) in bf16
    assert unpacked["c"].tolist() == [[1.00390625] * 2] * 2 if dtype == "float32" else [[1.0] * 2] * 2


def test_pack_refuses_another_shape_than_was_announced():
    bucket = Bucket("l", 0, "float32", (Slice.all_of("a", (2, 3)),))
    with pytest.raises(AssertionError, match=r"a: planned as \(2, 3\), exported as \(3, 2\)"):
        pack(bucket, [torch.zeros(3, 2)], "cpu")


def test_a_tensor_in_parts_is_joined_when_the_last_has_come():
    assembly, whole = Assembly(), torch.arange(12.0).view(4, 3)
    parts = [Slice("w", (4, 3), (2, 0), (2, 3)), Slice("w", (4, 3), (0, 0), (2, 1)), Slice("w", (4, 3), (0, 1), (2, 2))]
    tensors = [whole[2:], whole[:2, :1], whole[:2, 1:]]
    assert [assembly.add(part, tensor) for part, tensor in zip(parts[:2], tensors[:2], strict=True)] == [None, None]
    assert torch.equal(assembly.add(parts[2], tensors[2]), whole)
    assert assembly.add(Slice.all_of("v", (4, 3)), whole) is whole


def words(*values):
    return torch.tensor(values, dtype=torch.int32).view(torch.float32)


def test_digest_is_the_sum_and_the_sum_weighted_by_position():
    assert digest(words(5, -2, 7)).tolist() == [10, 5 * 1 - 2 * 2 + 7 * 3]
    assert digest(words(7, -2, 5)).tolist() == [10, 7 * 1 - 2 * 2 + 5 * 3]


def test_digest_counts_positions_across_blocks_and_wraps_at_64_bits():
    n = (BLOCK_ROWS["cpu"] + 2) * ROW_WORDS + 3
    flat = torch.full((n,), 2**31 - 1, dtype=torch.int32).view(torch.float32)
    weighted = (2**31 - 1) * n * (n + 1) // 2
    assert weighted > 2**63
    assert digest(flat).tolist() == [(2**31 - 1) * n, (weighted + 2**63) % 2**64 - 2**63]


def test_digest_of_random_words_is_what_numpy_says():
    patterns = numpy.random.default_rng(0).integers(
        -(2**31), 2**31, (BLOCK_ROWS["cpu"] + 2) * ROW_WORDS + 77, dtype=numpy.int32
    )
    wide = patterns.astype(numpy.int64)
    expected = [wide.sum(), (wide * numpy.arange(1, len(wide) + 1)).sum()]
    assert digest(torch.from_numpy(patterns).view(torch.float32)).tolist() == expected


def test_digest_sees_a_single_flipped_bit_of_bf16():
    flat = torch.linspace(-1, 1, 64, dtype=torch.bfloat16)
    damaged = flat.clone()
    damaged.view(torch.uint8)[77] ^= 1
    assert digest(flat).tolist() != digest(damaged).tolist()


# ------------------------------------------------------------------------------------------------------------------- probe
def test_probe_measures_mean_percentile_and_largest():
    difference = ProbeDifference.between([0.0] * 200, [0.01] * 196 + [0.5, 0.25, -1.0, 0.02])
    assert difference.mean == pytest.approx((1.96 + 1.77) / 200)
    assert (difference.p99, difference.max) == (0.5, 1.0)  # sorted: ... 0.02, 0.25, 0.5, 1.0; place 198 of 0..199


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("place", [0, 100, 199])
def test_probe_sees_a_single_nan_at_any_place(exact, place):
    engine = [0.0] * 200
    engine[place] = float("nan")
    assert "nan" in ProbeDifference.between([0.0] * 200, engine).problem(exact)


@pytest.mark.parametrize(
    "difference, exact, refused",
    [
        (ProbeDifference(1e-6, 1e-5, 1.9e-4), True, False),
        (ProbeDifference(1e-6, 1e-5, 2.1e-4), True, True),
        (ProbeDifference(0.079, 0.34, 2.0), False, False),
        (ProbeDifference(0.081, 0.1, 0.1), False, True),
        (ProbeDifference(0.01, 0.36, 0.4), False, True),
        (ProbeDifference(float("nan"), float("nan"), float("nan")), True, True),
    ],
)
def test_probe_limits(difference, exact, refused):
    assert bool(difference.problem(exact)) == refused
