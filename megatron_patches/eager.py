"""Run what Megatron-Core decorates with `torch.compile` eagerly.

Why: `megatron.core.jit.jit_fuser` is `torch.compile`; on a CPU it would start a C++ compiler (minutes, and a dependency)
     for functions of three operations. Megatron's own switch `disable_jit_fuser` works only before the decorated modules
     are imported; the stance of torch.compile works at any time.
Where: megatron/core/jit.py; users such as fusions/fused_bias_dropout.py.
Versions: megatron-core 0.16.1; torch 2.6 or newer (torch.compiler.set_stance).
Remove when: `jit_fuser` is the identity without CUDA.
"""

from __future__ import annotations

import torch


def apply() -> None:
    torch.compiler.set_stance("force_eager")
