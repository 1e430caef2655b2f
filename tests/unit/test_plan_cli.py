"""The verb `alphamed plan`: exit codes, files, and the launcher's refusal."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from alphamed.cli import main
from alphamed.config.loading import load_config
from alphamed.errors import ConfigError
from alphamed.lab.hooks import HOOKS, refuse_unfit
from alphamed.planner import hardware

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "examples" / "recipes" / "llama31_8b_1node.yaml")


def test_a_plan_that_fits(tmp_path, capsys):
    files = tmp_path / "plan.json", tmp_path / "plan.html"
    assert main(["plan", "--config", RECIPE, "--json", str(files[0]), "--html", str(files[1])]) == 0
    output = capsys.readouterr().out
    assert "8,030,261,248 parameters" in output and output.rstrip().endswith("It fits.")
    assert all(len(line) <= 140 for line in output.splitlines())
    tree = json.loads(files[0].read_text())
    assert tree["fits"] and set(tree["step"]["seconds"]) == {"generate", "logprobs", "update", "sync", "other", "total"}
    page = files[1].read_text()
    assert page.count("<svg") == 3 and "<script" not in page and "prefers-color-scheme:dark" in page
    assert not re.search(r'(src|href)="', page)  # nothing is fetched
    assert page.count("rank 3") == 2 and "engine 3" in page  # label and hover


def test_what_does_not_fit_exits_with_1(capsys):
    assert main(["plan", "--config", RECIPE, "parallel.tensor=1", "parallel.sequence=false"]) == 1
    output = capsys.readouterr().out
    assert "PROBLEM  trainer" in output and "FITS " in output and output.rstrip().endswith("It does not fit.")


def test_an_illegal_layout_exits_with_1_and_names_the_nearest(tmp_path, capsys):
    written = tmp_path / "plan.html"
    assert (
        main(["plan", "--config", RECIPE, "--html", str(written), "--json", str(tmp_path / "p.json"), "parallel.tensor=5"])
        == 1
    )
    assert "try parallel.tensor=4" in capsys.readouterr().out
    assert "This layout is illegal." in written.read_text()
    assert json.loads((tmp_path / "p.json").read_text())["problems"][0]["fix"] == ["parallel.tensor=4"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--gpu", "v100"],
        ["--nodes", "0"],
        ["--response-tokens", "-3"],
        ["parallel.tensr=2"],
        ["--storage", "nan"],
        ["model.path=nobody/nothing"],
    ],
)
def test_bad_input_exits_with_2_in_one_line(arguments, tmp_path, capsys):
    written = tmp_path / "plan.json"
    assert main(["plan", "--config", RECIPE, "--json", str(written), f"model.cache={tmp_path}", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert not written.exists()


def test_more_of_a_faster_gpu_is_faster(tmp_path):
    seconds = {}
    for name in ("a100-80g", "h100-80g", "h200-141g"):
        written = tmp_path / f"{name}.json"
        assert main(["plan", "--config", RECIPE, "--gpu", name, "--json", str(written)]) == 0
        seconds[name] = json.loads(written.read_text())["step"]["seconds"]
    assert seconds["a100-80g"]["update"] > 2 * seconds["h100-80g"]["update"]
    assert seconds["h200-141g"]["generate"] < seconds["h100-80g"]["generate"]


def test_planning_imports_nothing_heavy(tmp_path):
    code = (
        "import sys; from alphamed.cli import main; main(['plan', '--config', sys.argv[1], '--html', sys.argv[2]]); "
        "print(*[m for m in ('torch', 'transformers', 'megatron', 'vllm', 'ray') if m in sys.modules], file=sys.stderr)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, RECIPE, str(tmp_path / "p.html")], capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0 and run.stderr.split() == []


def test_the_launcher_refuses_what_can_not_fit_unless_told_to_go_on(tmp_path, monkeypatch):
    from alphamed.lab.planner.shapes import published

    tree = yaml.safe_load(Path(RECIPE).read_text()) | {"cluster": {"device": "auto"}}
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(tree))
    shape = published()[tree["model"]["path"]]
    gpu = hardware.gpu("h100-80g")
    monkeypatch.setattr("alphamed.lab.planner.plan._this_machine", lambda config: (gpu, 8))  # a machine with H100s
    refuse_unfit(load_config(file), shape)
    large = ["parallel.tensor=1", "parallel.sequence=false"]
    with pytest.raises(ConfigError, match=r"trainer .* GiB.*skip_memory_check=true"):
        refuse_unfit(load_config(file, large), shape)
    refuse_unfit(load_config(file, [*large, "cluster.skip_memory_check=true"]), shape)
    with pytest.raises(
        ConfigError, match=r"rollout.step_deadline_s: generating a step .* rollout.step_deadline_s=600 would fit"
    ):
        refuse_unfit(load_config(file, ["rollout.step_deadline_s=20"]), shape)  # it takes 34 s


def test_a_cpu_plan_reckons_with_this_machine(tmp_path, monkeypatch):
    from tiny import tiny_hf

    folder = tiny_hf(tmp_path / "model", head_dim=32)
    file = tmp_path / "c.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "model": {"path": str(folder), "dtype": "fp32"},
                "data": {"train": ["x"]},
                "cluster": {"device": "cpu"},
                "rollout": {"dtype": "fp32", "max_response_tokens": 512},
            }
        )
    )
    assert main(["plan", "--config", str(file)]) == 0
    monkeypatch.setattr("alphamed.cluster.hardware.memory_bytes", lambda: (64 << 20, 64 << 20))
    assert main(["plan", "--config", str(file)]) == 1


def test_a_run_records_the_plans_prediction_beside_the_measurement(tmp_path):
    from test_run import STATS, Alone, config_of, lines, rollouts_of
    from tiny import tiny_hf

    from alphamed.run import Run
    from alphamed.rundir.metrics import undeclared

    config, folder = config_of(tmp_path), tiny_hf(tmp_path / "model")
    run = Run.open(config, Alone(), HOOKS)
    run.begin(None, folder)
    next(iter(run.steps()))
    run.record(rollouts_of(1), STATS, version=2)
    run.close()
    (row,) = lines(config)
    parts = [row[f"plan/{part}_s"] for part in ("generate", "logprobs", "update", "sync")]
    assert all(seconds > 0 for seconds in (parts[0], parts[2], parts[3])) and sum(parts) < row["plan/step_s"]
    assert row["plan/memory_bytes"] > 0 and row["time/step_s"] > 0 and not undeclared(row)


# -------------------------------------------------------------------------------------------------- what a user trial found
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt-tokens", "99999"], ("--prompt-tokens", "99999", "prompt.max_tokens (1024)")),
        (["--response-tokens", "1e9"], ("--response-tokens", "1e+09", "rollout.max_response_tokens (2048)")),
        (["--response-tokens", "0.5"], ("--response-tokens", "0.5", "between 1 and")),
        (["--nodes", "100000000000000000000"], ("--nodes", "100,000 GPUs", "at most 12500")),
        (["rollout.engines=100000000", "cluster.nodes=null"], ("rollout.engines", "100000000", "100000")),
        (["rollout.engines=60000", "rollout.tensor_parallel=2", "cluster.nodes=null"], ("120004 processes", "100,000")),
        (["--gpu", ""], ("--gpu", "''", "h100-80g")),
        (["--json", ""], ("--json", "is not a file")),
        (["--html", ""], ("--html", "is not a file")),
        (["--html", "/dev/null"], ("--html", "/dev/null", "is not a file")),
        (["--html", "questions.jsonl"], ("--html", "'questions.jsonl' does not end in .html")),
        (["--json", "no/such/folder/x.json"], ("--json", "no/such/folder", "make 'no/such/folder' first")),
    ],
)
def test_a_mistake_in_an_option_is_one_line_before_anything_is_planned(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("alphamed.lab.planner.main.make_plan", None)
    assert main(["plan", "--config", RECIPE, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and all(word in captured.err for word in words), captured.err
    assert list(tmp_path.iterdir()) == []


def test_a_run_in_parts_is_planned_to_its_end(tmp_path, capsys):
    """Checkpoints every 20 steps and after the last one, unless that is one of them: 1 for 10 steps, 2 for 40, 3 for 41."""
    trees = {}
    for last in (0, 10, 40, 41):
        written = tmp_path / f"{last}.json"
        assert main(["plan", "--config", RECIPE, "--json", str(written), f"run.stop_after={last}"]) == 0
        assert f"  {last} of 300 steps: " in capsys.readouterr().out
        trees[last] = json.loads(written.read_text())
    step, save = trees[10]["step"]["seconds"]["total"], trees[10]["checkpoint"]["save_s"]
    assert [tree["run"]["steps"] for tree in trees.values()] == [0, 10, 40, 41]
    for last, saves in ((0, 0), (10, 1), (40, 2), (41, 3)):
        assert trees[last]["run"]["hours"] * 3600 == pytest.approx(last * step + saves * save)
    assert trees[10]["checkpoint"]["at_risk_s"] == 10 * step


@pytest.mark.slow
def test_building_ranks_prints_its_result_and_no_warnings():
    run = subprocess.run(
        [sys.executable, "-m", "alphamed.cli", "plan", "--config", RECIPE, "--build"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0 and run.stderr == "" and "4 ranks built" in run.stdout


def test_what_nothing_mends_is_said_on_paper_too(tmp_path, capsys):
    written = tmp_path / "p.html"  # 70 billion parameters, 18 bytes each, and a node of 640 GB
    assert main(["plan", "--config", RECIPE, "--html", str(written), "model.path=meta-llama/Llama-3.1-70B-Instruct"]) == 1
    verdict = "It does not fit, and no settings that do were found within these nodes."
    assert capsys.readouterr().out.rstrip().endswith(verdict) and verdict in written.read_text()


def test_a_plan_names_the_deadlines_of_storage_and_refuses_a_speed_that_they_do_not_allow(tmp_path, capsys):
    recipe = str(ROOT / "examples" / "recipes" / "llama31_70b_8nodes.yaml")
    written = tmp_path / "plan.json"
    assert main(["plan", "--config", recipe, "--json", str(written)]) == 0
    saved = json.loads(written.read_text())["checkpoint"]
    # 70,553,706,496 parameters of 14 bytes: 987.8 GB at 200 MB/s, and the deadline of a collective
    assert saved["deadline_s"] == pytest.approx(600 + 70_553_706_496 * 14 / 200e6)
    assert "deadlines: a checkpoint 5,539 s, the engines' start" in capsys.readouterr().out
    assert main(["plan", "--config", recipe, "--storage", "0.1"]) != 0
    assert "checkpoint.storage_bytes_per_s: 2e+08 lets a checkpoint take 5,539 s" in capsys.readouterr().out
