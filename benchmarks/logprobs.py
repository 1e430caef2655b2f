"""Time and memory of log-probs, forward and backward: all logits at once, in chunks, and by torch's log_softmax.

    .venv/bin/python benchmarks/logprobs.py [--tokens 16384] [--vocab 128256] [--hidden 4096] [--chunks 2048] [--dtype bf16]

On a GPU the sizes are those of a full row of Llama-3.1-8B on one tensor rank; on a CPU, unless told otherwise, a quarter of
the tokens, of the vocabulary and of the width, in FP32. The methods run in turn, `--repeats` times after one that does not
count; seconds are medians. Memory is the peak beside inputs, weights and their gradient: on a CPU from one more pass under
the profiler of torch's allocator.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from alphamed.megatron.logprobs import VocabShard, label_logprobs

TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CPU_SHARE = 4


@dataclass
class Method:
    """`run(hidden)` gives the log-probs."""

    name: str
    run: Callable[[Tensor], Tensor]
    seconds: list[float] = field(default_factory=list)


def main() -> None:
    on_gpu = torch.cuda.is_available()
    share, dtype = (1, "bf16") if on_gpu else (CPU_SHARE, "fp32")
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=16384 // share)
    parser.add_argument("--vocab", type=int, default=128256 // share)
    parser.add_argument("--hidden", type=int, default=4096 // share)
    parser.add_argument("--chunks", type=int, nargs="+", default=[2048 // share])
    parser.add_argument("--dtype", choices=TYPES, default=dtype)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    device, kind = torch.device("cuda" if on_gpu else "cpu"), TYPES[options.dtype]
    torch.manual_seed(0)
    hidden = torch.randn(options.tokens, options.hidden, device=device).to(kind).requires_grad_()
    weight = (torch.randn(options.vocab, options.hidden, device=device) * 0.02).to(kind).requires_grad_()
    weight.main_grad = torch.zeros(weight.shape, device=device)  # where Megatron wants the gradient
    labels = torch.randint(0, options.vocab, (options.tokens,), device=device)
    shard = VocabShard(None, 0, options.vocab)
    methods = [
        Method("log_softmax", lambda x: _plain(x, weight, labels)),
        *(
            Method(
                f"chunks of {chunk}" if chunk else "at once",
                lambda x, chunk=chunk: label_logprobs(x, weight, labels, shard, 1.0, chunk)[0],
            )
            for chunk in (0, *options.chunks)
        ),
    ]
    for _ in range(1 + options.repeats):
        for method in methods:
            method.seconds.append(_timed(method, hidden, weight))
    print(
        f"{options.tokens} tokens, vocabulary {options.vocab}, hidden {options.hidden}, {options.dtype} on {device}: logits "
        f"of {options.tokens * options.vocab * 4 / 2**20:,.0f} MiB; medians of {options.repeats}"
    )
    print(f"{'method':<16}{'seconds':>9}{'of at once':>12}{'peak MiB':>10}{'of at once':>12}")
    seconds = [statistics.median(method.seconds[1:]) for method in methods]
    peaks = [_peak_bytes(method, hidden, weight) for method in methods]
    for method, own, peak in zip(methods, seconds, peaks):
        print(
            f"{method.name:<16}{own:>9.3f}{own / seconds[1]:>12.2f}{peak / 2**20:>10,.0f}{peak / peaks[1]:>12.2f}",
            flush=True,
        )


def _plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return torch.log_softmax((hidden @ weight.t()).float(), -1).gather(1, labels[:, None])[:, 0]


def _pass(method: Method, hidden: Tensor, weight: Tensor) -> None:
    hidden.grad = weight.grad = None
    weight.grad_added_to_main_grad = False
    method.run(hidden).sum().backward()


def _timed(method: Method, hidden: Tensor, weight: Tensor) -> float:
    _synchronize()
    began = time.perf_counter()
    _pass(method, hidden, weight)
    _synchronize()
    return time.perf_counter() - began


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak_bytes(method: Method, hidden: Tensor, weight: Tensor) -> int:
    hidden.grad = weight.grad = None
    if hidden.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _pass(method, hidden, weight)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        _pass(method, hidden, weight)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    used = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        used += event.nbytes()
        peak = max(peak, used)
    return peak


if __name__ == "__main__":
    main()
