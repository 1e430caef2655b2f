"""Checks what each patch of megatron_patches repairs, with and without it. Started by test_patches.py.

Prints one JSON object: {patch: {"with": error or null, "without": error or null}}. Patches change torch for the whole
process, so every check runs in a fork of its own; Megatron is imported once, before the forks and without any patch.
"""

from __future__ import annotations

import json
import os
import traceback
import warnings

warnings.simplefilter("ignore")

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.fusions.fused_bias_dropout import bias_dropout_add_fused_train
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32, get_grad_norm_fp32
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.transformer import TransformerConfig

from megatron_patches.apply import PATCHES


def config(**changes) -> TransformerConfig:
    return TransformerConfig(**{"num_layers": 1, "hidden_size": 4, "num_attention_heads": 1, **changes})


def join() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()


def cuda_runtime() -> None:
    """A rotary table is made on torch.cuda.current_device()."""
    join()
    table = RotaryEmbedding(kv_channels=4, rotary_percent=1.0)(3)
    # positions 0, 1, 2 times the frequencies 1 and 10000^(-2/4) = 0.01, repeated for both halves
    torch.testing.assert_close(table[:, 0, 0], torch.tensor([[0, 0, 0, 0], [1, 0.01, 1, 0.01], [2, 0.02, 2, 0.02]]))


def cuda_tensors() -> None:
    """The gradient norm is summed in tensors on "cuda", and clipping insists on gradients of CUDA type."""
    with torch.device("meta"):
        made = torch.empty(2)
    assert made.is_meta, "torch.device contexts must go on working"
    join()
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    norm = get_grad_norm_fp32([parameter.grad], grad_stats_parallel_group=dist.group.WORLD)
    assert abs(float(norm) - 5.0) < 1e-6, norm
    clip_grad_by_total_norm_fp32([parameter], max_norm=1.0, total_norm=float(norm))
    torch.testing.assert_close(parameter.grad, torch.tensor([0.6, 0.8]))


def eager() -> None:
    """A function that Megatron decorates with torch.compile runs without compiling."""
    from torch._dynamo.callback import callback_handler

    def compiled(*args) -> None:
        raise RuntimeError("torch.compile was started")

    callback_handler.register_start_callback(compiled)
    x, bias, residual = torch.ones(2), torch.ones(2), torch.full((2,), 5.0)
    torch.testing.assert_close(bias_dropout_add_fused_train((x, bias), residual, 0.0), torch.full((2,), 7.0))


def rng_tracker() -> None:
    """A fork draws from its own stream and leaves the outer one untouched."""
    torch.manual_seed(7)
    alone = torch.rand(2)
    expected = torch.Generator().manual_seed(11)
    tracker = CudaRNGStatesTracker()
    torch.manual_seed(7)
    tracker.add("own", 11)
    with tracker.fork("own"):
        first = torch.rand(2)
    between = torch.rand(2)
    with tracker.fork("own"):
        second = torch.rand(2)
    assert torch.equal(between, alone)
    assert torch.equal(torch.cat([first, second]), torch.cat([torch.rand(2, generator=expected) for _ in range(2)]))


def weight_gradient() -> None:
    """A linear layer adds its weight gradient to what the buffer holds, with gradients of the buffer's type and of another."""
    join()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    for dtype in (torch.float32, torch.bfloat16):
        fused = config(gradient_accumulation_fusion=True, params_dtype=dtype)
        layer = tensor_parallel.ColumnParallelLinear(2, 1, config=fused, init_method=torch.nn.init.ones_, bias=False)
        layer.weight.main_grad, layer.weight.grad_added_to_main_grad = torch.full((1, 2), 10.0), False
        out, _ = layer(torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]], dtype=dtype))
        out.sum().backward()
        torch.testing.assert_close(layer.weight.main_grad, torch.tensor([[14.0, 16.0]]))
        assert layer.weight.grad_added_to_main_grad


def adam_step() -> None:
    """A distributed optimizer that has taken two steps is loaded from its own state, and steps on as step 3."""
    join()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    module = torch.nn.Linear(3, 2)
    wrapped = DistributedDataParallel(config(), DistributedDataParallelConfig(use_distributed_optimizer=True), module)
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=0.1, use_distributed_optimizer=True), [wrapped])

    def step() -> None:
        wrapped.zero_grad_buffer()
        wrapped(torch.ones(1, 3)).sum().backward()
        wrapped.finish_grad_sync()
        optimizer.step()

    step()
    step()
    part = optimizer.chained_optimizers[0]
    with torch.no_grad():
        part.load_parameter_state_from_dp_zero(part.get_parameter_state_dp_zero())  # fails with KeyError('step')
    part.load_state_dict(part.state_dict())  # makes all steps one tensor
    step()
    steps = [float(state["step"]) for state in part.optimizer.state.values()]
    assert steps == [3.0, 3.0], steps


def outcome(check, patches) -> str | None:
    """The last line of the error that `check` raises in a fork with these patches, or None."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        error = ""
        try:
            for patch in patches:
                patch.apply()
            check()
        except BaseException as e:
            error = "".join(traceback.format_exception_only(e)).strip().splitlines()[-1][:300]
        os.write(write, error.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as lines:
        error = lines.read()
    os.waitpid(child, 0)
    return error or None


def main() -> None:
    torch.set_num_threads(1)
    found = {}
    for patch in PATCHES:
        name = patch.__name__.rpartition(".")[2]
        found[name] = {
            "with": outcome(globals()[name], PATCHES),
            "without": outcome(globals()[name], [p for p in PATCHES if p is not patch]),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
