"""Dockerfiles, build script and Kubernetes manifest, without building or running anything."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from alphamed.config.loading import load_config

ROOT = Path(__file__).parents[2]
DOCKERFILES = ("docker/Dockerfile", "docker/Dockerfile.cpu")
NOT_INSTALLED = "tests/requirements.txt is not installed; tests/run.sh does it"
HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
JOB = ROOT / "examples" / "kubernetes" / "train.yaml"


# ---------------------------------------------------------------------------------------------------------- Dockerfiles
def stages(name: str) -> dict[str, list[tuple[str, str]]]:
    """Stage -> its instructions as (word, rest), in order; lines that go on are joined, comments dropped."""
    text = "\n".join(line for line in (ROOT / name).read_text().splitlines() if not line.lstrip().startswith("#"))
    found, stage = {"": []}, ""
    for line in text.replace("\\\n", " ").splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            stage = rest.split(" AS ")[1] if " AS " in rest else "final"
            found[stage] = []
        if word:
            found[stage].append((word, rest.strip()))
    return found


@pytest.mark.skipif(HADOLINT is None, reason=NOT_INSTALLED)
@pytest.mark.parametrize("name", DOCKERFILES)
def test_a_linter_finds_nothing(name, tmp_path):
    settings = ROOT / "docker" / "hadolint.yaml"
    done = subprocess.run([HADOLINT, "--config", settings, ROOT / name], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")
    spoilt = tmp_path / "Dockerfile"  # the linter is at work: it sees a fault put in
    spoilt.write_text((ROOT / name).read_text() + "RUN cd /tmp && sudo true\n")
    assert subprocess.run([HADOLINT, "--config", settings, spoilt], capture_output=True, timeout=60).returncode == 1


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_final_image_is_small_unprivileged_and_described(name):
    instructions = stages(name)
    final = instructions["final"]
    words = [word for word, _ in final]
    assert {"HEALTHCHECK", "CMD", "ENTRYPOINT", "LABEL"} <= set(words)
    user = next(rest for word, rest in final if word == "USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user), "Kubernetes' runAsNonRoot needs a number"
    assert words.index("USER") > max(i for i, word in enumerate(words) if word in ("RUN", "COPY"))
    labels = next(rest for word, rest in final if word == "LABEL")
    assert {"title", "description", "licenses", "version", "revision"} <= set(
        re.findall(r"org\.opencontainers\.image\.(\w+)=", labels)
    )
    # what final images are made of: the base stage, packages that run, and copies from the build
    assert ("FROM", "python") in final
    assert all(rest.startswith(("--from=build ", "--from=project ")) for word, rest in final if word == "COPY")
    assert not any(
        tool in rest
        for word, rest in final + instructions["python"]
        if word == "RUN"
        for tool in ("git", "pip ", "python3-venv", "cmake", "ninja")
    )


def test_only_the_cuda_image_holds_a_compiler():
    """Triton and FlashInfer compile when they run; the laptop set never does."""
    installs = {
        name: " ".join(rest for stage in ("python", "final") for word, rest in stages(name)[stage] if word == "RUN")
        for name in DOCKERFILES
    }
    assert "g++" in installs["docker/Dockerfile"] and "python3-dev" in installs["docker/Dockerfile"]
    assert not re.search(r"g\+\+|gcc|clang|-dev\b|build-essential", installs["docker/Dockerfile.cpu"])


@pytest.mark.parametrize("name", DOCKERFILES)
def test_everything_comes_from_debian_and_locks(name):
    text = (ROOT / name).read_text()
    assert [
        rest
        for stage in stages(name).values()
        for word, rest in stage
        if word == "FROM" and not rest.startswith(("scratch AS ", "${BASE} AS ", "python", "build "))
    ] == []
    assert "ARG BASE=debian:bookworm-slim" in text
    assert "cudnn" not in re.sub(r"^#.*$", "", text, flags=re.MULTILINE).lower()
    installs = re.findall(r"pip install (.*)", text)
    assert installs and all("--no-deps" in line for line in installs), "locks are installed without resolving"


def test_version_of_the_labels_is_that_of_the_package():
    version = re.search(r"^version = (.*)$", (ROOT / "setup.cfg").read_text(), re.MULTILINE)[1]
    for name in DOCKERFILES:
        assert f'org.opencontainers.image.version="{version}"' in (ROOT / name).read_text()


def test_apex_is_built_at_the_commit_that_is_asked_for():
    """The expression with which the Dockerfile takes it from requirements.txt, run as it stands there."""
    expression = re.search(r"commit=\$\((sed .*?)\)", (ROOT / "docker" / "Dockerfile").read_text())[1]
    commit = subprocess.run(expression, shell=True, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    assert re.fullmatch("[0-9a-f]{40}", commit)
    assert f"apex @ git+https://github.com/NVIDIA/apex@{commit}\n" in (ROOT / "requirements.txt").read_text()


# --------------------------------------------------------------------------------------------------------- build script
RECORDER = """#!/bin/sh
case $1 in
    info | buildx) exit 0 ;;
    build)
        printf '%s\\n' "$@" >"$RECORD"
        for word in "$@"; do case $word in id=pip,src=*) cp "${word#id=pip,src=}" "$RECORD.pip" ;; esac; done ;;
esac
"""


def build(tmp_path: Path, *arguments: str, builder: str = "docker", **environment: str) -> tuple[int, str, list[str], str]:
    """Run docker/build.sh with a builder that writes its arguments down: exit code, stderr, arguments, pip.conf."""
    programs = tmp_path / "bin"
    programs.mkdir(exist_ok=True)
    (programs / builder).write_text(RECORDER)
    (programs / builder).chmod(0o755)
    record = tmp_path / "record"
    kept = {
        "PATH": f"{programs}:/usr/bin:/bin",
        "RECORD": str(record),
        "BUILDER": builder,
        "HOME": str(tmp_path),
        "PIP_CONFIG_FILE": "/dev/null",
        "TMPDIR": str(tmp_path),
    }
    done = subprocess.run(
        ["bash", ROOT / "docker" / "build.sh", *arguments],
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return (
        done.returncode,
        done.stderr,
        record.read_text().splitlines() if record.exists() else [],
        Path(f"{record}.pip").read_text() if record.exists() else "",
    )


def test_settings_of_the_shell_reach_the_build_on_its_command_line(tmp_path):
    wheels, certificates = tmp_path / "wheels", tmp_path / "ca.pem"
    wheels.mkdir()
    certificates.touch()
    code, errors, arguments, pip = build(
        tmp_path,
        "cpu",
        "--base",
        "localhost/debian:bookworm-slim",
        "--",
        "--no-cache",
        PIP_INDEX_URL="https://index.invalid/simple",
        PIP_EXTRA_INDEX_URL="file:///srv/simple https://other.invalid/simple",
        PIP_FIND_LINKS=str(wheels),
        PIP_CERT=str(certificates),
        https_proxy="http://proxy.invalid:3128",
        NO_PROXY="a,b",
    )
    assert code == 0, errors
    pairs = list(zip(arguments, arguments[1:]))
    for pair in (
        ("--build-arg", "BASE=localhost/debian:bookworm-slim"),
        ("--tag", "localhost/alphamed:cpu"),
        ("--file", str(ROOT / "docker" / "Dockerfile.cpu")),
        ("--build-arg", "https_proxy=http://proxy.invalid:3128"),
        ("--build-arg", "NO_PROXY=a,b"),
        ("--build-context", f"wheels={wheels}"),
        ("--secret", f"id=certificates,src={certificates}"),
    ):
        assert pair in pairs, pair
    assert arguments[-2:] == ["--no-cache", str(ROOT)]
    # pip's settings travel as a secret; what is on this machine's disk is of no use in there
    assert "index-url = https://index.invalid/simple\n" in pip
    assert "extra-index-url = https://other.invalid/simple\n" in pip
    assert "file:" not in pip and str(wheels) not in pip
    assert not any("index.invalid" in word for word in arguments)


def test_without_settings_nothing_is_passed(tmp_path):
    code, errors, arguments, pip = build(tmp_path, "cuda")
    assert code == 0, errors
    assert ("--file", str(ROOT / "docker" / "Dockerfile")) in list(zip(arguments, arguments[1:]))
    assert "proxy" not in " ".join(arguments).lower()
    assert pip == "[global]\n" and not any("certificates" in word or "wheels" in word for word in arguments)


@pytest.mark.parametrize("builder, has", [("docker", False), ("podman", True), ("buildah", True)])
def test_each_builder_keeps_the_health_check(tmp_path, builder, has):
    """podman and buildah write OCI images by default, which have none."""
    _, _, arguments, _ = build(tmp_path, "cpu", builder=builder)
    assert (("--format", "docker") in list(zip(arguments, arguments[1:]))) is has


@pytest.mark.parametrize(
    "arguments, problem",
    [
        ((), "the first argument is ''; give cpu or cuda"),
        (("gpu",), "the first argument is 'gpu'; give cpu or cuda"),
        (("cpu", "--base"), "--base needs a value"),
        (("cpu", "--bse", "x"), "unknown argument '--bse'"),
        (("cpu", "--wheels", "/nonexistent"), "--wheels: no folder /nonexistent"),
    ],
)
def test_bad_arguments(tmp_path, arguments, problem):
    code, errors, started, _ = build(tmp_path, *arguments)
    assert code == 2 and started == []
    assert errors.splitlines()[-1] == f"error: {problem}"


# ----------------------------------------------------------------------------------------------------------- Kubernetes
@pytest.mark.skipif(importlib.util.find_spec("kubernetes_validate") is None, reason=NOT_INSTALLED)
@pytest.mark.parametrize("version", ["1.31", "1.37"])
def test_kubernetes_takes_the_job(version):
    import kubernetes_validate

    job = yaml.safe_load(JOB.read_text())
    kubernetes_validate.validate(job, version, strict=True)
    job["spec"]["template"]["spec"]["containers"][0]["readOnlyRootFilesystem"] = True  # a level too high
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, version, strict=True)


def test_the_job_asks_for_what_its_recipe_needs():
    job = yaml.safe_load(JOB.read_text())["spec"]
    pod = job["template"]["spec"]
    train = pod["containers"][0]
    command = train["args"]
    assert command[:3] == ["alphamed", "train", "--config"]
    recipe = ROOT / Path(command[3]).relative_to("/alphamed")
    config = load_config(recipe, [])
    assert train["resources"]["limits"]["nvidia.com/gpu"] == str(config.cluster.gpus_per_node) and config.cluster.nodes == 1
    # exit code 2 is a mistake of the user's, which another start would make again; a podFailurePolicy needs Never
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2] and pod["restartPolicy"] == "Never"
    assert pod["securityContext"]["runAsNonRoot"] and train["securityContext"]["readOnlyRootFilesystem"]
    writable = {mount["mountPath"] for mount in train["volumeMounts"]}
    assert writable == {"/workspace", "/tmp", "/dev/shm"}
    assert {mount["name"] for mount in train["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
