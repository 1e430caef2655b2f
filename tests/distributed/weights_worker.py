"""One rank of test_weights.py: runs a list of cases, each in its own layout, and writes what pytest compares.

`weights_worker.py CASES.json`: a list of {"model", "parallel", "steps": [...]}; a step is a method
of Rank with its arguments.
"""

from __future__ import annotations

import json
import random
import resource
import signal
import sys
from pathlib import Path

import numpy
import torch
import torch.distributed as dist
from groups import leave_all_but_the_default

from alphamed.records import TokenGroup


def token_groups(vocab: int) -> list[TokenGroup]:
    """Four groups of two or three responses with advantages that do not cancel; equal in every process."""
    generator = torch.Generator().manual_seed(7)
    groups = []
    for prompt, responses in ((9, (5, 7)), (4, (6, 3, 8)), (12, (4, 4)), (6, (9, 2))):
        draw = lambda n: torch.randint(0, vocab, (n,), generator=generator)
        groups.append(
            TokenGroup(
                prompt=draw(prompt),
                responses=tuple(draw(n) for n in responses),
                rollout_logprobs=tuple(-torch.rand(n, generator=generator) - 5 for n in responses),
                advantages=torch.randn(len(responses), generator=generator),
                policy_version=1,
            )
        )
    return groups


def make_config(case: dict):
    from alphamed.config.loading import build_config

    return build_config(
        {
            "model": {"path": case["model"], "dtype": case.get("dtype", "fp32")},
            "data": {"train": ["unused.jsonl"]},
            "prompt": {"max_tokens": 16},
            "rollout": {"max_response_tokens": 16, "questions_per_step": 4},
            # room to round up, so that rows are cut alike in every layout
            "parallel": {"micro_batch_tokens": 31 + case["parallel"].get("context", 1), **case["parallel"]},
            "run": {"seed": case.get("seed", 1234)},
            "optimizer": {"lr": 1e-3, **case.get("optimizer", {})},
            "cluster": {"device": "cpu", "trainer_threads": 1},
        }
    )


class Rank:
    """This process in the layout of one case, with a policy that has random weights."""

    def __init__(self, case: dict, runtime) -> None:
        from alphamed.megatron.policy import Policy
        from alphamed.model.shape import read_shape

        self.config, self.runtime = make_config(case), runtime
        self.shape = read_shape(Path(case["model"]))
        self.source = Path(case["model"])
        self.policy = Policy(self.config, self.shape, runtime)
        self.done = 0

    def batch(self):
        from alphamed.batching import pack

        p = self.config.parallel
        return pack(
            token_groups(self.shape.vocab),
            self.runtime.layout,
            token_budget=p.micro_batch_tokens,
            share_prompts=p.share_prompts,
        )

    def load_hf(self, folder: str) -> None:
        from alphamed.weights.hf_io import load_hf

        load_hf(Path(folder), self.policy.model_chunks(), self.shape, self.runtime.layout)
        self.policy.weights_changed()

    def save_hf(self, folder: str, dtype: str | None) -> None:
        from alphamed.weights.hf_save import save_hf

        policy = self.policy
        save_hf(
            Path(folder),
            self.source,
            policy.model_chunks(),
            self.shape,
            self.runtime.layout,
            policy.tensor_group,
            policy.pipeline_group,
            dtype=getattr(torch, dtype) if dtype else None,
            max_file_bytes=100_000,
        )

    def parts(self, file: str) -> None:
        """What this rank would send of its own in a direct push: [(slice, tensor)]."""
        from alphamed.weights.source import PolicySource

        source = PolicySource(self.policy, self.shape)
        assert source.rank == self.runtime.rank, f"{source.rank} is planned for rank {self.runtime.rank}"
        torch.save([(tuple(piece), tensor.clone()) for piece, tensor in source.parts()], f"{file}.{source.rank}")

    def logprobs(self, file: str) -> None:
        """Log-probs by (group, sample), from the last stage."""
        layout, found = self.runtime.layout, {}
        for micro in (m for mini in self.policy.logprobs(self.batch()).mini_batches for m in mini.micro_batches):
            for s, key in enumerate(micro.samples if micro.old_logprobs is not None else ()):
                found[key] = micro.old_logprobs[micro.sequence == s]
        if layout.pipeline_rank == layout.pipeline - 1 and layout.tensor_rank == 0 and layout.first_replica:
            torch.save(found, file)

    def logits(self, file: str) -> None:
        """[T, V] logits of the first row, vocabulary shards side by side, padding included. Not for pipelines."""
        with torch.no_grad():
            own = self.policy.model_chunks()[0].logits(self.batch().mini_batches[0].micro_batches[0])
        parts = [torch.empty_like(own) for _ in range(self.runtime.layout.tensor)]
        dist.all_gather(parts, own.contiguous(), group=self.policy.tensor_group)
        if self.runtime.rank == 0:
            torch.save(torch.cat(parts, -1), file)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.policy.update(self.batch())
            self.done += 1

    def save(self, directory: str, keep: int) -> None:
        from alphamed.megatron import checkpoint

        checkpoint.save(Path(directory), self.policy, {"step": self.done, "cursor": {"epoch": 1}}, keep)

    def load(self, folder: str) -> None:
        from alphamed.megatron import checkpoint

        state = checkpoint.load(Path(folder), self.policy)
        assert state["cursor"] == {"epoch": 1}, state
        self.done = state["step"]

    def load_weights(self, folder: str) -> None:
        from alphamed.megatron import checkpoint

        checkpoint.load_weights(Path(folder), self.policy.model_chunks(), self.shape, self.runtime)

    def adam(self, file: str) -> None:
        """What of the optimizer is easily lost: Adam's step on every parameter, in tensors of their own; the step that
        sets the learning rate; settings, which must be the configuration's."""
        states = [s for part in self.policy.optimizer.chained_optimizers for s in part.optimizer.state.values()]
        self.write(
            file,
            {
                "steps": sorted({float(s["step"]) for s in states}),
                "separate": len({s["step"].data_ptr() for s in states}) == len(states),
                "progress": self.policy.progress.steps,
                "weight_decay": max(g["weight_decay"] for g in self.policy.optimizer.param_groups),
            },
        )

    def draw(self, file: str) -> None:
        """Random numbers of every generator that a checkpoint keeps; the generators are left as they were."""
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        states = random.getstate(), numpy.random.get_state(), torch.get_rng_state(), get_cuda_rng_tracker().get_states()
        with get_cuda_rng_tracker().fork():
            drawn = [torch.rand(1).item()]
        drawn += [random.random(), numpy.random.rand(), torch.rand(1).item()]
        random.setstate(states[0]), numpy.random.set_state(states[1]), torch.set_rng_state(states[2])
        get_cuda_rng_tracker().set_states(states[3])
        everyone = [None] * self.runtime.world
        dist.all_gather_object(everyone, drawn, group=self.runtime.cpu_group)
        self.write(file, everyone)

    def decay(self, value: float) -> None:
        """Set the weight decay, so that training goes on as it was before the checkpoint."""
        for group in self.policy.optimizer.param_groups:
            if group["weight_decay"]:
                group["weight_decay"] = value

    def spoil(self, folder: str) -> None:
        """Overwrite the middle of a checkpoint's tensor files, keeping their size."""
        if self.runtime.rank == 0:
            for file in Path(folder).glob("*.distcp"):
                content = bytearray(file.read_bytes())
                content[:] = bytes(len(content))
                file.write_bytes(content)
        dist.barrier(group=self.runtime.cpu_group)

    def write(self, file: str, found) -> None:
        if self.runtime.rank == 0:
            Path(file).write_text(json.dumps(found))

    def fails(self, file: str, step: list) -> None:
        """Run a step that must raise; write what each rank raised."""
        try:
            self.run(step)
            raised = None
        except Exception as e:
            raised = f"{type(e).__name__}: {e}"
        everyone = [None] * self.runtime.world
        dist.all_gather_object(everyone, raised, group=self.runtime.cpu_group)
        self.write(file, everyone)

    def limit_file_bytes(self, limit: int | None) -> None:
        """Stand in for a full disk: files cannot grow past `limit` bytes."""
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit if limit is not None else hard, hard))

    def run(self, step: list) -> None:
        getattr(self, step[0])(*step[1:])


def main(cases: list[dict]) -> None:
    from alphamed.megatron import runtime as runtimes

    for case in cases:  # the same processes in one layout after another
        rank = Rank(case, runtimes.start(make_config(case)))
        for step in case["steps"]:
            rank.run(step)
        dist.barrier()
        leave_all_but_the_default()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
