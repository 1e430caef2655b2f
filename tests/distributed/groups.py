"""Process groups between the cases of one torchrun."""

import torch.distributed as dist


def leave_all_but_the_default() -> None:
    """End the process groups of a case. Megatron only forgets its own, some twenty a case, and each keeps a gloo thread that
    wakes up a hundred times a second: after fifty cases they are what the cores are busy with."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
