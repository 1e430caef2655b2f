"""Ray for a run: started on rank 0's node, or an existing cluster joined, and taken down again.

Only rank 0 talks to Ray. A local Ray belongs to the run: its session lies in the run's temporary folder, whoever speaks to
it needs the run's token (it may listen on this host's own address, not only on the loopback one), it carries the run's tag
and knows nothing of torchrun. In a job of several hosts it listens at rank 0's address in the cluster, and the engines'
hosts join it (`worker_command`). Where the user has started Ray by hand, RAY_ADDRESS says where, and the run joins that; a
RAY_ADDRESS that was left over never comes here (cluster.variables).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from alphamed.cluster import quiet_ray
from alphamed.cluster.addresses import LOOPBACK
from alphamed.cluster.cluster_job import ClusterHost, ClusterJob
from alphamed.cluster.environment import environment_of_actors
from alphamed.cluster.hardware import cores, gpus_present, wants_cuda
from alphamed.cluster.ledger import MAX_TEMPORARY_CHARS, run_id
from alphamed.config.schema import Config
from alphamed.errors import ConfigError, RunFailed

OBJECT_STORE_BYTES = 200 << 20
"""What travels through Ray is small: tasks, rollouts, rewards. (Weights have links of their own.)"""
ENGINE_SLOT = "engine_slot"
"""Ray's resource that an engine on CPU takes, one for each of its workers, as one on CUDA takes GPUs."""
START_ATTEMPTS = 2
ADDRESS_DEADLINE_S = 5.0
"""For the first answer of a Ray to join: it may have been started a moment ago."""
STOP_DEADLINE_S = 20.0

RAY_SETTINGS = {
    "RAY_worker_niceness": "0",  # Ray's default of 15 starves an engine wherever anything else runs
    "RAY_health_check_timeout_ms": "30000",  # a node is declared dead after 20 failed checks, not 5: on a busy machine
    "RAY_health_check_failure_threshold": "20",  # Ray's own processes can be slow; deaths of actors are noticed at once
}


def check_ray_address() -> None:
    """Raises ConfigError where the environment names a Ray to join and nothing answers there: Ray itself would go on trying
    for minutes without a word."""
    address = os.environ.get("RAY_ADDRESS", "")
    if address in ("", "auto", "local"):  # none, one that Ray finds on this host, or a new one
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
                raise ConfigError(
                    f"RAY_ADDRESS: {address!r} does not answer ({error}); start Ray there, or unset it"
                ) from None
            time.sleep(0.5)


def start_ray(config: Config) -> None:
    """Bring Ray up, or join the cluster at RAY_ADDRESS, which only a start over several hosts leaves in the environment, and
    wait for the hosts that belong to it. Raises RunFailed where that fails, ConfigError where nothing answers at the address."""
    check_ray_address()
    options: dict[str, Any] = dict(namespace=run_id(config.run_dir), log_to_driver=False, logging_level="ERROR")
    address, job = os.environ.get("RAY_ADDRESS"), ClusterJob.of_environment()
    if address:
        options |= dict(address=address)
    else:
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        slots = job.head.engine_slots if job else config.rollout.engines * config.rollout.tensor_parallel
        gpus = engine_gpus(config, local_ranks)[: slots if job else None]
        options |= dict(
            address="local",
            num_cpus=cores(),
            num_gpus=len(gpus),
            include_dashboard=False,
            resources={ENGINE_SLOT: slots} if slots and not gpus else None,
            object_store_memory=OBJECT_STORE_BYTES,
            _node_ip_address=job.head.address if job else LOOPBACK,
            _temp_dir=_session_folder(),
        )
    with _environment_of_actors(config, job):
        import ray  # reads its token when it is imported

        quiet_ray.apply()
        # In this thread, which stays: the kernel ends Ray's processes with the thread that started them.
        # Ray has a deadline of its own, half a minute for each of its services.
        for attempt in range(START_ATTEMPTS):
            try:
                ray.init(**options)
                break
            except Exception as error:  # Ray raises plain Exception where a busy machine was too slow for it
                ray.shutdown()
                if attempt + 1 == START_ATTEMPTS:
                    raise RunFailed("Ray", f"did not start: {type(error).__name__}: {error}") from error
    if job and not address:
        wait_for_hosts(job, config.cluster.join_deadline_s)
    _require_room(config, address)


def wait_for_hosts(job: ClusterJob, deadline_s: float) -> None:
    """Until all hosts of engines are part of Ray. Raises RunFailed naming those that are not, after the deadline."""
    import ray

    until = time.monotonic() + deadline_s
    while True:
        joined = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
        missing = [place.name for place in job.engine_hosts if place.address not in joined]
        if not missing:
            return
        if time.monotonic() > until:
            raise RunFailed(
                f"host {missing[0]}",
                f"has not joined Ray within {deadline_s:.0f} s (missing: "
                f"{', '.join(missing)}); see logs/ray_{missing[0]}.log",
            )
        time.sleep(0.5)


def _require_room(config: Config, address: str | None) -> None:
    """Engines that no host has room for would wait for ever. Raises RunFailed, the user's."""
    import ray

    kind = "GPU" if wants_cuda(config) else ENGINE_SLOT
    size, needed = config.rollout.tensor_parallel, config.rollout.engines
    present = [int(node["Resources"].get(kind, 0)) for node in ray.nodes() if node["Alive"]]
    if sum(room // size for room in present) < needed:
        option = "--num-gpus=N" if kind == "GPU" else f"--resources='{{\"{ENGINE_SLOT}\": N}}'"
        where = f" at {address} (RAY_ADDRESS)" if address else ""
        raise RunFailed(
            "",
            f"rollout.engines: {needed} engines of {size} workers do not fit Ray{where}, whose hosts have room for "
            f"{' + '.join(map(str, present))} workers; lower it, or have more hosts join with `ray start "
            f"--address=... {option}`",
            user_error=True,
        )


def beside_rank0() -> Any:
    """Ray's scheduling strategy for actors that belong on rank 0's host: they need its files and next to no resources."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def worker_command(job: ClusterJob, place: ClusterHost, on_cuda: bool, temporary: Path) -> list[str]:
    """Ray on a host of engines, once the head answers: bound to the host's address in the cluster, on ports of its own."""
    room = (
        [f"--num-gpus={place.engine_slots}"]
        if on_cuda
        else [f'--resources={{"{ENGINE_SLOT}": {place.engine_slots}}}', "--num-gpus=0"]
    )
    return [
        sys.executable,
        "-m",
        "alphamed.cluster.join_ray",
        job.head.address,
        str(job.ray_port),
        "start",
        "--block",
        f"--address={job.head.address}:{job.ray_port}",
        f"--node-ip-address={place.address}",
        *room,
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        f"--temp-dir={temporary}",
        "--disable-usage-stats",
        # 0: any; Ray's own defaults are fixed ports, which two jobs on one host would both want
        "--min-worker-port=0",
        "--max-worker-port=0",
        "--dashboard-agent-listen-port=0",
    ]


def stop_ray() -> None:
    """Leave Ray and end what this process has started of it. What does not end in time is left to the supervisor."""
    import ray

    thread = threading.Thread(target=ray.shutdown, name="ray-shutdown", daemon=True)
    thread.start()
    thread.join(STOP_DEADLINE_S)


def engine_gpus(config: Config, local_ranks: int) -> list[int]:
    """Indices of this node's GPUs for engines: those that none of its trainer ranks uses (they take the first ones), or all
    where they are shared."""
    if not wants_cuda(config):
        return []
    return list(range(0 if config.cluster.share_gpus else local_ranks, gpus_present()))


def environment_of_ray(config: Config, before: Mapping[str, str], gpus: Sequence[int]) -> dict[str, str]:
    """What Ray's processes and actors get, on every host: nothing of torchrun's or the trainer's, `gpus` alone."""
    env = environment_of_actors(before) | RAY_SETTINGS
    env.setdefault("RAY_AUTH_MODE", "token")
    env.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    if wants_cuda(config):
        visible = before.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus_present())))).split(",")
        env["CUDA_VISIBLE_DEVICES"] = ",".join(visible[index] for index in gpus)
    return env


@contextlib.contextmanager
def _environment_of_actors(config: Config, job: ClusterJob | None) -> Iterator[None]:
    """Ray's processes inherit this process's environment as it stands while they are started."""
    before = dict(os.environ)
    env = environment_of_ray(config, before, engine_gpus(config, int(before.get("LOCAL_WORLD_SIZE", "1"))))
    if job:
        env["RAY_GCS_SERVER_PORT"] = str(job.ray_port)
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
