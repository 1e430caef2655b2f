"""Ray for a run: started on rank 0's node, or an existing cluster joined, and taken down again.

Only rank 0 talks to Ray. A local Ray belongs to the run: its session lies in the run's temporary folder, whoever speaks to
it needs the run's token (it may listen on this host's own address, not only on the loopback one), it carries the run's tag
and knows nothing of torchrun. Where a launcher has spread Ray over several nodes it has set RAY_ADDRESS, and the run joins
that; a RAY_ADDRESS that was left over never comes here (cluster.variables).
"""
from __future__ import annotations

import contextlib
import os
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Iterator

from alphamed.cluster import quiet_ray
from alphamed.cluster.environment import SILENT, without_torchrun
from alphamed.cluster.hardware import cores, gpus_present, wants_cuda
from alphamed.cluster.ledger import MAX_TEMPORARY_CHARS, run_id
from alphamed.config import Config
from alphamed.errors import ConfigError, RunFailed

OBJECT_STORE_BYTES = 200 << 20
"""What travels through Ray is small: tasks, rollouts, rewards. (Weights have links of their own.)"""
START_ATTEMPTS = 2
ADDRESS_DEADLINE_S = 5.0
"""For the first answer of a Ray to join: it may have been started a moment ago."""
STOP_DEADLINE_S = 20.0
NOT_FOR_ACTORS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_DEVICE_MAX_CONNECTIONS")
"""Settings of a trainer rank that its actors must not inherit."""

RAY_SETTINGS = {
    "RAY_worker_niceness": "0",                     # Ray's default of 15 starves an engine wherever anything else runs
    "RAY_health_check_timeout_ms": "30000",         # a node is given up after 20 failed checks, not 5: on a busy machine
    "RAY_health_check_failure_threshold": "20",     # Ray's own processes can be slow; deaths of actors are seen at once
}


def check_ray_address() -> None:
    """Raises ConfigError where the environment names a Ray to join and nothing answers there: Ray itself would go on trying
    for minutes without a word."""
    address = os.environ.get("RAY_ADDRESS", "")
    if address in ("", "auto", "local"):            # none, one that Ray finds on this host, or a new one
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"RAY_ADDRESS: {address!r} is no HOST:PORT; give the address of the Ray to join, or unset it")
    deadline = time.monotonic() + ADDRESS_DEADLINE_S
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=ADDRESS_DEADLINE_S).close()
            return
        except (OSError, OverflowError) as error:
            if time.monotonic() >= deadline:
                raise ConfigError(f"RAY_ADDRESS: {address!r} does not answer ({error}); start Ray there, or unset "
                                  f"it") from None
            time.sleep(0.5)


def start_ray(config: Config) -> None:
    """Bring Ray up, or join the cluster at RAY_ADDRESS, which only a start over several hosts leaves in the environment.
    Raises RunFailed where that fails, ConfigError where nothing answers at the address."""
    check_ray_address()
    shared = dict(namespace=run_id(config.run_dir), log_to_driver=False, logging_level="ERROR")
    address = os.environ.get("RAY_ADDRESS")
    if address:
        options = dict(address=address, **shared)
    else:
        gpus = engine_gpus(config)
        options = dict(address="local", num_cpus=cores(), num_gpus=len(gpus), include_dashboard=False,
                       object_store_memory=OBJECT_STORE_BYTES, _node_ip_address="127.0.0.1",
                       _temp_dir=_session_folder(), **shared)
    with _environment_of_actors(config):
        import ray  # reads its token when it is imported

        quiet_ray.apply()
        # In this thread, which stays: the kernel ends Ray's processes with the thread that started them.
        # Ray gives up by itself, after half a minute for each of its services.
        for attempt in range(START_ATTEMPTS):
            try:
                ray.init(**options)
                return
            except Exception as error:          # Ray raises plain Exception where a busy machine was too slow for it
                ray.shutdown()
                if attempt + 1 == START_ATTEMPTS:
                    raise RunFailed("Ray", f"did not start: {type(error).__name__}: {error}") from error


def stop_ray() -> None:
    """Leave Ray and end what this process has started of it. What does not end in time is left to the supervisor."""
    import ray

    thread = threading.Thread(target=ray.shutdown, name="ray-shutdown", daemon=True)
    thread.start()
    thread.join(STOP_DEADLINE_S)


def engine_gpus(config: Config) -> list[int]:
    """Indices of this node's GPUs for engines: those that no trainer rank uses (ranks take the first ones), or all where
    they are shared."""
    if not wants_cuda(config):
        return []
    used = 0 if config.cluster.share_gpus else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return list(range(used, gpus_present()))


@contextlib.contextmanager
def _environment_of_actors(config: Config) -> Iterator[None]:
    """Ray's processes inherit this process's environment as it stands while they are started."""
    before = dict(os.environ)
    env = {name: value for name, value in without_torchrun(before).items() if name not in NOT_FOR_ACTORS} | SILENT
    env |= RAY_SETTINGS
    env.setdefault("RAY_AUTH_MODE", "token")
    env.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    if wants_cuda(config):
        visible = before.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus_present())))).split(",")
        env["CUDA_VISIBLE_DEVICES"] = ",".join(visible[index] for index in engine_gpus(config))
    _set_environment(env)
    try:
        yield
    finally:
        _set_environment(before | {name: env[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")})


def _set_environment(env: dict[str, str]) -> None:
    for name in os.environ.keys() - env.keys():
        del os.environ[name]
    os.environ.update(env)


def _session_folder() -> str:
    """Below the run's temporary folder, if its name leaves room for the names of sockets (see ledger)."""
    folder = tempfile.gettempdir()
    return folder if len(folder) <= MAX_TEMPORARY_CHARS + len("/alphamed-") + 16 else "/tmp/ray"
