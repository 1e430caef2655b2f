"""Add a linear layer's weight gradient straight into Megatron's gradient buffer, on the CPU.

Why: with `gradient_accumulation_fusion` Megatron's linear layers call apex's CUDA extension `fused_weight_gradient_mlp_cuda`
     and refuse to start without it. A matrix product that adds to its output does the same on a CPU. Without it each layer
     makes a gradient of its own, which is then read and added to the buffer: 4% of a training step of the 135M model.
Where: megatron/core/tensor_parallel/layers.py (LinearWithGradAccumulationAndAsyncCommunication.backward,
     _grad_accum_fusion_available).
Versions: megatron-core 0.16.1.
Remove when: Megatron-Core adds weight gradients without the extension.
"""

from __future__ import annotations

from torch import Tensor


class WeightGradient:
    """The function of the extension that FP32 gradient buffers need."""

    @staticmethod
    def wgrad_gemm_accum_fp32(total_input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
        """main_grad [out, in] FP32 += grad_output [T, out] transposed @ total_input [T, in]."""
        if grad_output.dtype == main_grad.dtype:
            main_grad.addmm_(grad_output.t(), total_input)
        else:
            main_grad.add_(grad_output.t() @ total_input)


def apply() -> None:
    import megatron.core.tensor_parallel.layers as layers

    layers.fused_weight_gradient_mlp_cuda = WeightGradient
    layers._grad_accum_fusion_available = True
