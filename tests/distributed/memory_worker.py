"""Peak tensor bytes of real updates on the CPU. Started by test_plan_truth.py.

One process: as torch's profiler counts them. It does not see what other threads free, and gloo's do: of several ranks the C
library's count of bytes in use is taken every half millisecond, less what it was before.

usage: memory_worker.py CASES RESULT
    CASES: JSON {name: {"model": fields of config.json, "config": tree, "groups": [questions, prompt, samples, response]}}
    RESULT: JSON {name: {"peak", "static", "tokens", "responses", "rows", "stage"}}, bytes and tokens; of several ranks (under
    torchrun) each writes its own, RESULT.RANK
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import threading
import warnings
from pathlib import Path
from typing import Self

warnings.simplefilter("ignore")

import torch
from groups import leave_all_but_the_default

from alphamed.batching import pack
from alphamed.config.loading import build_config
from alphamed.megatron import runtime as runtimes
from alphamed.model.shape import shape_of
from alphamed.records import TokenGroup


def token_groups(vocab: int, count: int, prompt: int, samples: int, response: int) -> list[TokenGroup]:
    random = torch.Generator().manual_seed(3)

    def ids(n: int) -> torch.Tensor:
        return torch.randint(0, vocab, (n,), generator=random)

    return [
        TokenGroup(
            ids(prompt),
            tuple(ids(response) for _ in range(samples)),
            tuple(torch.full((response,), -1.0) for _ in range(samples)),
            torch.linspace(-1, 1, samples),
            1,
        )
        for _ in range(count)
    ]


def allocated(profile) -> list[int]:
    """Bytes in use after each event of the allocator, from the start of the profile on."""
    found, total = [], 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        found.append(total)
    return found


class InUse:
    """Bytes that the C library has given out and not got back: at most while the block ran, and at its end, less those at its
    beginning. MALLOC_MMAP_THRESHOLD_ must be set, or glibc moves it about."""

    class _Info(ctypes.Structure):  # struct mallinfo2
        _fields_ = [
            (name, ctypes.c_size_t)
            for name in (
                "arena",
                "ordblks",
                "smblks",
                "hblks",
                "hblkhd",
                "usmblks",
                "fsmblks",
                "uordblks",
                "fordblks",
                "keepcost",
            )
        ]

    def __enter__(self) -> Self:
        self._mallinfo = ctypes.CDLL(None).mallinfo2
        self._mallinfo.restype = self._Info
        gc.collect()
        self._before, self.peak, self._stop = self._now(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()
        gc.collect()
        self.left = self._now() - self._before

    def _now(self) -> int:
        info = self._mallinfo()
        return info.uordblks + info.hblkhd

    def _watch(self) -> None:
        while not self._stop.wait(0.0005):
            self.peak = max(self.peak, self._now() - self._before)


class Allocated:
    """The same by torch's profiler."""

    def __enter__(self) -> Self:
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._profile.__exit__(*error)
        used = allocated(self._profile)
        self.peak, self.left = max(used), used[-1]


def measure(case: dict) -> dict:
    config, shape = build_config(case["config"]), shape_of(case["model"], "case")
    runtime = runtimes.start(config)
    from alphamed.megatron.policy import Policy, Reference

    groups = token_groups(shape.vocab, *case["groups"])
    with Allocated() if runtime.world == 1 else InUse() as used:
        policy = Policy(config, shape, runtime)
        reference = Reference(config, shape, runtime) if config.algorithm.kl_coefficient else None
        if reference:
            reference.weights_changed()
        batch = pack(
            groups,
            policy.layout,
            token_budget=config.parallel.micro_batch_tokens,
            share_prompts=config.parallel.share_prompts,
        )
        if reference:
            batch = reference.logprobs(batch)
        policy.update(batch)  # Adam's moments exist from the first update on
        policy.update(batch)
    micros = batch.mini_batches[0].micro_batches
    largest = max(micros, key=lambda micro: len(micro.tokens))
    found = {
        "peak": used.peak,
        "static": used.left,
        "tokens": len(largest.tokens),
        "responses": int(largest.mask.sum()),
        "rows": len(micros),
        "stage": policy.layout.pipeline_rank,
    }
    if runtime.world == 1:
        runtimes.stop(runtime)
    else:
        leave_all_but_the_default()  # the next case joins the same ranks in another layout
    del policy, reference, batch, micros, largest, runtime
    gc.collect()  # what is freed in the next case's profile would count against it
    return found


if __name__ == "__main__":
    cases = json.loads(Path(sys.argv[1]).read_text())
    found = {name: measure(case) for name, case in cases.items()}
    rank = os.environ.get("RANK")
    Path(sys.argv[2] + (f".{rank}" if rank else "")).write_text(json.dumps(found))
