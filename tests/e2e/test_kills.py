"""SIGKILL of any process of a run: it ends by itself, names the failed component, leaves nothing, and can be continued.

One run directory serves all victims: every start after the first continues from the checkpoint of the one before.
"""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import tiny_hf
from waiting import until

from alphamed.cluster import processes
from alphamed.cluster.ledger import run_id

pytestmark = [pytest.mark.slow, pytest.mark.matrix]
START_S, END_S = 1500, 600
VICTIMS = {
    # name: (pattern of its command, rank, what the last line must hold)
    "engine actor": (r"^ray::RolloutEngine", None, r"engine 0"),
    "EngineCore": (r"EngineCore", None, r"engine 0.*EngineCore"),
    "vLLM worker": (r"^VLLM::Worker", None, r"engine 0.*Worker"),
    "reward actor": (r"^ray::RewardProcess", None, r"reward"),
    "grader": (r"alphamed\.reward\.grader_child", None, r"grader"),
    "rank 0": (r"alphamed\.cli worker", "0", r"rank 0 \(pid \d+\): was killed by signal 9"),
    "rank 1": (r"alphamed\.cli worker", "1", r"rank 1 \(pid \d+\): was killed by signal 9"),
}


class KilledRun:
    def __init__(self, folder: Path):
        self.folder = folder
        self.run_dir = folder / "runs" / "killed"
        tiny_hf(folder / "model", head_dim=32)  # vLLM has no CPU kernel for smaller heads
        rows = [
            {"id": f"q{i}", "question": f"Which letter is number {i}?", "options": {"A": "a", "B": "b"}, "answer": "A"}
            for i in range(4)
        ]
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "kill_rewards.py").write_text("def share(question, text, letter):\n    return text.count('a') / 99\n")
        (folder / "run.yaml").write_text(
            yaml.safe_dump(
                {
                    "run": {"root": str(folder / "runs"), "name": "killed", "steps": 100_000},
                    "model": {"path": str(folder / "model"), "dtype": "fp32"},
                    "data": {"train": [str(folder / "train.jsonl")]},
                    "prompt": {"max_tokens": 256},
                    "rollout": {
                        "questions_per_step": 2,
                        "samples_per_question": 2,
                        "max_response_tokens": 16,
                        "dtype": "fp32",
                        "tensor_parallel": 2,
                        "kv_cache_bytes": 64 << 20,
                        "start_deadline_s": 1200.0,
                    },
                    "reward": {"name": "kill_rewards:share"},
                    "parallel": {"tensor": 2},
                    "checkpoint": {"every": 1},
                    "evaluation": {
                        "files": [str(folder / "train.jsonl")],
                        "allow_overlap": True,
                        "every": 1,
                        "background": True,
                    },
                    "logging": {"wandb": "off", "report": False, "export_hf": False},
                    "cluster": {"device": "cpu", "heartbeat_timeout_s": 300.0},
                }
            )
        )
        self.process: subprocess.Popen | None = None

    def start(self, *overrides: str) -> None:
        command = [sys.executable, "-m", "alphamed.cli", "train", "--config", "run.yaml", *overrides]
        self.process = subprocess.Popen(
            command, cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    def last_step(self) -> int:
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return json.loads(lines[-1])["step"] if lines else 0

    def wait_for_step(self, step: int) -> None:
        def reached() -> bool:
            assert self.process.poll() is None, self.process.stderr.read()
            return self.last_step() >= step

        until(reached, f"step {step}", START_S, pause_s=0.2)

    def own(self) -> dict[int, processes.Process]:
        living = processes.everything()
        return processes.descendants((self.process.pid,), living) | processes.tagged(run_id(self.run_dir), living)

    def victim(self, pattern: str, rank: str | None) -> processes.Process:
        found = [
            process
            for process in self.own().values()
            if re.search(pattern, process.command)
            and (rank is None or f"\0RANK={rank}\0" in Path(f"/proc/{process.pid}/environ").read_text())
        ]
        assert found, [process.command for process in self.own().values()]
        return found[0]


@pytest.fixture(scope="module")
def killed_run(tmp_path_factory):
    run = KilledRun(tmp_path_factory.mktemp("kills"))
    yield run
    if run.process:
        run.process.terminate()
        run.process.communicate(timeout=END_S)


@pytest.mark.parametrize("name", VICTIMS)
def test_a_killed_process_is_named_and_nothing_is_left(killed_run, name):
    run, (pattern, rank, words) = killed_run, VICTIMS[name]
    before, shared_before = run.last_step(), set(os.listdir(processes.SHARED_MEMORY))
    run.start()
    run.wait_for_step(before + 1)  # from the second victim on it continued
    own = run.own()
    os.kill(run.victim(pattern, rank).pid, signal.SIGKILL)
    said = run.process.communicate(timeout=END_S)[1]
    assert run.process.returncode == 1, said
    last = said.splitlines()[-1]
    assert last.startswith("run failed: ") and re.search(words, last), said
    assert [process.command for process in own.values() if processes.is_alive(process)] == []
    assert processes.tagged(run_id(run.run_dir), processes.everything()) == {}
    assert processes.unlink_segments(set(os.listdir(processes.SHARED_MEMORY)) - shared_before) == []  # nobody uses it
    assert not list(run.run_dir.glob("processes-*.json"))


def test_the_same_command_continues_to_the_end(killed_run):
    run = killed_run
    wanted = run.last_step() + 2
    run.start(f"run.steps={wanted}")
    said = run.process.communicate(timeout=START_S)[1]
    assert run.process.returncode == 0, said
    steps = [json.loads(line)["step"] for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, wanted + 1))  # every step once, none lost, none twice
    evaluated = sorted(int(path.stem.removeprefix("step_")) for path in (run.run_dir / "evaluations").glob("step_*.json"))
    assert evaluated == steps  # also those that a kill came in the midst of
    audited = subprocess.run(
        [sys.executable, "-m", "alphamed.cli", "audit", str(run.run_dir)], capture_output=True, text=True, timeout=END_S
    )
    assert audited.returncode == 0, audited.stdout + audited.stderr  # no question was lost or repeated
    assert f"{wanted} of {wanted} steps agree" in audited.stdout
