"""Runs every case of one world size through Policy and writes what it gave. Started by torchrun from test_parity.py.

usage: worker.py JOB RESULTS      JOB: torch file {"folders", "data", "cases", "behaviours"}; RESULTS: folder, one file per case and rank
"""

from __future__ import annotations

import sys
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

warnings.simplefilter("ignore")

import oracle
import torch
import torch.distributed as dist
from groups import leave_all_but_the_default

from alphamed.batching import attach, pack
from alphamed.config.loading import build_config
from alphamed.megatron import runtime as runtimes
from alphamed.model.shape import read_shape


@dataclass(frozen=True)
class Case:
    """One way of running the fixed batch. `expect` names the oracle's trace that it must reproduce."""

    name: str
    model: str
    expect: str
    parallel: dict = field(default_factory=dict)
    algorithm: dict = field(default_factory=dict)
    optimizer: dict = field(default_factory=dict)
    budget: int = 400
    mini_batches: int = 1
    device: str = "cpu"
    dtype: str = "fp32"
    fp8: bool = False
    supervised: bool = False


def config_of(case: Case, folder: Path):
    return build_config(
        {
            "model": {"path": str(folder), "dtype": case.dtype, "fp8": case.fp8},
            "data": {"train": ["none.jsonl"]},
            "run": {"steps": 3},
            "rollout": {
                "dtype": "fp32",
                "temperature": oracle.TEMPERATURE,
                "questions_per_step": 8,
                "max_response_tokens": 16,
            },
            "algorithm": {
                "kl_coefficient": oracle.KL_COEFFICIENT,
                "clip_low": oracle.CLIP_LOW,
                "clip_high": oracle.CLIP_HIGH,
                "mini_batches": case.mini_batches,
                **case.algorithm,
            },
            "parallel": case.parallel,
            "prompt": {"max_tokens": 32},
            "optimizer": {
                "lr": oracle.LR,
                "betas": oracle.BETAS,
                "eps": oracle.EPS,
                "weight_decay": oracle.WEIGHT_DECAY,
                "clip_grad": oracle.CLIP_GRAD,
                **case.optimizer,
            },
            "cluster": {"device": case.device, "trainer_threads": 1, "rank_timeout_s": 900.0},
            "sft": {"prompts_per_step": 8} if case.supervised else None,
        }
    )


def fill(batch, name: str, values: dict[oracle.Sample, torch.Tensor]):
    """The batch with `name` set from values by sample, as a caller that knows them all would."""

    def row(micro):
        full = torch.zeros(len(micro.tokens))
        for s, sample in enumerate(micro.samples):
            full[micro.sequence == s] = values[sample]
        return full

    return attach(batch, name, [[row(m) for m in mini.micro_batches] for mini in batch.mini_batches])


def by_sample(batch, name: str) -> dict[oracle.Sample, torch.Tensor]:
    return {
        sample: getattr(m, name)[m.sequence == s]
        for mini in batch.mini_batches
        for m in mini.micro_batches
        for s, sample in enumerate(m.samples)
        if getattr(m, name) is not None
    }


@contextmanager
def policy_of(case: Case, folder: Path, changes: dict | None = None):
    """A policy with the weights of `folder` in the case's layout; its process groups end with the block."""
    tree = config_of(case, folder).model_dump(mode="json")
    for section, values in (changes or {}).items():
        tree[section] |= values
    config = build_config(tree)
    runtime = runtimes.start(config)
    from alphamed.megatron.policy import Policy
    from alphamed.weights.hf_io import load_hf

    shape = read_shape(folder)
    policy = Policy.build(config, shape, runtime)
    load_hf(folder, policy.model_chunks(), shape, policy.layout)
    policy.weights_changed()
    yield policy
    leave_all_but_the_default()


def packed(case: Case, policy, groups):
    return pack(
        groups,
        policy.layout,
        token_budget=case.budget,
        mini_batches=case.mini_batches,
        share_prompts=policy.config.parallel.share_prompts,
    )


def run(case: Case, folder: Path, data: oracle.Data) -> dict:
    data = oracle.supervised(data) if case.supervised else data
    with policy_of(case, folder) as policy:
        bare = packed(case, policy, data.groups)
        batch = bare
        if not case.supervised:
            batch = fill(fill(bare, "old_logprobs", data.old), "reference_logprobs", data.reference)
        found = {
            "before": by_sample(policy.logprobs(bare), "old_logprobs"),
            "case": asdict(case),
            "micro_batches": [len(m.micro_batches) for m in bare.mini_batches],
            "idle": sum(not m.samples for mini in bare.mini_batches for m in mini.micro_batches),
        }
        if policy.runtime.world == 1:
            found["gradient"] = first_gradient(policy, batch)
        found["stats"] = [policy.update(batch) for _ in range(3)]
        found["after"] = by_sample(policy.logprobs(bare), "old_logprobs")
    return found


def first_gradient(policy, batch) -> dict[str, torch.Tensor]:
    """Gradients of the first mini-batch's loss by Hugging Face name."""
    from alphamed.megatron.step import forward_backward
    from alphamed.weights.hf_io import stage_entries
    from alphamed.weights.tensors import to_hf

    forward_backward(policy._wrapped, batch.mini_batches[0], policy.layout, policy.runtime.device, policy.config)
    return {
        name: grad.clone()
        for entry, parameter in stage_entries(policy.model_chunks(), policy.shape)
        for name, grad in zip(entry.hf, to_hf(entry, [parameter.main_grad]), strict=True)
    }


def main(job_file: str, results: str) -> None:
    import behaviour

    job = torch.load(job_file, weights_only=False)
    work = [
        (case["name"], partial(run, Case(**case), Path(job["folders"][case["model"]]), job["data"][case["model"]]))
        for case in job["cases"]
    ]
    work += [
        (name, partial(getattr(behaviour, name), Path(job["folders"]["llama"]), job["data"]["llama"]))
        for name in job.get("behaviours", ())
    ]
    for name, do in work:
        found = do()
        torch.save(found, Path(results) / f"{name}.{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
