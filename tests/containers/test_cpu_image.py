"""The CPU image, built and run for real: unprivileged, on a read-only root, with one folder to write into."""

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import runs

pytestmark = [pytest.mark.slow, pytest.mark.matrix]

COMMAND_LIMIT_S = 900
MAX_IMAGE_BYTES = 4.5e9  # 3.4 GB were measured


@pytest.fixture(scope="module")
def image():
    name = runs.build("cpu")
    if name is None:
        pytest.skip("no image can be built here: docker, or buildah and (a registry, or root and debootstrap)")
    yield name
    subprocess.run([("docker", "podman")[bool(shutil.which("podman"))], "rmi", "--force", name], capture_output=True)


@pytest.fixture
def in_image(image):
    """Run a command in the image, in a work folder of its own."""
    if runs.starter(image) is None:
        pytest.skip("no container can be started here")
    work = Path(tempfile.mkdtemp(prefix="alphamed-work-", dir="/tmp"))
    if os.getuid() == 0:
        os.chown(work, 1000, 1000)
    else:
        work.chmod(0o777)

    def run(*words: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
        return subprocess.run(
            runs.command(image, work, words, options), capture_output=True, text=True, timeout=COMMAND_LIMIT_S
        )

    run.work = work
    yield run
    shutil.rmtree(work, ignore_errors=True)


def test_all_parts_are_there(in_image):
    done = in_image("alphamed", "doctor", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    state = {finding["part"]: finding["state"] for finding in json.loads(done.stdout)}
    assert {
        part: state[part] for part in ("torch", "megatron-core", "vLLM", "ray", "transformers", "wandb")
    } == dict.fromkeys(("torch", "megatron-core", "vLLM", "ray", "transformers", "wandb"), "active")


def test_without_a_command_it_helps(in_image):
    assert in_image().stdout.startswith("usage: alphamed")


def test_nothing_but_the_work_folder_can_be_written(in_image):
    probe = (
        "id -u; for file in /x /alphamed/x /opt/alphamed/x; do touch $file 2>/dev/null && echo $file; done; "
        "touch /workspace/x && echo work"
    )
    assert in_image("sh", "-c", probe).stdout.split() == ["1000", "work"]
    # and any other user, of whom /etc/passwd knows nothing
    in_image.work.chmod(0o777)
    done = in_image("python", "-c", "import getpass; print(getpass.getuser())", options=("--user", "4321:4321"))
    assert done.stdout.split() == ["alphamed"], done.stderr


def test_what_the_build_used_is_not_in_it(in_image, image):
    """Neither compilers nor the settings of the machine that built it."""
    done = in_image("sh", "-c", "command -v gcc g++ cc clang git; ls /etc/pip.conf /wheels /opt/tools 2>/dev/null; true")
    assert done.stdout == ""
    tool = "podman" if shutil.which("podman") else "docker"
    found = json.loads(subprocess.run([tool, "inspect", image], capture_output=True, text=True, check=True).stdout)[0]
    variables = {word.split("=")[0] for word in found["Config"]["Env"]}
    assert not any(name.startswith("PIP_") or "proxy" in name.lower() or "CERT" in name for name in variables), variables
    assert found["Config"]["User"] == "1000:1000"
    assert found["Config"]["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert found["Size"] < MAX_IMAGE_BYTES


def test_the_tests_that_look_at_the_installation(in_image):
    files = ("test_structure", "test_cli", "test_locks", "test_provenance", "test_config", "test_loss")
    done = in_image(
        "python",
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow",
        *(f"tests/unit/{name}.py" for name in files),
        options=("--workdir", "/alphamed"),
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_a_short_quickstart(in_image):
    """Two steps of the real thing: the model from its wheel, engines, trainer, evaluation, export, report."""
    done = in_image(
        "bash",
        "/alphamed/examples/quickstart.sh",
        "run.steps=2",
        "optimizer.warmup_steps=0",
        "evaluation.questions=8",
        "rollout.questions_per_step=4",
        "rollout.samples_per_question=2",
        "rollout.kv_cache_bytes=268435456",
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    run = in_image.work / "runs" / "quickstart"
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2] or steps == [0, 1]
    assert (run / "report.html").is_file() and (run / "hf" / "model.safetensors").is_file()
    assert json.loads((run / "provenance.json").read_text())["starts"][0]["git"]["commit"]
