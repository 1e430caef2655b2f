"""Attention of packed rows with shared prompts by the flash kernel on CUDA, against the same in FP32 by its definition."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from test_megatron_math import SEGMENTS, plain_attention, random_segments

from alphamed.megatron.prefix_attention import CUDA, PLAIN, kernel_for, prefix_attention
from alphamed.records import Segment

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def inputs(segments, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    tokens, draw = sum(s.tokens for s in segments), torch.Generator().manual_seed(seed)
    return [
        torch.randn(tokens, n, dim, generator=draw).to("cuda", dtype).requires_grad_() for n in (heads, kv_heads, kv_heads)
    ]


def compare(segments, heads, kv_heads, dim, kernel, dtype, tolerance, seed=0) -> None:
    tensors = inputs(segments, heads, kv_heads, dim, dtype, seed)
    exact = [x.detach().cpu().float().requires_grad_() for x in tensors]
    expected = plain_attention(*exact, segments, dim**-0.5)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9))
    found = prefix_attention(*tensors, segments, dim**-0.5, kernel)
    shares = torch.autograd.grad((found.float() * weights.cuda()).sum(), tensors)
    for a, b in [(found, expected), *zip(shares, torch.autograd.grad((expected * weights).sum(), exact))]:
        assert (a.cpu().float() - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS)
@pytest.mark.parametrize("heads, kv_heads, dim", [(8, 2, 64), (4, 4, 128)])
def test_flash_kernel(segments, heads, kv_heads, dim):
    compare(segments, heads, kv_heads, dim, CUDA, torch.bfloat16, 2e-2)


@pytest.mark.parametrize("seed", range(20))
def test_flash_kernel_on_random_rows(seed):
    compare(random_segments(seed), 8, 2, 64, CUDA, torch.bfloat16, 2e-2, seed)


def test_flash_kernel_on_a_long_row():
    segments = (Segment(300), *[Segment(250, (700, 300, 1200, 64), attends_shared_prefix=True)] * 3)
    compare(segments, 4, 1, 128, CUDA, torch.bfloat16, 2e-2)


@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS)
def test_fp32_is_exact(segments):
    tensors = inputs(segments, 4, 2, 64, torch.float32)
    assert kernel_for(tensors[0]) is PLAIN
    compare(segments, 4, 2, 64, PLAIN, torch.float32, 1e-5)
