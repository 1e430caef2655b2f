"""Attention of packed rows with shared prompts: time of forward and backward, beside every answer with a prompt of its own.

    python benchmarks/attention.py [--prompt 300 --answers 8 --tokens 800 --questions 4 --heads 32 --kv-heads 8 --dim 128]

Prints medians in milliseconds and their ratio, on CUDA in bf16 where there is a device, else on the CPU in FP32. "own prompts"
is the same kernel on rows in which each answer follows a copy of its prompt: more tokens, and no rounds to merge.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from alphamed.megatron.prefix_attention import prefix_attention
from alphamed.records import Segment


def measure(segments: tuple[Segment, ...], heads: int, kv_heads: int, dim: int, device: str, repeats: int) -> float:
    """Median milliseconds of a forward and a backward pass."""
    tokens, dtype = sum(s.tokens for s in segments), torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = (
        torch.randn(tokens, n, dim, device=device, dtype=dtype, requires_grad=True) for n in (heads, kv_heads, kv_heads)
    )
    grad, times = torch.randn_like(q), []
    for _ in range(repeats + 1):  # the first one warms up
        began = _now(device)
        prefix_attention(q, k, v, segments, dim**-0.5).backward(grad)
        times.append(_now(device) - began)
    return 1000 * statistics.median(times[1:])


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {
        "prompt": 300,
        "answers": 8,
        "tokens": 800,
        "questions": 4,
        "heads": 32,
        "kv-heads": 8,
        "dim": 128,
        "repeats": 10,
    }
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    o = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shared = (Segment(o.prompt, (o.tokens,) * o.answers),) * o.questions
    own = (Segment(o.prompt + o.tokens),) * (o.answers * o.questions)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}: {o.questions} prompts of {o.prompt}, {o.answers} answers of {o.tokens} tokens each")
    print(f"{'':16}{'tokens':>10}{'ms':>12}")
    times = {}
    for label, segments in (("shared prompts", shared), ("own prompts", own)):
        times[label] = measure(segments, o.heads, o.kv_heads, o.dim, device, o.repeats)
        print(f"{label:16}{sum(s.tokens for s in segments):>10}{times[label]:>12.2f}")
    print(f"own / shared: {times['own prompts'] / times['shared prompts']:.2f}")


if __name__ == "__main__":
    main()
