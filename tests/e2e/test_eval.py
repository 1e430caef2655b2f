"""`alphamed eval` and `alphamed data difficulty` with a real engine: what they write, and that nothing stays behind."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_hf
from tiny_run import clean_temporary
from waiting import until

from alphamed.cluster.ledger import run_id
from alphamed.data.sources import load_questions
from alphamed.evaluation.items import read_items
from alphamed.lab.datasets.difficulty import level_of

pytestmark = pytest.mark.slow
CONFIG = """
model: {{path: {folder}/model, dtype: fp32}}
data: {{train: [{folder}/e.jsonl]}}
run: {{root: {folder}/runs, name: e}}
prompt: {{max_tokens: 512}}
rollout: {{max_response_tokens: 16, dtype: fp32, kv_cache_bytes: 67108864, max_concurrent_requests: {concurrent}}}
evaluation: {{files: [{folder}/e.jsonl], questions: 10, allow_overlap: true}}
cluster: {{device: cpu}}
"""
DEADLINE_S = 1500


def workplace(folder, concurrent=256):
    tiny_hf(folder / "model", heads=2, kv_heads=1)
    rows = [
        {
            "id": f"q{i}",
            "question": f"Which is {i}?",
            "options": {"A": "one", "B": "two", "C": "three"},
            "answer": "ABC"[i % 3],
        }
        for i in range(12)
    ]
    (folder / "e.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "c.yaml").write_text(CONFIG.format(folder=folder, concurrent=concurrent))


def alphamed(*arguments):
    return [sys.executable, "-m", "alphamed.cli", *map(str, arguments)]


def test_a_folder_is_evaluated_and_nothing_stays_behind(tmp_path):
    workplace(tmp_path)
    command = alphamed(
        "eval", "--config", tmp_path / "c.yaml", "--out", tmp_path / "out", "--samples", 3, "--variants", "free"
    )
    with clean_temporary() as environment:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "e: accuracy 0.0% [0.0%, 27.8%], n = 10" in done.stdout  # random weights box nothing
    found = json.loads((tmp_path / "out" / "results.json").read_text())["benchmarks"]
    assert found["e"]["n"] == found["e+free"]["n"] == 10 and found["e"]["truncated"] + found["e"]["unparseable"] == 1.0
    items = read_items(tmp_path / "out" / "items.jsonl")
    assert len(items) == 20 and all(len(samples) == 3 for samples in items.values())
    assert all(1 <= item.tokens <= 16 for samples in items.values() for item in samples)
    assert len({item.text for item in items["e", "q0"]}) == 3  # sampled, not the same thrice
    assert _carriers(tmp_path / "out" / "engines") == []


def test_an_annotation_killed_at_work_goes_on_and_repeats_nothing(tmp_path):
    workplace(tmp_path, concurrent=2)
    out, work = tmp_path / "out.jsonl", tmp_path / "out.jsonl.work"
    command = alphamed(
        "data",
        "difficulty",
        "--config",
        tmp_path / "c.yaml",
        "--questions",
        tmp_path / "e.jsonl",
        "--out",
        out,
        "--samples",
        2,
    )
    with clean_temporary() as environment:
        first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        shard = work / "shard-1-of-1.jsonl"
        until(lambda: shard.exists() or first.poll() is not None, "the first answers", pause_s=0.01)
        first.send_signal(signal.SIGKILL)
        told = first.communicate(timeout=DEADLINE_S)[1].decode()
        assert shard.exists() and not out.exists(), told
        before = shard.read_text().splitlines()
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = shard.read_text().splitlines()
    assert 1 <= len(before) < 12 and lines[: len(before)] == before, "the kill came too late to show anything"
    assert sorted(json.loads(line)["id"] for line in lines) == sorted(f"q{i}" for i in range(12))
    assert f"{len(before)} of 12 questions are annotated already" in done.stderr
    levels = {json.loads(line)["id"]: level_of(json.loads(line)["outcomes"].count("correct"), 2) for line in lines}
    assert {q.id: q.level for q in load_questions([out]).questions} == levels
    assert _carriers(work / "shard-1-of-1" / "engines") == []


def _carriers(run_dir: Path) -> list[int]:
    """Processes that carry the run's tag, the guard aside: it ends once it has looked."""
    tag, found = f"ALPHAMED_RUN_ID={run_id(run_dir)}".encode(), []
    for folder in Path("/proc").iterdir():
        try:
            if (
                folder.name.isdigit()
                and int(folder.name) != os.getpid()
                and tag in (folder / "environ").read_bytes()
                and b"cluster.guard" not in (folder / "cmdline").read_bytes()
            ):
                found.append(int(folder.name))
        except OSError:
            continue  # gone meanwhile, or not ours to read
    return found
