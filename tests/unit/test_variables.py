"""Environment variables left over from elsewhere: ignored, honoured or refused, printed and recorded without secrets."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from alphamed.cluster import placement, variables
from alphamed.cluster.environment import run_environment
from alphamed.cluster.variables import Start, Treatment, examine, honoured_only, lines, printable
from alphamed.config.loading import build_config
from alphamed.errors import ConfigError
from alphamed.launch.worker import start_of
from alphamed.rundir import provenance

ROOT = Path(__file__).parents[2]
EVERYWHERE, NOWHERE = set(Start), set()
SEVERAL, TORCHRUN = {Start.NODES, Start.TORCHRUN_HOSTS}, {Start.TORCHRUN, Start.TORCHRUN_HOSTS}


def config(**sections):
    return build_config({"model": {"path": "m"}, "data": {"train": ["d.jsonl"]}} | sections)


@pytest.mark.parametrize(
    "name, starts",
    [
        ("RAY_ADDRESS", {Start.TORCHRUN_HOSTS}),
        ("RAY_AUTH_TOKEN", SEVERAL),
        ("RAY_NAMESPACE", SEVERAL),
        ("RAY_TMPDIR", SEVERAL),
        ("RAY_JOB_CONFIG_JSON_ENV_VAR", SEVERAL),
        ("RAY_BACKEND_LOG_LEVEL", EVERYWHERE),
        ("RAY_memory_usage_threshold", EVERYWHERE),
        ("RANK", TORCHRUN),
        ("WORLD_SIZE", TORCHRUN),
        ("MASTER_ADDR", TORCHRUN),
        ("PET_NNODES", TORCHRUN),
        ("TORCHELASTIC_RUN_ID", TORCHRUN),
        ("CUDA_VISIBLE_DEVICES", EVERYWHERE),
        ("CUDA_DEVICE_MAX_CONNECTIONS", NOWHERE),
        ("NCCL_SOCKET_IFNAME", EVERYWHERE),
        ("GLOO_SOCKET_IFNAME", set(Start) - {Start.ONE_HOST}),
        ("TORCH_NCCL_BLOCKING_WAIT", EVERYWHERE),
        ("PYTORCH_CUDA_ALLOC_CONF", EVERYWHERE),
        ("OMP_NUM_THREADS", NOWHERE),
        ("HF_HOME", EVERYWHERE),
        ("TRANSFORMERS_CACHE", EVERYWHERE),
        ("WANDB_MODE", NOWHERE),
        ("WANDB_API_KEY", EVERYWHERE),
        ("WANDB_RUN_ID", NOWHERE),
        ("VLLM_HOST_IP", NOWHERE),
        ("VLLM_ATTENTION_BACKEND", EVERYWHERE),
        ("LD_PRELOAD", EVERYWHERE),
        ("https_proxy", EVERYWHERE),
        ("HOME", EVERYWHERE),
        ("XRAY_ADDRESS", EVERYWHERE),
        ("RANKING", EVERYWHERE),
    ],
)
def test_which_start_passes_a_variable_on(name, starts):
    assert {start for start in Start if name in honoured_only({name: "x"}, start)} == starts


def test_a_start_says_what_it_found_in_one_line_each():
    variables = examine(
        {
            "RAY_ADDRESS": "10.0.0.7:6379",
            "CUDA_VISIBLE_DEVICES": "0,1",
            "NCCL_DEBUG": "INFO",
            "HOME": "/h",
            "WORLD_SIZE": "8",
        },
        Start.ONE_HOST,
    )
    said = lines(variables)
    assert said[0] == "environment: honoured are CUDA_VISIBLE_DEVICES=0,1 NCCL_DEBUG=INFO"
    assert said[1].startswith("environment: RAY_ADDRESS=10.0.0.7:6379 is ignored: a run on one host starts a Ray of its own")
    assert said[2].startswith("environment: WORLD_SIZE=8 is ignored: ") and len(said) == 3
    assert lines(examine({"HOME": "/h", "CUDA_VERSION": "13", "NCCL_VERSION": "2.30"}, Start.ONE_HOST)) == []


def test_what_torchrun_gives_its_ranks_is_not_spoken_of():
    own = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "1"}
    assert examine(own, Start.TORCHRUN) == []
    assert [variable.name for variable in examine(own | {"OMP_NUM_THREADS": "4"}, Start.TORCHRUN)] == ["OMP_NUM_THREADS"]


def test_torch_does_not_warn_of_addresses_without_names_unless_it_is_asked_to():
    for start in Start:
        assert run_environment(config(), Path("t"), start, {})["TORCH_CPP_LOG_LEVEL"] == "ERROR"
        assert run_environment(config(), Path("t"), start, {"TORCH_CPP_LOG_LEVEL": "INFO"})["TORCH_CPP_LOG_LEVEL"] == "INFO"


def test_idle_threads_sleep_unless_they_are_told_otherwise():
    for start in Start:
        assert run_environment(config(), Path("t"), start, {})["OMP_WAIT_POLICY"] == "passive"
        assert run_environment(config(), Path("t"), start, {"OMP_WAIT_POLICY": "active"})["OMP_WAIT_POLICY"] == "active"


def test_the_token_of_a_job_is_not_spoken_of():
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "hunter2"}
    assert examine(own, Start.NODES) == [] and honoured_only(own, Start.NODES) == own
    assert [variable.treatment for variable in examine(own, Start.ONE_HOST)] == [Treatment.IGNORED] * 2
    assert [variable.name for variable in examine(own | {"RAY_AUTH_MODE": "disabled"}, Start.NODES)] == ["RAY_AUTH_MODE"]


@pytest.mark.parametrize(
    "name, value, shown",
    [
        ("WANDB_API_KEY", "hunter2", "(a secret)"),
        ("HF_TOKEN", "hunter2", "(a secret)"),
        ("RAY_AUTH_TOKEN", "hunter2", "(a secret)"),
        ("HTTPS_PROXY", "http://user:hunter2@proxy:80", "http://(a secret)@proxy:80"),
        ("TOKENIZERS_PARALLELISM", "true", "true"),
        ("LD_PRELOAD", "a\nb", "a b"),
        ("NCCL_ALGO", "R" * 999, "R" * 200 + "..."),
    ],
)
def test_secrets_are_never_printed(name, value, shown):
    assert printable(name, value) == shown


def test_provenance_holds_no_secrets_places_or_addresses(tmp_path):
    environment = {
        "HF_TOKEN": "hunter2",
        "PYTHONPATH": "/home/me",
        "RAY_ADDRESS": "10.0.0.7:6379",
        "NCCL_ALGO": "Ring",
        "OMP_NUM_THREADS": "7",
        "HOME": "/home/me",
    }
    variables.write(tmp_path, examine(environment, Start.ONE_HOST))
    entry = provenance.record_start(tmp_path, ["alphamed"], [], None, {})["starts"][0]
    assert entry["environment"] == [
        {"name": "HF_TOKEN", "treatment": "honoured"},
        {"name": "NCCL_ALGO", "treatment": "honoured", "value": "Ring"},
        {"name": "OMP_NUM_THREADS", "treatment": "ignored", "value": "7"},
        {"name": "PYTHONPATH", "treatment": "honoured"},
        {"name": "RAY_ADDRESS", "treatment": "ignored"},
    ]
    text = (tmp_path / "provenance.json").read_text()
    assert "hunter2" not in text and "/home/me" not in text and "10.0.0.7" not in text


def test_a_variable_that_takes_the_checks_away_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONOPTIMIZE", "1")
    with pytest.raises(ConfigError, match="environment: PYTHONOPTIMIZE=1 is refused: .*; unset it"):
        variables.settle(tmp_path, Start.ONE_HOST)
    assert [variable.treatment for variable in examine({"PYTHONOPTIMIZE": "1"}, Start.ONE_HOST)] == [Treatment.REFUSED]


def test_a_bare_torchrun_spans_hosts_by_its_ranks_or_by_the_configuration():
    two = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    assert start_of(config(), two) == Start.TORCHRUN
    assert start_of(config(), two | {"LOCAL_WORLD_SIZE": "1"}) == Start.TORCHRUN_HOSTS
    assert start_of(config(cluster={"nodes": 2}), two) == Start.TORCHRUN_HOSTS  # engines on the second
    assert "RAY_ADDRESS" not in run_environment(config(), Path("t"), start_of(config(), two), {"RAY_ADDRESS": "a:1"})


# ------------------------------------------------------------------------------------------------------ the Ray to join
@pytest.fixture
def free_port():
    with socket.socket() as held:  # bound, but nobody listens
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def test_a_ray_that_is_gone_is_named_before_ray_tries_it(monkeypatch, free_port):
    monkeypatch.setattr(placement, "ADDRESS_DEADLINE_S", 0.2)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port}")
    with pytest.raises(
        ConfigError, match=f"RAY_ADDRESS: '127.0.0.1:{free_port}' does not answer .*refused.*; start Ray there"
    ):
        placement.start_ray(config())


@pytest.mark.parametrize("address", ["head", "head:", ":6379", "head:port"])
def test_an_address_that_is_none_is_refused(monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=f"RAY_ADDRESS: '{address}' is no HOST:PORT"):
        placement.check_ray_address()


@pytest.mark.parametrize("form", ["{}:{}", "ray://{}:{}"])
def test_a_ray_that_answers_is_joined(monkeypatch, form):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("RAY_ADDRESS", form.format(*server.getsockname()))
        placement.check_ray_address()


def test_no_address_is_no_trouble(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    placement.check_ray_address()


# --------------------------------------------------------------------------------------------------------------- doctor
def test_doctor_shows_them_and_fails_where_one_is_refused():
    leftovers = {"RAY_ADDRESS": "10.0.0.7:6379", "HF_TOKEN": "hunter2", "PYTHONOPTIMIZE": "", "NCCL_DEBUG": "INFO"}
    environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_TOKEN"}
    done = subprocess.run(
        [sys.executable, "-m", "alphamed.cli", "doctor", "--json"],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment | leftovers | {"PYTHONPATH": str(ROOT / "src")},
    )
    by_part = {finding["part"]: finding for finding in json.loads(done.stdout)}
    assert by_part["$RAY_ADDRESS"]["detail"].startswith("10.0.0.7:6379  ignored: a run on one host starts a Ray of its own")
    assert by_part["$NCCL_DEBUG"]["detail"].startswith("INFO  honoured") and "hunter2" not in done.stdout
    assert "$PYTHONOPTIMIZE" not in by_part and done.returncode == 0  # empty is unset, to Python
