"""Weights and checkpoints in every layout: Hugging Face -> Megatron -> Hugging Face bit for bit, log-probs and logits
of transformers, and training that goes on from a checkpoint as if it had not stopped, in the same layout and in others.

One torchrun per world size runs all its cases (weights_worker.py); the tests below only compare what it wrote.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from shards import holders
from tiny import tiny_hf

from alphamed.config.sections import ParallelConfig
from alphamed.model.shape import read_shape
from alphamed.weights.buckets import box_of
from alphamed.weights.sync_plan import Slice

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from weights_worker import make_config, token_groups

pytestmark = pytest.mark.slow

MODELS = {
    f"{family}-{'tied' if tied else 'untied'}": {"family": family, "tied": tied, "llama3_rope": family == "llama"}
    for family in ("llama", "qwen2", "qwen3")
    for tied in (True, False)
}
MODELS["one-kv-head"] = {"family": "qwen2", "kv_heads": 1}  # fewer KV heads than tensor ranks
MODELS["bf16"] = {"family": "llama", "dtype": "bfloat16"}
TP2, PP2, DP2, CP2 = {"tensor": 2}, {"pipeline": 2}, {"data": 2}, {"context": 2}
VPP2 = PP2 | {"virtual_pipeline": 2}
PLAIN = {"distributed_optimizer": False}
ADAM = {"eps": 1e-5}  # far above the rounding of a gradient, which 1e-8 would turn into whole updates
LAYOUTS = {1: {"single": {}}, 2: {"tp2": TP2, "pp2": PP2, "vpp2": VPP2, "cp2": CP2}, 4: {"tp2-pp2": TP2 | PP2}}
# Trained 2 steps, saved, trained 2 more; and the same from the checkpoint, in a policy that began with other weights.
RESUMED = {
    1: {"single": {}, "single-plain": PLAIN},
    2: {"tp2": TP2, "vpp2": VPP2, "dp2": DP2, "dp2-plain": DP2 | PLAIN, "cp2": CP2},
    4: {"tp2-dp2": TP2 | DP2, "cp2-dp2": CP2 | DP2},
}
# name: (layout, the case of RESUMED whose checkpoint it loads)
RESHARDED = {
    2: {
        "single-to-tp2": (TP2, "single"),
        "tp2-to-pp2": (PP2, "tp2"),
        "dp2-to-tp2": (TP2, "dp2"),
        "vpp2-to-dp2": (DP2, "vpp2"),
        "plain-to-tp2": (TP2 | PLAIN, "dp2-plain"),
        "single-to-cp2": (CP2, "single"),
        "dp2-to-cp2": (CP2, "dp2"),
        "cp2-to-dp2": (DP2, "cp2"),
    },
    4: {"dp2-to-tp2-pp2": (TP2 | PP2, "dp2"), "tp2-to-pp2-dp2": (PP2 | DP2, "tp2"), "cp2-to-tp2-cp2": (TP2 | CP2, "cp2")},
}


class Job:
    """Models, and where the cases of all world sizes write."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.models = {name: str(tiny_hf(root / "models" / name, **options)) for name, options in MODELS.items()}

    def path(self, name: str, what: str) -> str:
        return str(self.root / f"{name}.{what}")

    def cases(self, world: int) -> list[dict]:
        found = []
        for layout, parallel in LAYOUTS[world].items():
            for model, options in MODELS.items():
                name, folder = f"{layout}.{model}", self.models[model]
                steps = [["load_hf", folder], ["save_hf", self.path(name, "hf"), None], ["parts", self.path(name, "parts")]]
                if model != "bf16":
                    steps.append(["logprobs", self.path(name, "logprobs")])
                if layout in ("single", "tp2") and model != "bf16":
                    steps.append(["logits", self.path(name, "logits")])
                found.append(
                    {"model": folder, "parallel": parallel, "steps": steps, "dtype": "bf16" if model == "bf16" else "fp32"}
                )
        for name, parallel in RESUMED[world].items():
            model = self.models["qwen3-tied"]
            found.append(
                {
                    "model": model,
                    "parallel": parallel,
                    "optimizer": ADAM,
                    "steps": [
                        ["load_hf", model],
                        ["train", 2],
                        ["save", self.path(name, "checkpoints"), 2],
                        ["draw", self.path(name, "drawn")],
                        ["train", 2],
                        ["save_hf", self.path(name, "straight"), None],
                    ],
                }
            )
            found.append(self.resuming(name, parallel, name))
        for name, (parallel, source) in RESHARDED.get(world, {}).items():
            found.append(self.resuming(name, parallel, source))
        return found + (self.failing() if world == 2 else self.other_types() if world == 1 else [])

    def resuming(self, name: str, parallel: dict, source: str) -> dict:
        folder = f"{self.path(source, 'checkpoints')}/step_000002"
        steps = [
            ["load", folder],
            ["adam", self.path(name, "adam")],
            ["draw", self.path(name, "drawn-again")],
            ["decay", 0.01],
            ["train", 2],
            ["save_hf", self.path(name, "resumed"), None],
        ]
        return {
            "model": self.models["qwen3-tied"],
            "parallel": parallel,
            "seed": 99,
            "optimizer": ADAM | {"weight_decay": 0.02},
            "steps": steps,
        }

    def other_types(self) -> list[dict]:
        """BF16 parameters with both optimizers, a checkpoint from before the first update, weights without
        optimizer."""
        found = []
        for name, parallel in (("bf16", {}), ("bf16-plain", PLAIN)):
            base = {"model": self.models["bf16"], "parallel": parallel, "dtype": "bf16"}
            found += [
                base
                | {
                    "steps": [
                        ["load_hf", self.models["bf16"]],
                        ["train", 2],
                        ["save", self.path(name, "checkpoints"), 2],
                        ["train", 2],
                        ["save_hf", self.path(name, "straight"), "bfloat16"],
                    ]
                },
                base
                | {
                    "seed": 99,
                    "steps": [
                        ["load", f"{self.path(name, 'checkpoints')}/step_000002"],
                        ["train", 2],
                        ["save_hf", self.path(name, "resumed"), "bfloat16"],
                    ],
                },
            ]
        model = self.models["llama-untied"]
        begin = self.path("begin", "checkpoints")
        folder = f"{begin}/step_000000"
        return found + [
            {
                "model": model,
                "parallel": {},
                "steps": [
                    ["load_hf", model],
                    ["save", begin, 2],
                    ["train", 2],
                    ["save_hf", self.path("begin", "straight"), None],
                ],
            },
            {
                "model": model,
                "parallel": {},
                "seed": 99,
                "steps": [["load", folder], ["train", 2], ["save_hf", self.path("begin", "resumed"), None]],
            },
            {
                "model": model,
                "parallel": {},
                "seed": 99,
                "steps": [["load_weights", folder], ["save_hf", self.path("begin", "weights"), None]],
            },
        ]

    def failing(self) -> list[dict]:
        """A disk that fills up while a second checkpoint is written; a checkpoint of the same size with other bytes;
        one of another model."""
        model, other, room = self.models["llama-tied"], self.models["llama-untied"], self.path("full", "checkpoints")
        return [
            {
                "model": model,
                "parallel": TP2,
                "steps": [
                    ["load_hf", model],
                    ["train", 1],
                    ["save", room, 2],
                    ["train", 1],
                    ["limit_file_bytes", 200_000],
                    ["fails", self.path("full", "error"), ["save", room, 2]],
                    ["limit_file_bytes", None],
                    ["spoil", f"{room}/step_000001"],
                    ["fails", self.path("spoilt", "error"), ["load", f"{room}/step_000001"]],
                ],
            },
            {
                "model": other,
                "parallel": TP2,
                "steps": [["fails", self.path("other", "error"), ["load", f"{room}/step_000001"]]],
            },
            {
                "model": model,
                "parallel": TP2 | PLAIN,
                "steps": [["fails", self.path("plain", "error"), ["load", f"{room}/step_000001"]]],
            },
        ]

    def launch(self, world: int) -> None:
        spec = self.root / f"cases{world}.json"
        spec.write_text(json.dumps(self.cases(world)))
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={world}",
            str(HERE / "weights_worker.py"),
            str(spec),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"torchrun with {world} ranks failed:\n{done.stderr[-6000:]}"


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Job:
    return Job(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def world1(job) -> Job:
    job.launch(1)
    return job


@pytest.fixture(scope="module")
def world2(world1) -> Job:
    world1.launch(2)  # loads checkpoints that one rank wrote
    return world1


@pytest.fixture(scope="module")
def world4(world2) -> Job:
    world2.launch(4)
    return world2


@pytest.fixture
def done(request) -> Job:
    """The job after the launch of the world size the test is parametrised with."""
    return request.getfixturevalue(f"world{request.param}")


def every(table: dict[int, dict]) -> list:
    return [pytest.param(world, name, id=f"{world}-{name}") for world, names in table.items() for name in names]


def tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    return {k: v for file in Path(folder).glob("*.safetensors") for k, v in load_file(file).items()}


def largest_difference(a: str, b: str) -> float:
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys() and a
    return max((a[k].float() - b[k].float()).abs().max().item() for k in a)


# -------------------------------------------------------------------------------------------------------------- weights
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("done, layout", every(LAYOUTS), indirect=["done"])
def test_round_trip_is_exact(done, layout, model):
    before, after = tensors(done.models[model]), tensors(done.path(f"{layout}.{model}", "hf"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and tensor.shape == after[name].shape, name
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("done, layout", every(LAYOUTS), indirect=["done"])
def test_ranks_hold_what_the_sync_plan_says(request, done, layout, model):
    """And may send it as it lies: every slice is that part of the model's own tensor."""
    world = request.node.callspec.params["done"]
    stored, planned = (
        tensors(done.models[model]),
        holders(read_shape(Path(done.models[model])), ParallelConfig(**LAYOUTS[world][layout])),
    )
    assert list(planned) == list(range(world))
    for rank, slices in planned.items():
        found = torch.load(f"{done.path(f'{layout}.{model}', 'parts')}.{rank}")
        assert [Slice(*piece) for piece, _ in found] == slices
        for piece, (_, tensor) in zip(slices, found, strict=True):
            assert torch.equal(tensor, stored[piece.name][box_of(piece)]), (rank, piece)


@pytest.mark.parametrize("model", [m for m in MODELS if m != "bf16"])
@pytest.mark.parametrize("done, layout", every(LAYOUTS), indirect=["done"])
def test_logprobs_are_those_of_transformers(done, layout, model):
    found = torch.load(done.path(f"{layout}.{model}", "logprobs"))
    expected = reference(done.models[model])
    assert found.keys() == expected.keys()
    for key, logprobs in expected.items():
        torch.testing.assert_close(found[key], logprobs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("model", [m for m in MODELS if m != "bf16"])
@pytest.mark.parametrize("done, layout", [(1, "single"), (2, "tp2")], indirect=["done"])
def test_logits_are_those_of_transformers(done, layout, model):
    """At every position of a packed row, by vocabulary shards side by side."""
    from alphamed.batching import pack
    from alphamed.records import Layout

    vocab = 509
    found = torch.load(done.path(f"{layout}.{model}", "logits"))
    budget = make_config({"model": "", "parallel": {}}).parallel.micro_batch_tokens
    row = pack(token_groups(vocab), Layout(), token_budget=budget)
    micro, theirs = row.mini_batches[0].micro_batches[0], transformers_model(done.models[model])
    compared = start = 0
    for segment in micro.segments:
        prefix = micro.tokens[start : start + segment.prefix]
        at = start + segment.prefix
        for length in segment.continuations:
            ids = torch.cat([prefix, micro.tokens[at : at + length]])
            mine = torch.cat([found[start : start + segment.prefix], found[at : at + length]])[:, :vocab]
            torch.testing.assert_close(mine, theirs(ids[None]).logits[0], rtol=0, atol=1e-4)
            at, compared = at + length, compared + length
        start = at
    assert compared > 10


@cache
@torch.no_grad()
def reference(folder: str) -> dict[tuple[int, int], torch.Tensor]:
    """transformers' log-probs of every response, alone, by (group, sample)."""
    model, found = transformers_model(folder), {}
    for g, group in enumerate(token_groups(509)):
        for s, response in enumerate(group.responses):
            logits = model(torch.cat([group.prompt, response])[None]).logits[0, len(group.prompt) - 1 : -1]
            found[g, s] = logits.log_softmax(-1).gather(1, response[:, None])[:, 0]
    return found


@cache
def transformers_model(folder: str):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------- checkpoints
@pytest.mark.parametrize("done, name", every(RESUMED), indirect=["done"])
def test_resumed_training_is_the_same_to_the_bit(done, name):
    assert largest_difference(done.path(name, "straight"), done.path(name, "resumed")) == 0
    moved = largest_difference(done.path(name, "straight"), done.models["qwen3-tied"])
    assert moved > 2e-3  # 4 steps of Adam at 1e-3


@pytest.mark.parametrize("done, name", every(RESUMED), indirect=["done"])
def test_adam_and_random_state_are_restored(done, name):
    adam = json.loads(Path(done.path(name, "adam")).read_text())
    assert adam["steps"] == [2.0] and adam["separate"] and adam["progress"] == 2
    assert adam["weight_decay"] == 0.02  # the configuration's, not the checkpoint's
    assert json.loads(Path(done.path(name, "drawn")).read_text()) == json.loads(
        Path(done.path(name, "drawn-again")).read_text()
    )


@pytest.mark.parametrize("done, name", every(RESHARDED), indirect=["done"])
def test_a_checkpoint_loads_under_another_layout(done, name):
    """Layouts differ by rounding. A lost Adam step would show as 2e-3, a lost moment as more."""
    assert json.loads(Path(done.path(name, "adam")).read_text())["steps"] == [2.0]
    assert largest_difference(done.path("single", "straight"), done.path(name, "resumed")) < 2e-5


@pytest.mark.parametrize("name", ("bf16", "bf16-plain", "begin"))
def test_other_checkpoints_resume_to_the_bit(world1, name):
    assert largest_difference(world1.path(name, "straight"), world1.path(name, "resumed")) == 0


def test_weights_without_optimizer(world1):
    assert largest_difference(world1.path("begin", "weights"), world1.models["llama-untied"]) == 0


def test_a_full_disk_is_one_error_on_all_ranks(world2):
    first, second = json.loads(Path(world2.path("full", "error")).read_text())
    assert first == second and first.startswith("CheckpointError: checkpoint ") and "\n" not in first
    assert "cannot be written (rank " in first and "File too large" in first and "make room" in first
    directory = Path(world2.path("full", "checkpoints"))
    assert (directory / "latest").read_text() == "step_000001\n"
    assert sorted(path.name for path in directory.iterdir()) == ["latest", "step_000001"]


@pytest.mark.parametrize(
    "name, message",
    (
        ("spoilt", "is damaged ("),
        ("other", "is of a model with tied True, model.path has False"),
        ("plain", "was made with parallel.distributed_optimizer: True, now it is False; set it back"),
    ),
)
def test_a_bad_checkpoint_is_one_error_on_all_ranks(world2, name, message):
    first, second = json.loads(Path(world2.path(name, "error")).read_text())
    assert first == second and first.startswith("CheckpointError: checkpoint ")
    assert message in first and "\n" not in first


def test_no_process_and_no_shared_memory_is_left(world4):
    """Megatron's own writer would fork children and keep a manager process."""
    commands = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if p.parent.is_dir()]
    assert not [c for c in commands if str(world4.root).encode() in c]
