"""What the CUDA image can show without a GPU.

Run inside it:  python /alphamed/tests/containers/check_cuda_image.py [NAME ...]

Each check is a process of its own, as some change torch for the whole process; exit code 1 where one fails. Where the
machine has no NVIDIA driver, a library with the driver's names that answers "no device" takes its place, so that vLLM's
compiled parts can be loaded.

    packages    every requirement of every installed package is met (the lock is complete), one version of cuda-python
    imports     the nine packages of requirements.txt, Transformer Engine's and vLLM's compiled parts included
    cudnn       torch and Transformer Engine load the same cuDNN, and only that one
    compiler    Triton builds a C module, nvcc a kernel for Hopper
    plan        `alphamed plan` accepts every recipe of examples/recipes
    names       Megatron's models of Transformer Engine's layers hold what model/families.py and the planner say
    engines     vLLM accepts alphamed's engine arguments and makes a CUDA configuration of them
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
NINE = (
    "megatron.core",
    "torch",
    "transformer_engine.pytorch",
    "vllm",
    "vllm._C_stable_libtorch",
    "vllm._moe_C_stable_libtorch",
    "ray",
    "datasets",
    "sentencepiece",
    "wandb",
)
OPTIONAL = ("apex", "amp_C", "fused_weight_gradient_mlp_cuda")
HOPPER = dict(major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, name="NVIDIA H100 80GB HBM3")
LAYERS = 8  # of each model: more of them are alike, and take minutes
LAYOUTS = (  # model, ranks that are built (None: all), settings
    ("meta-llama/Llama-3.1-8B-Instruct", None, ("parallel.tensor=4",)),
    ("meta-llama/Llama-3.1-70B-Instruct", (0, 9, 31), ("parallel.tensor=8", "parallel.pipeline=4")),
    (
        "meta-llama/Llama-3.1-70B-Instruct",
        (0, 15),
        ("parallel.tensor=8", "parallel.pipeline=2", "parallel.virtual_pipeline=2"),
    ),
    ("Qwen/Qwen2.5-3B-Instruct", None, ("parallel.tensor=2", "parallel.pipeline=2")),
    ("Qwen/Qwen3-8B", None, ("parallel.tensor=2", "parallel.share_prompts=false")),
    ("Qwen/Qwen3-8B", None, ("parallel.tensor=2", "parallel.share_prompts=false", "model.fp8=true")),
)


def main(names: list[str]) -> int:
    checks = {name.removeprefix("check_"): run for name, run in globals().items() if name.startswith("check_")}
    if len(names) == 2 and names[0] == "--here":
        checks[names[1]]()
        return 0
    if unknown := set(names) - set(checks):
        print(f"error: unknown checks {', '.join(sorted(unknown))}; there are {', '.join(checks)}", file=sys.stderr)
        return 2
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"} | _driver(Path(folder))
        for name in names or checks:
            start_s = time.monotonic()
            done = subprocess.run(
                [sys.executable, __file__, "--here", name], env=environment, cwd=folder, text=True, capture_output=True
            )
            print(f"{'ok  ' if done.returncode == 0 else 'FAIL'} {name} ({time.monotonic() - start_s:.0f} s)")
            print("".join(f"     {line}\n" for line in done.stdout.splitlines()), end="", flush=True)
            if done.returncode:
                print(done.stderr[-4000:], flush=True)
                failed.append(name)
    return 1 if failed else 0


def _driver(folder: Path) -> dict[str, str]:
    """Environment in which libcuda.so.1 can be loaded: nothing where it is there, else a stand-in that knows no device."""
    try:
        ctypes.CDLL("libcuda.so.1")
        return {}
    except OSError:
        pass
    wanted = set()
    site = Path(metadata.distribution("vllm").locate_file("vllm"))
    for library in [*site.rglob("*.so"), *Path(metadata.distribution("torch").locate_file("torch/lib")).glob("*.so")]:
        symbols = _output("nm", "-D", "--undefined-only", library)
        wanted |= {word for word in symbols.split() if word.startswith("cu") and word[2:3].isupper()}
    no_device = 100  # CUDA_ERROR_NO_DEVICE
    source = folder / "driver.c"
    source.write_text("".join(f"int {name}() {{ return {no_device}; }}\n" for name in sorted(wanted)))
    _output("gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", folder / "libcuda.so.1", source)
    return {"LD_LIBRARY_PATH": str(folder)}


def _output(*words: str | Path) -> str:
    return subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout


# --------------------------------------------------------------------------------------------------------------- checks
def check_packages() -> None:
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    versions = {name: metadata.version(name) for name in ("cuda-python", "cuda-bindings")}
    assert len(set(versions.values())) == 1, versions
    print(f"{len(list(metadata.distributions()))} packages")


def check_imports() -> None:
    import importlib

    import torch

    for name in NINE:
        module = importlib.import_module(name)
        print(name, getattr(module, "__version__", ""))
    import transformer_engine_torch  # the extension that the image compiled

    print("transformer_engine_torch", metadata.version("transformer-engine-torch"), transformer_engine_torch.__file__)
    assert torch.version.cuda.startswith("13."), torch.version.cuda
    for name in OPTIONAL:
        try:
            importlib.import_module(name)
            print(name, "is there")
        except ModuleNotFoundError as error:
            assert error.name == name, error
            print(name, "was left out")


def check_cudnn() -> None:
    import torch
    import transformer_engine.pytorch  # noqa: F401

    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libcudnn.so" in line}
    assert len(loaded) == 1, loaded
    library = ctypes.CDLL(loaded.pop())
    assert library.cudnnGetVersion() == torch.backends.cudnn.version()
    print("cuDNN", library.cudnnGetVersion(), library._name)


def check_compiler() -> None:
    import nvidia.cu13
    from triton.runtime.build import compile_module_from_src

    os.environ["TRITON_CACHE_DIR"] = str(Path.cwd() / "triton")
    source = """
        #include <Python.h>
        static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "built", NULL, -1, NULL};
        PyMODINIT_FUNC PyInit_built(void) {
            PyObject *module = PyModule_Create(&definition);
            PyModule_AddIntConstant(module, "answer", 42);
            return module;
        }"""
    assert compile_module_from_src(source, "built").answer == 42
    toolkit = Path(next(iter(nvidia.cu13.__path__)))
    Path("kernel.cu").write_text("#include <cuda_bf16.h>\n__global__ void twice(float *x) { x[threadIdx.x] *= 2; }\n")
    _output(toolkit / "bin" / "nvcc", "-arch=sm_90", "-cubin", "-o", "kernel.cubin", "kernel.cu")
    assert "twice" in _output("nm", "kernel.cubin")


def check_plan() -> None:
    recipes = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        done = subprocess.run(["alphamed", "plan", "--config", recipe], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, f"{recipe.name}: {done.stdout[-1000:]}{done.stderr}"
    print(f"{len(recipes)} recipes")


def check_names() -> None:
    """Every rank on the meta device under a fake process group, with Transformer Engine's layers and its FusedAdam."""
    import transformer_engine.pytorch  # noqa: F401

    import megatron_patches.apply as patches

    patches.apply()  # for Megatron's uses of torch.cuda; they refuse to be applied once CUDA is pretended
    patches.apply = lambda: None
    _pretend_hopper()
    from alphamed.config.loading import build_config, changed_config
    from alphamed.lab.planner import meta_build
    from alphamed.lab.planner.shapes import published
    from alphamed.megatron import provider

    meta_build.LOCAL = ("sync.transport=auto",)  # keep cluster.device=cuda: Transformer Engine's layers, not the local ones
    seen = set()
    wrap, make_optimizer = provider.wrap_gradients, provider.build_optimizer

    def wrapping(config, chunks):
        layer = chunks[0].decoder.layers[0]
        seen.update({type(layer.self_attention.linear_qkv).__name__, type(layer.mlp.linear_fc1).__name__})
        wrapped = wrap(config, chunks)
        assert layer.self_attention.linear_qkv.fuse_wgrad_accumulation and layer.mlp.linear_fc2.fuse_wgrad_accumulation
        return wrapped

    def optimizing(config, wrapped):
        optimizer = make_optimizer(config, wrapped)
        inner = optimizer.chained_optimizers[0].optimizer
        seen.add(f"{type(inner).__module__}.{type(inner).__name__}")
        return optimizer

    provider.wrap_gradients, provider.build_optimizer = wrapping, optimizing
    for model, ranks, settings in LAYOUTS:
        config = build_config(
            {
                "model": {"path": model},
                "data": {"train": ["questions.jsonl"]},
                "cluster": {"device": "cuda"},
                "parallel": {"micro_batch_tokens": 4096},
            }
        )
        config = changed_config(config, (*settings, "parallel.sequence=true"))
        problems = meta_build.check_topology(config, replace(published()[model], layers=LAYERS), ranks)
        assert not problems, "\n".join([model, *settings, *problems[:20]])
        print(model, *settings, "ranks", *(range(config.parallel.world) if ranks is None else ranks))
    print(*sorted(seen))
    assert {"TELayerNormColumnParallelLinear", "transformer_engine.pytorch.optimizers.fused_adam.FusedAdam"} <= seen, seen
    assert not {name for name in seen if name.startswith("ColumnParallel")}, seen


def check_engines() -> None:
    import yaml

    _pretend_hopper()
    import vllm.platforms as platforms
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    class Hopper(NonNvmlCudaPlatform):
        get_device_capability = classmethod(lambda cls, device_id=0: DeviceCapability(9, 0))
        get_device_name = classmethod(lambda cls, device_id=0: HOPPER["name"])
        get_device_total_memory = classmethod(lambda cls, device_id=0: HOPPER["total_memory"])
        is_fully_connected = classmethod(lambda cls, device_ids: True)
        device_count = classmethod(lambda cls: 8)

    platforms._current_platform = platforms.current_platform = Hopper()
    from alphamed.config.loading import load_config
    from alphamed.lab.planner.shapes import TABLE, published
    from alphamed.rollout.engine import _engine_args
    from alphamed.rollout.spec import CUDA_BATCH_TOKENS, engine_specs

    fields = yaml.safe_load(TABLE.read_text())
    for recipe in ("llama31_8b_1node.yaml", "llama31_70b_8nodes.yaml", "qwen3_32b_4nodes.yaml"):
        for deterministic in ("false", "true"):
            config = load_config(ROOT / "examples" / "recipes" / recipe, [f"rollout.deterministic={deterministic}"])
            name = config.model.path
            folder = Path.cwd() / name.replace("/", "-")
            folder.mkdir(exist_ok=True)
            architecture = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[fields[name]["model_type"]]
            (folder / "config.json").write_text(json.dumps(fields[name] | {"architectures": [architecture]}))
            spec = engine_specs(config, folder, published()[name], eos_ids=(1,))[0]
            made = _engine_args(spec).create_engine_config()
            assert made.parallel_config.tensor_parallel_size == config.rollout.tensor_parallel
            assert made.model_config.max_model_len == config.max_model_tokens
            assert made.model_config.logprobs_mode == "processed_logprobs"
            assert made.parallel_config.worker_extension_cls == spec.worker_extension
            assert made.cache_config.enable_prefix_caching is (deterministic == "false")
            assert made.device_config.device_type == "cuda"
            assert made.use_v2_model_runner and not made.model_config.enforce_eager
            assert made.compilation_config.cudagraph_mode.name == "FULL_AND_PIECEWISE"
            assert made.scheduler_config.max_num_batched_tokens == CUDA_BATCH_TOKENS
            print(
                recipe,
                "deterministic" if spec.deterministic else "",
                f"TP {config.rollout.tensor_parallel}",
                f"batch {made.scheduler_config.max_num_batched_tokens} tokens",
            )


def _pretend_hopper() -> None:
    """torch.cuda as on a node of eight H100, for code that only asks what there is."""
    import torch

    properties = type("Properties", (), HOPPER)()
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 8
    torch.cuda.get_device_properties = lambda *device: properties
    torch.cuda.get_device_capability = lambda *device: (HOPPER["major"], HOPPER["minor"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
