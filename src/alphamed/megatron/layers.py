"""Transformer layers: Transformer Engine's where it is active, else Megatron's local ones with leaner pieces on the CPU.

On a CPU whatever is not a matrix product is bound by memory, and torch's composite operations read and write the
activations many times. RMSNorm and SwiGLU are written here with few passes, forward and backward: at the 135M shape they
take half the time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import Tensor

from alphamed.megatron.attention import SegmentAttention


def layers_spec(
    config: TransformerConfig, transformer_engine: bool, fused_attention: bool, virtual_stage: int | None
) -> ModuleSpec | TransformerBlockSubmodules:
    """What Megatron builds its decoder from. `fused_attention`: Transformer Engine's, which cannot share prompts."""
    if transformer_engine:
        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
        if not fused_attention:
            _submodules(_submodules(layer).self_attention).core_attention = SegmentAttention
        return layer
    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    parts = _submodules(layer)
    attention = _submodules(parts.self_attention)
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    attention.core_attention = SegmentAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    parts.mlp.submodules.activation_func = SwiGlu  # taken because of config.use_te_activation_func
    count = get_num_layers_to_build(config, vp_stage=virtual_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=ModuleSpec(RMSNorm))


def _submodules(spec: ModuleSpec) -> Any:
    """A dataclass of Megatron's, another one for each kind of spec."""
    return spec.submodules


class RMSNorm(torch.nn.Module):
    """The normalisation of all three families, for Megatron's layers."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        _set_sequence_parallel(self.weight, config.sequence_parallel)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def _set_sequence_parallel(parameter: Any, value: bool) -> None:
    """Where it is set Megatron sums the parameter's gradient over the tensor ranks."""
    parameter.sequence_parallel = value


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in FP32, in the dtype of x."""
    if x.device.type != "cpu":
        return F.rms_norm(x, weight.shape, weight, eps)
    return _RmsNorm.apply(x, weight, eps)


class SwiGlu:
    """silu(gate) * up of [.., 2F], gate first -> [.., F]. Not a module: it holds nothing that a checkpoint would store."""

    def __init__(self, config: TransformerConfig) -> None:
        pass

    def __call__(self, gate_up: Tensor) -> Tensor:
        return _SwiGluFunction.apply(gate_up)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x.float()
        inverse = torch.linalg.vecdot(wide, wide).div_(x.shape[-1]).add_(eps).rsqrt_()[..., None]
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).mul_(weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx, *grads):
        x, weight, inverse = ctx.saved_tensors
        wide, scale, grad = x.float(), weight.float(), grads[0].float()
        product = grad * wide
        d_weight = product.flatten(0, -2).t().mv(inverse.flatten())
        along = torch.matmul(product, scale)[..., None] * inverse.square() / x.shape[-1]
        d_x = (grad * scale).addcmul_(wide, along, value=-1).mul_(inverse)
        return d_x.to(x.dtype), d_weight.to(weight.dtype), None


class _SwiGluFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, *grads):
        (grad,), (gate_up,) = grads, ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        d_gate_up = torch.empty_like(gate_up)
        d_gate, d_up = d_gate_up.chunk(2, -1)
        torch.mul(grad, F.silu(gate), out=d_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=d_gate)
        return d_gate_up
