"""`alphamed eval` checks its input before it starts anything; each mistake is one line and exit code 2."""

import shutil
from pathlib import Path

import pytest
from tiny import edit_config, tiny_hf

from alphamed import cli

CONFIG = """
model: {{path: {model}, dtype: fp32}}
data: {{train: [{data}]}}
run: {{root: {root}, name: e}}
prompt: {{max_tokens: {prompt}}}
rollout: {{max_response_tokens: 16, dtype: fp32}}
reward: {{name: {reward}}}
evaluation: {{files: {files}, allow_overlap: true}}
cluster: {{device: cpu}}
"""
ROW = '{"id": "q", "question": "Which?", "options": {"A": "a", "B": "b"}, "answer": "A"}\n'


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_hf(tmp_path_factory.mktemp("model") / "m", head_dim=32)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"files": "[]"}, "error: evaluation.files: [] leaves nothing to evaluate; name at least one file"),
        ({"files": "[absent.jsonl]"}, "absent.jsonl"),
        ({"model": "nowhere"}, "nowhere"),
        ({"prompt": 4096}, "the model has 2048 positions"),
        ({"reward": "corect"}, "did you mean 'correct'?"),
        ({"head_dim": 48}, "heads of 48 are none that vLLM computes on CPU"),
        ({"prompt": 8}, "q"),
    ],
)
def test_mistakes_are_one_line(tmp_path, model, capsys, change, message):
    data = tmp_path / "e.jsonl"
    data.write_text(ROW)
    if "head_dim" in change:
        model = edit_config(Path(shutil.copytree(model, tmp_path / "m")), **change)
    values = {
        "model": model,
        "data": data,
        "root": tmp_path,
        "prompt": 512,
        "files": f"[{data}]",
        "reward": "correct",
    } | change
    (tmp_path / "c.yaml").write_text(CONFIG.format(**values))
    assert cli.main(["eval", "--config", str(tmp_path / "c.yaml")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "e").exists()  # nothing was started or written
