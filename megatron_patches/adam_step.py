"""Load distributed-optimizer checkpoints into torch's Adam, which counts steps per parameter.

Why: Transformer Engine's and apex's Adam keep one `step` for a parameter group, torch's one for each parameter. The
     distributed optimizer stores one number for all, and goes wrong twice when it loads:
     1. its setter is handed a parameter's state without `step` and fails with KeyError('step');
     2. `load_state_dict` gives every parameter the *same* step tensor, so that one update of N parameters advances it by N
        and Adam's bias correction is lost.
     The patch leaves the parameter's own `step` alone in (1) and gives every parameter a copy after (2).
Where: megatron/core/optimizer/distrib_optimizer.py (DistributedOptimizer._set_main_param_and_optimizer_states,
     load_state_dict).
Versions: megatron-core 0.16.1 with torch.optim.AdamW (no Transformer Engine, no apex).
Remove when: the setter iterates over the keys it was given, and load_state_dict copies the step as its branch for
     HybridDeviceOptimizer already does.
"""

from __future__ import annotations


def apply() -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    setter, loader = DistributedOptimizer._set_main_param_and_optimizer_states, DistributedOptimizer.load_state_dict

    def keep_step(self, model_param, tensors):
        if isinstance(tensors, dict) and "step" not in tensors:
            group, order = self.model_param_group_index_map[model_param]
            state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
            if "step" in state:
                tensors = {**tensors, "step": state["step"]}
        return setter(self, model_param, tensors)

    def load_and_separate(self, state_dict):
        loader(self, state_dict)
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()

    DistributedOptimizer._set_main_param_and_optimizer_states = keep_step
    DistributedOptimizer.load_state_dict = load_and_separate
