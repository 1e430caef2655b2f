"""`python cuda_engine_config.py FOLDER`: what vLLM makes of alphamed's engine arguments on an H100, as JSON, without one.

vLLM's CPU build serves: it inspects the model as the CPU platform first (its CUDA kernels are not there to be imported),
then takes the platform for a Hopper and Triton for installed.
"""

import json
import sys
import types

import torch
from vllm.config import get_current_vllm_config
from vllm.platforms import current_platform as cpu

from alphamed.rollout.engine import _engine_args
from alphamed.rollout.spec import EngineSpec
from alphamed.weights.receiver import loading_context


def engine_config(folder: str, cuda: bool, deterministic: bool = False, tensor_parallel: int = 1):
    return _engine_args(
        EngineSpec(
            index=0,
            folder=folder,
            dtype="bfloat16",
            tensor_parallel=tensor_parallel,
            cuda=cuda,
            cores=() if cuda else ((0,),),
            threads=0 if cuda else 1,
            max_model_tokens=256,
            max_prompt_tokens=128,
            max_sequences=256,
            kv_cache_bytes=None if cuda else 1 << 26,
            gpu_memory_utilization=0.85,
            deterministic=deterministic,
            seed=1,
            eos_ids=(2,),
        )
    ).create_engine_config()


def pretend_hopper() -> None:
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 8
    sys.modules.setdefault("vllm._C_stable_libtorch", types.ModuleType("vllm._C_stable_libtorch"))
    import vllm.platforms
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    class Hopper(NonNvmlCudaPlatform):
        get_device_capability = classmethod(lambda cls, device_id=0: DeviceCapability(9, 0))
        get_device_name = classmethod(lambda cls, device_id=0: "NVIDIA H100 80GB HBM3")
        get_device_total_memory = classmethod(lambda cls, device_id=0: 80 << 30)
        is_fully_connected = classmethod(lambda cls, device_ids: True)
        device_count = classmethod(lambda cls: 8)

    vllm.platforms._current_platform = hopper = Hopper()
    vllm.config.vllm.HAS_TRITON = True
    for module in list(sys.modules.values()):
        if vars(module).get("current_platform") is cpu:
            module.current_platform = hopper


def summary(made) -> dict:
    return {
        "device": made.device_config.device_type,
        "runner": "V2" if made.use_v2_model_runner else "V1",
        "eager": made.model_config.enforce_eager,
        "cuda_graphs": made.compilation_config.cudagraph_mode.name,
        "batch_tokens": made.scheduler_config.max_num_batched_tokens,
        "chunked_prefill": made.scheduler_config.enable_chunked_prefill,
        "prefix_cache": made.cache_config.enable_prefix_caching,
    }


def main(folder: str) -> None:
    on_cpu = engine_config(folder, cuda=False)
    summaries: dict = {"cpu": summary(on_cpu)}
    with loading_context(types.SimpleNamespace(vllm_config=on_cpu)):
        summaries["loads_in_own_config"] = get_current_vllm_config() is on_cpu
    pretend_hopper()
    summaries["cuda"] = summary(engine_config(folder, cuda=True))
    summaries["cuda_deterministic_tp8"] = summary(engine_config(folder, cuda=True, deterministic=True, tensor_parallel=8))
    print(json.dumps(summaries))


if __name__ == "__main__":
    main(sys.argv[1])
