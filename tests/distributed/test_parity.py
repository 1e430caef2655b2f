"""Every layout of Policy against one plain process of transformers and torch.optim.AdamW, over three updates.

One torchrun per world size runs all its cases (worker.py); the tests below only compare what it wrote. Tolerances are those
of the project. FP32: |loss difference| <= 1e-5 + 1e-4 |loss|, gradient norm 1e-4 relative, log-probs 2e-5. bf16 on both
sides, with FP32 masters: log-probs 0.02 in the mean, gradient norm 5%.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import oracle
from jobs import make_job, run_cases
from worker import Case

pytestmark = pytest.mark.slow

MODELS = {
    "llama": {"family": "llama", "tied": True, "llama3_rope": True},
    "qwen2": {"family": "qwen2"},
    "qwen3": {"family": "qwen3", "tied": True},
}
TRACES = {
    "plain": {},
    "sequence": {"aggregation": "sequence_mean"},
    "constant": {"aggregation": "constant"},
    "corrected": {"correction": True},
    "two": {"mini_batches": [[0, 1], [2, 3]]},
    "four": {"mini_batches": [[0], [1], [2], [3]]},
    "bf16": {"dtype": torch.bfloat16, "lr": oracle.SMOOTH_LR, "clip": oracle.SMOOTH_CLIP},
    "supervised": {"imitate": True},
    "supervised-bf16": {"imitate": True, "dtype": torch.bfloat16, "lr": oracle.SMOOTH_LR},
}
SMOOTH = {"algorithm": dict(zip(("clip_low", "clip_high"), oracle.SMOOTH_CLIP)), "optimizer": {"lr": oracle.SMOOTH_LR}}
TP2, PP2, DP2 = {"tensor": 2}, {"pipeline": 2}, {"data": 2}
BEHAVIOURS = {1: ("logits", "size_135m", "first_update", "bf16"), 2: ("non_finite", "offloaded_reference")}
SP, UNSHARED = {"sequence": True}, {"share_prompts": False}
FULL, SELECTIVE, CHUNKED = {"recompute": "full"}, {"recompute": "selective"}, {"logprob_chunk_tokens": 7}
CP2 = {"context": 2}
VPP2, OVERLAP = PP2 | {"virtual_pipeline": 2}, {"overlap_grad_reduce": True}


def cases(world: int) -> list[Case]:
    """Those of one world size: each layout in FP32 and, with one model, in bf16."""
    fp32 = fp32_cases(world)
    one_model = [c for c in fp32 if c.expect == "plain" and not c.name.endswith(("-llama", "-qwen2"))]
    return [*fp32, *(replace(c, name=f"{c.name}-bf16", dtype="bf16", expect="bf16", **SMOOTH) for c in one_model)]


def supervised_cases(world: int) -> list[Case]:
    """The same layouts with cross entropy, in FP32 and, where a layout has nothing but its axes, in bf16."""
    layouts = [c for c in fp32_cases(world) if c.expect == "plain" and not c.name.endswith(("-llama", "-qwen2"))]
    fp32 = [replace(c, name=f"{c.name}-supervised", expect="supervised", supervised=True) for c in layouts]
    axes = [c for c in fp32 if not {"recompute", "logprob_chunk_tokens", "share_prompts"} & c.parallel.keys()]
    smooth = {"dtype": "bf16", "expect": "supervised-bf16", "optimizer": SMOOTH["optimizer"]}
    return [*fp32, *(replace(c, name=f"{c.name}-bf16", **smooth) for c in axes)]


def fp32_cases(world: int) -> list[Case]:
    everywhere = lambda name, parallel, **more: [Case(f"{name}-{m}", m, "plain", parallel, **more) for m in MODELS]
    if world == 1:
        return [
            *everywhere("single", {}),
            *everywhere("unshared", UNSHARED),
            Case("cut", "llama", "plain", {}, budget=48),
            Case("chunked", "qwen2", "plain", {"logprob_chunk_tokens": 7}),
            Case("recompute-full", "qwen3", "plain", {"recompute": "full"}),
            Case("recompute-selective", "qwen3", "plain", {"recompute": "selective"}),
            Case("plain-optimizer", "llama", "plain", {"distributed_optimizer": False}),
            Case("sequence-mean", "llama", "sequence", {}, {"aggregation": "sequence_mean"}, budget=48),
            Case("constant", "llama", "constant", {}, {"aggregation": "constant"}, budget=48),
            Case("corrected", "llama", "corrected", {}, {"correction": "tis"}),
            Case("two-mini-batches", "llama", "two", {}, mini_batches=2),
        ]
    if world == 2:
        return [
            *everywhere("tp2", TP2),
            *everywhere("pp2", PP2, budget=48),
            *everywhere("tp2-sp", TP2 | SP),
            *everywhere("dp2", DP2, budget=64),
            Case("tp2-chunked", "llama", "plain", TP2 | {"logprob_chunk_tokens": 7}),
            Case("tp2-sp-chunked", "llama", "plain", TP2 | SP | CHUNKED, budget=64),
            Case("tp2-sp-selective", "qwen2", "plain", TP2 | SP | SELECTIVE, budget=64),
            Case("pp2-recompute", "qwen2", "plain", PP2 | FULL, budget=48),
            Case("pp2-selective-chunked", "llama", "plain", PP2 | SELECTIVE | CHUNKED, budget=48),
            Case("vpp2-recompute", "qwen3", "plain", VPP2 | FULL, budget=48),
            Case("vpp2-selective", "llama", "plain", VPP2 | SELECTIVE, budget=48),
            Case("dp2-overlap-recompute", "llama", "plain", DP2 | OVERLAP | FULL, budget=48),
            Case("tp2-sp-recompute", "qwen3", "plain", TP2 | SP | {"recompute": "full"}, budget=48),
            Case("pp2-unshared", "qwen2", "plain", PP2 | UNSHARED, budget=64),
            Case("vpp2", "llama", "plain", PP2 | {"virtual_pipeline": 2}, budget=48),
            Case("vpp2-odd", "qwen2", "plain", PP2 | {"virtual_pipeline": 2}, budget=200),
            Case("dp2-overlap", "qwen3", "plain", DP2 | {"overlap_grad_reduce": True}, budget=48),
            Case("dp2-plain-optimizer", "llama", "plain", DP2 | {"distributed_optimizer": False}, budget=64),
            Case("dp2-sequence-mean", "llama", "sequence", DP2, {"aggregation": "sequence_mean"}, budget=48),
            Case("dp2-two-mini-batches", "llama", "two", DP2, mini_batches=2),
            *everywhere("cp2", CP2, budget=64),
            Case("cp2-chunked-recompute", "qwen3", "plain", CP2 | CHUNKED | FULL, budget=64),
            Case("cp2-unshared-selective", "llama", "plain", CP2 | UNSHARED | SELECTIVE, budget=64),
            Case("cp2-sequence-mean", "llama", "sequence", CP2 | OVERLAP, {"aggregation": "sequence_mean"}, budget=48),
            Case("dp2-idle-rank", "llama", "four", DP2, mini_batches=4),
            Case("pp2-idle-rows", "llama", "four", PP2 | {"virtual_pipeline": 2}, mini_batches=4),
        ]
    return [
        *everywhere("tp2-pp2", TP2 | PP2, budget=64),
        Case("tp2-pp2-sp", "qwen3", "plain", TP2 | PP2 | SP, budget=64),
        Case("tp2-dp2", "qwen2", "plain", TP2 | DP2, budget=64),
        Case("pp2-dp2", "llama", "plain", PP2 | DP2, budget=48),
        Case(
            "vpp2-dp2-overlap", "qwen3", "plain", PP2 | DP2 | {"virtual_pipeline": 2, "overlap_grad_reduce": True}, budget=48
        ),
        *everywhere("tp2-sp-cp2", TP2 | SP | CP2, budget=64),
        Case("cp2-vpp2", "llama", "plain", CP2 | VPP2, budget=48),
        Case("cp2-dp2-plain-optimizer", "qwen2", "plain", CP2 | DP2 | {"distributed_optimizer": False}, budget=48),
        Case("cp4", "qwen3", "plain", {"context": 4}, budget=64),  # more context ranks than KV heads
        Case("tp4", "llama", "plain", {"tensor": 4}),
        Case("tp4-sp-chunked", "qwen2", "plain", {"tensor": 4} | SP | CHUNKED, budget=64),
        Case("tp2-vpp2-sp-recompute", "llama", "plain", TP2 | VPP2 | SP | FULL, budget=64),
        Case("tp2-vpp2-sp-selective-chunked", "qwen3", "plain", TP2 | VPP2 | SP | SELECTIVE | CHUNKED, budget=64),
        Case("tp2-sp-dp2-overlap-selective", "llama", "plain", TP2 | SP | DP2 | OVERLAP | SELECTIVE, budget=48),
    ]


@pytest.fixture(scope="session")
def job(tmp_path_factory) -> dict:
    """Models, batches and the oracle's traces."""
    return make_job(tmp_path_factory.mktemp("parity"), MODELS)


class Traces(dict[tuple[str, str], oracle.Trace]):
    """(model, what is expected) -> the oracle's trace, made when it is asked for."""

    def __init__(self, job: dict):
        super().__init__()
        self._job = job

    def __missing__(self, key: tuple[str, str]) -> oracle.Trace:
        model, expect = key
        self[key] = oracle.train(Path(self._job["folders"][model]), self._job["data"][model], **TRACES[expect])
        return self[key]


@pytest.fixture(scope="session")
def traces(job) -> Traces:
    return Traces(job)


def launch(job: dict, world: int, request: pytest.FixtureRequest) -> Path:
    """Run the cases that the selected tests are parametrised with. A test of no case looks at a behaviour, or at many cases."""
    tests = [item for item in request.session.items if f"world{world}" in getattr(item, "fixturenames", ())]
    parameters = [item.callspec.params if hasattr(item, "callspec") else {} for item in tests]
    names = {given["case"].name for given in parameters if "case" in given}
    every = any("case" not in given for given in parameters)
    chosen = [case for case in cases(world) if every or case.name in names]
    behaviours = BEHAVIOURS.get(world, ()) if every else ()
    return run_cases(job, f"world{world}", world, chosen, behaviours, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")


@pytest.fixture(scope="session")
def world1(job, request) -> Path:
    return launch(job, 1, request)


@pytest.fixture(scope="session")
def world2(job, request) -> Path:
    return launch(job, 2, request)


@pytest.fixture(scope="session")
def world4(job, request) -> Path:
    return launch(job, 4, request)


@pytest.fixture(scope="session")
def supervised_worlds(job) -> Callable[[int], Path]:
    """World size -> the folder of its supervised cases, one torchrun for each."""
    once: dict[int, Path] = {}

    def of(world: int) -> Path:
        if world not in once:
            quiet = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            once[world] = run_cases(job, f"supervised{world}", world, supervised_cases(world), (), **quiet)
        return once[world]

    return of


# -------------------------------------------------------------------------------------------------------------- comparisons
def ranks(results: Path, case: Case) -> list[dict]:
    files = sorted(results.glob(f"{case.name}.*.pt"))
    assert files, f"{case.name}: no results in {results}"
    return [torch.load(f, weights_only=False) for f in files]


@dataclass(frozen=True)
class Tolerance:
    """`loss`: absolute and relative. `logprobs`: a limit of the mean or of the largest difference."""

    loss: tuple[float, float]
    grad_norm: float
    token_means: float
    logprobs: float
    judge: Callable[[torch.Tensor], torch.Tensor]


TOLERANCES = {
    "fp32": Tolerance((1e-5, 1e-4), 1e-4, 1e-4, 2e-5, torch.amax),
    "bf16": Tolerance((0.02, 0.0), 0.05, 0.02, 0.02, torch.mean),
}


def compare(case: Case, found: list[dict], trace: oracle.Trace) -> None:
    stats, limit = found[0]["stats"], TOLERANCES[case.dtype]
    for other in found[1:]:
        assert other["stats"] == stats, "metrics differ between ranks"
    per_update = len(trace.loss) // len(stats)
    for i, stat in enumerate(stats):
        loss = sum(trace.loss[i * per_update : (i + 1) * per_update]) / per_update
        norm = sum(trace.grad_norm[i * per_update : (i + 1) * per_update]) / per_update
        assert abs(stat["policy/loss"] - loss) <= limit.loss[0] + limit.loss[1] * abs(loss), f"update {i}: loss"
        assert stat["policy/grad_norm"] == pytest.approx(norm, rel=limit.grad_norm), f"update {i}: gradient norm"
    if per_update == 1:
        assert stats[0]["policy/entropy"] == pytest.approx(trace.entropy, abs=limit.token_means)
        if not case.supervised:
            assert stats[0]["policy/kl"] == pytest.approx(trace.kl, abs=limit.token_means)
    for moment in ("before", "after"):
        expected, seen = getattr(trace, moment), {}
        for rank in found:
            for sample, logprobs in rank[moment].items():
                seen.setdefault(sample, []).append(logprobs)
        assert seen.keys() == expected.keys(), f"{moment}: responses"
        difference = torch.cat([logprobs - expected[sample] for sample, copies in seen.items() for logprobs in copies]).abs()
        assert limit.judge(difference) <= limit.logprobs, f"{moment}: log-probs"


def ids(case: Case) -> str:
    return case.name


@pytest.mark.parametrize("case", cases(1), ids=ids)
def test_single_process(case, world1, traces):
    compare(case, ranks(world1, case), traces[case.model, case.expect])


@pytest.mark.parametrize("case", cases(2), ids=ids)
def test_two_ranks(case, world2, traces):
    compare(case, ranks(world2, case), traces[case.model, case.expect])


@pytest.mark.parametrize("case", cases(4), ids=ids)
def test_four_ranks(case, world4, traces):
    compare(case, ranks(world4, case), traces[case.model, case.expect])


@pytest.mark.parametrize(
    "world, case", [(w, c) for w in (1, 2, 4) for c in supervised_cases(w)], ids=lambda x: getattr(x, "name", None)
)
def test_supervised_training_equals_transformers(world, case, supervised_worlds, traces):
    """Cross entropy as transformers computes it: losses, gradient norms and log-probs of three updates, and in one process
    every parameter's gradient."""
    found, trace = ranks(supervised_worlds(world), case), traces[case.model, case.expect]
    compare(case, found, trace)
    assert trace.loss[0] > trace.loss[2] > 1
    if world == 1 and case.dtype == "fp32":
        assert_same_gradients(found[0]["gradient"], trace.gradient)


@pytest.mark.parametrize("case", [c for c in fp32_cases(1) if c.expect == "plain"], ids=ids)
def test_gradients_equal_the_padded_unshared_model(case, world1, traces):
    """Every parameter's gradient, within 1e-5 of the largest one of that parameter."""
    assert_same_gradients(ranks(world1, case)[0]["gradient"], traces[case.model, "plain"].gradient)


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        worst = (gradient - expected[name]).abs().max() / expected[name].abs().max()
        assert worst <= 1e-5, f"{name}: {worst:.1e}"


def test_the_layouts_are_what_they_claim(world1, world2):
    """A budget that should cut the batch does, data ranks hold unequal shares, and one idles where it should."""
    by_name = {c.name: c for c in [*cases(1), *cases(2)]}
    assert ranks(world1, by_name["single-llama"])[0]["micro_batches"] == [1]
    assert ranks(world1, by_name["cut"])[0]["micro_batches"][0] > 2
    assert ranks(world2, by_name["vpp2-odd"])[0]["micro_batches"] == [2]  # the schedule needs a multiple of 2
    tokens = [sum(len(x) for x in rank["before"].values()) for rank in ranks(world2, by_name["dp2-llama"])]
    assert tokens[0] != tokens[1], "data ranks were meant to hold different numbers of tokens"
    assert sum(rank["idle"] for rank in ranks(world2, by_name["dp2-idle-rank"])) == 4


# --------------------------------------------------------------------------------------------------------------- behaviours
def behaviour(results: Path, name: str) -> list[dict]:
    files = sorted(results.glob(f"{name}.*.pt"))
    assert files, f"{name}: no results in {results}"
    return [torch.load(f, weights_only=False) for f in files]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_logits_equal_transformers(family, tied, world1):
    found = behaviour(world1, "logits")[0][family, tied]
    assert found["tokens"] > 30 and found["largest"] > 1
    assert found["difference"] <= 1e-4


def test_logprobs_at_135m_equal_transformers(world1):
    """Packed rows with shared prompts against padded ones without; FP32 rounding grows with depth and width."""
    found = behaviour(world1, "size_135m")[0]
    assert found["parameters"] == 134_515_008  # SmolLM2-135M's, tied embeddings counted once
    assert found["shared"] > 0.5 and found["own"].keys() == found["transformers"].keys()
    own, expected = (torch.cat([found[side][sample] for sample in sorted(found["own"])]) for side in ("own", "transformers"))
    assert len(own) == 189 and own.std() > 1
    assert (own - expected).abs().max() <= 1e-4


def test_first_update_has_ratio_1_and_no_kl_to_itself(world1):
    found = behaviour(world1, "first_update")[0]
    without, recomputed = found["old log-probs absent"], found["recomputed"]
    assert without["policy/ratio_max"] == without["policy/ratio_mean"] == 1.0  # exactly: it is exp(x - x)
    assert recomputed["policy/ratio_max"] == pytest.approx(1.0, abs=1e-6)
    assert recomputed["policy/ratio_mean"] == pytest.approx(1.0, abs=1e-6)
    assert recomputed["policy/kl"] == pytest.approx(0.0, abs=1e-6)
    for stats in found.values():
        assert stats["policy/clip_fraction"] == 0.0
        assert stats["policy/approx_kl"] == pytest.approx(0.0, abs=1e-6)
    assert without["policy/loss"] == pytest.approx(recomputed["policy/loss"], abs=1e-6)


def test_bf16_follows_fp32(world1, traces):
    """bf16 keeps 8 bits: log-probs near -7 of a random model are off by some hundredths."""
    found, trace = behaviour(world1, "bf16")[0], traces["llama", "plain"]
    difference = torch.cat([found["before"][s] - x for s, x in trace.before.items()]).abs()
    assert 1e-4 < difference.mean() < 0.05 and difference.max() < 0.3
    assert found["dtype"] == torch.bfloat16 and found["first_ratio"] == 1.0
    moved = torch.cat([found["after"][s] - found["before"][s] for s in trace.before])
    expected = torch.cat([trace.after[s] - trace.before[s] for s in trace.before])
    assert torch.corrcoef(torch.stack([moved, expected]))[0, 1] > 0.9  # updates below a weight's rounding are kept in FP32


def test_an_offloaded_reference_is_the_resident_one(world2):
    for rank in behaviour(world2, "offloaded_reference"):
        assert rank["offloaded held"] == 0 < rank["resident held"], (
            "outside its forward passes an offloaded reference is empty"
        )
        for now in (*rank["offloaded"], rank["resident"][1]):
            assert now.keys() == rank["resident"][0].keys() and len(now) > 5
            assert all(torch.equal(logprobs, rank["resident"][0][sample]) for sample, logprobs in now.items())


@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2"])
def test_a_non_finite_gradient_skips_the_step_on_all_ranks(layout, world2):
    for found in (rank[layout] for rank in behaviour(world2, "non_finite")):
        first, good = found["bad"], found["good"]
        assert first["policy/skipped_updates"] == 1.0 and first["policy/grad_norm"] != first["policy/grad_norm"]
        assert found["unchanged"], "a skipped step must leave the parameters alone"
        assert good["policy/skipped_updates"] == 0.0 and 0 < good["policy/grad_norm"] < 100
        assert found["moved"], "the step after a skipped one must train"
        assert found["raised_at"] == 2, "max_skipped_steps is 1: the second skipped step in a row ends the run"
        assert "not finite" in found["message"] and "max_skipped_steps" in found["message"]
