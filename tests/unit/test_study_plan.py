"""Studies: the runs of a file, what is refused, how sets are drawn, resuming, failing runs, Slurm scripts."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
import yaml
from waiting import until

from alphamed.cli import main
from alphamed.cluster.ledger import Lock
from alphamed.config.loading import load_config
from alphamed.lab.datasets import build
from alphamed.lab.study import child, slurm
from alphamed.lab.study.data import make_sets
from alphamed.lab.study.grid import plan_runs, run_name
from alphamed.lab.study.spec import CONTROLS, ControlKind, load_study

ROOT = Path(__file__).parents[2]
BASE = {
    "model": {"path": "no-such-model"},
    "data": {"train": ["questions.jsonl"]},
    "run": {"steps": 8, "seed": 5},
    "prompt": {"max_tokens": 64},
    "rollout": {"questions_per_step": 2, "samples_per_question": 2, "max_response_tokens": 8},
    "evaluation": {"files": ["exam.jsonl"]},
    "logging": {"wandb": "off"},
    "cluster": {"device": "cpu"},
}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a study file beside its base, in the current directory, and return its path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    rows = [
        {
            "id": f"q{i}",
            "question": f"Which is number {i}?",
            "answer": "ABC"[i % 3],
            "level": 1 + i % 6,
            "options": {"A": f"this {i}", "B": f"that {i}", "C": f"other {i}"},
        }
        for i in range(60)
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "exam.jsonl").write_text(json.dumps({**rows[0], "id": "e", "question": "Which, in the exam?"}) + "\n")

    def write(**tree) -> Path:
        tree = {"name": "s", "base": "base.yaml", "grids": [{"name": "g"}]} | tree
        (tmp_path / "s.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
        return tmp_path / "s.yaml"

    return write


def runs(path):
    return plan_runs(load_study(path))


def refused(capfd, path, *words):
    assert main(["study", str(path), "--dry-run"]) == 2
    message = capfd.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert [word for word in words if word not in message] == [], message
    assert not (path.parent / "studies").exists()


OWN = {"sources": [{"name": "own", "path": "questions.jsonl"}, {"name": "more", "path": "questions.jsonl"}]}


def own_axes(recipe: dict | None = None, **axes) -> dict:
    """A study of one grid whose sets are drawn from `own`, unless the axes say otherwise."""
    grid = {"name": "g", "axes": {"sources": ["own"]} | axes}
    return {"data": OWN | ({"recipe": recipe} if recipe else {}), "grids": [grid]}


# ------------------------------------------------------------------------------------------------------------- the grid
def test_axes_are_crossed(write):
    planned = runs(write(grids=[{"name": "g", "axes": {"seeds": [1, 2], "settings": {"optimizer.lr": [1e-5, 0.0003]}}}]))
    assert [run.name for run in planned] == ["lr1e-05-s1", "lr1e-05-s2", "lr0.0003-s1", "lr0.0003-s2"]
    assert [(run.config.run.seed, run.config.optimizer.lr) for run in planned] == [
        (1, 1e-5),
        (2, 1e-5),
        (1, 3e-4),
        (2, 3e-4),
    ]
    assert {run.config.run_dir for run in planned} == {Path("studies/s/runs") / run.name for run in planned}
    assert planned[2].axes == {"optimizer.lr": 0.0003, "seeds": 1}
    assert all(run.config.rollout.questions_per_step == 2 for run in planned)  # the rest is the base's


def test_settings_of_grid_over_study_over_base(write):
    path = write(
        settings={"run.steps": 20, "optimizer.lr": 2e-6, "evaluation.files": ["{study}/exam.jsonl"]},
        grids=[{"name": "a"}, {"name": "b", "settings": {"run.steps": 30}, "axes": {"seeds": [7]}}],
    )
    first, second = runs(path)
    assert (first.config.run.steps, first.config.optimizer.lr, first.config.run.seed) == (20, 2e-6, 5)
    assert (second.config.run.steps, second.config.optimizer.lr, second.config.run.seed) == (30, 2e-6, 7)
    assert first.config.evaluation.files == (Path("studies/s/exam.jsonl"),)
    axes = {"settings": {"evaluation.files": [["{study}/a.jsonl"], ["b.jsonl"]]}}
    assert [run.config.evaluation.files for run in runs(write(grids=[{"name": "g", "axes": axes}]))] == [
        (Path("studies/s/a.jsonl"),),
        (Path("b.jsonl"),),
    ]


def test_the_same_run_in_two_grids_is_one(write):
    shared = {"settings": {"optimizer.lr": [1e-5, 1e-4]}}
    planned = runs(
        write(grids=[{"name": "a", "axes": shared}, {"name": "b", "axes": {"settings": {"optimizer.lr": [1e-5]}}}])
    )
    assert [(run.name, run.grids) for run in planned] == [("lr1e-05-s5", ("a", "b")), ("lr0.0001-s5", ("a",))]


def test_values_that_no_setting_can_have_are_refused(write, capfd):
    path = write()
    path.write_text(path.read_text() + "settings: {optimizer.lr: !!binary aGk=}\n")
    refused(capfd, path, "s.yaml: holds a value that is neither text, number, list nor mapping")


def test_two_runs_of_one_name_are_refused(write, capfd):
    path = write(grids=[{"name": "a"}, {"name": "b", "settings": {"optimizer.lr": 1e-4}}])
    refused(capfd, path, "grids.b", "s5 is also the name of a run of a", "write what differs as an axis")


def test_controls_have_the_first_values_and_all_seeds(write):
    path = write(
        grids=[
            {
                "name": "g",
                "axes": {"seeds": [1, 2], "settings": {"optimizer.lr": [1e-5, 1e-4]}},
                "controls": [str(kind) for kind in ControlKind],
            }
        ]
    )
    controls = [run for run in runs(path) if run.control]
    assert [run.name for run in controls] == [
        "lr1e-05-s1-random_reward",
        "lr1e-05-s2-random_reward",
        "lr1e-05-s1-format_reward",
        "lr1e-05-s2-format_reward",
        "lr1e-05-s1-shuffled_keys",
        "lr1e-05-s2-shuffled_keys",
        "lr1e-05-s1-unchanged",
    ]  # one, the exam is the same
    assert [run.config.reward.name for run in controls] == ["random"] * 2 + ["format_only"] * 2 + ["correct"] * 3
    assert [str(run.config.data.answer_keys) for run in controls] == ["given"] * 4 + ["shuffled"] * 2 + ["given"]
    assert (controls[-1].config.run.last_step, controls[-1].config.evaluation.before) == (0, True)
    sampled = write(
        settings={"evaluation.questions": 1}, grids=[{"name": "g", "axes": {"seeds": [1, 2]}, "controls": ["unchanged"]}]
    )
    assert [run.name for run in runs(sampled) if run.control] == ["s1-unchanged", "s2-unchanged"]


def test_the_unchanged_model_chooses_among_no_checkpoints(write):
    chosen = {"evaluation.development": "questions.jsonl", "evaluation.every": 2, "checkpoint.every": 2}
    planned = runs(write(settings=chosen, grids=[{"name": "g", "controls": ["unchanged"]}]))
    assert [run.config.evaluation.development for run in planned] == [Path("questions.jsonl"), None]


def test_every_control_has_its_preset():
    assert set(CONTROLS) == set(ControlKind)


def test_long_names_are_cut_and_stay_apart():
    names = [run_name({"prompt.instruction": "x" * 200 + end}, None) for end in "ab"]
    assert names[0] != names[1] and all(len(name) == 100 for name in names)
    assert (
        run_name({"sources": "medqa+mine", "sizes": 1200, "levels": (1, 2), "seeds": 3}, ControlKind.UNCHANGED)
        == "medqa.mine-n1200-l1.2-s3-unchanged"
    )
    assert (
        run_name({"sources": "a", "sizes": "all", "levels": "all", "data.shuffle_options": False}, None)
        == "a-shuffleoptionsfalse"
    )


@pytest.mark.parametrize(
    "tree, words",
    [
        ({"grids": []}, ["grids"]),
        ({"gird": 1}, ["gird: unknown key", "did you mean 'grids'?"]),
        ({"base": "nowhere.yaml"}, ["nowhere.yaml", "no such file"]),
        ({"grids": [{"name": "a"}, {"name": "a"}]}, ["grids: a is listed twice"]),
        (
            {"grids": [{"name": "a", "axes": {"settings": {"optimizer.lrr": [1]}}}]},
            ["grids.a: run lrr1-s5", "optimizer.lrr: unknown key; did you mean 'lr'?"],
        ),
        (
            {"grids": [{"name": "a", "axes": {"settings": {"optimizer.lr": [1e-5, -1]}}}]},
            ["run lr-1-s5", "optimizer.lr: -1"],
        ),
        ({"grids": [{"name": "a", "axes": {"seeds": [1, 1]}}]}, ["grids.a.axes.seeds: 1 is listed twice"]),
        ({"grids": [{"name": "a", "axes": {"sizes": [10]}}]}, ["grids.a.axes.sizes: needs data"]),
        ({"settings": {"run.seed": 3}}, ["run.seed is the axis seeds"]),
        ({"grids": [{"name": "a", "settings": {"run.name": "x"}}]}, ["grids.a.settings: run.name is set by the study"]),
        ({"grids": [{"name": "a", "controls": ["randm"]}]}, ["grids.0.controls.0", "'randm'"]),
        ({"settings": {"reward.name": "corect"}}, ["did you mean 'correct'?"]),
        ({"data": {}}, ["grids.g.axes.sources: missing"]),
        ({"data": {}, "grids": [{"name": "g", "axes": {"sources": ["owm"]}}]}, ["'owm' is not known", "medqa"]),
        (
            {"data": {"recipe": {"seed": 1}}, "grids": [{"name": "g", "axes": {"sources": ["medqa"]}}]},
            ["error: data.recipe: seed is set by the axes"],
        ),
        (
            {"data": {"recipe": {"fliter": {}}}, "grids": [{"name": "g", "axes": {"sources": ["medqa"]}}]},
            ["fliter", "'filter'"],
        ),
        (
            {"data": OWN, "grids": [{"name": "g", "axes": {"sources": ["own+more"], "sizes": [11]}}]},
            ["11 cannot be divided evenly among 2 sources; choose a multiple of 2"],
        ),
        (
            {"data": OWN | {"per_level": True}, "grids": [{"name": "g", "axes": {"sources": ["own"], "sizes": [10]}}]},
            ["10 cannot be divided evenly among 1 source x 6 levels; choose a multiple of 6"],
        ),
        (
            {
                "data": {"sources": [{"name": "own", "path": "absent.jsonl"}]},
                "grids": [{"name": "g", "axes": {"sources": ["own"]}}],
            },
            ["absent.jsonl: no such file"],
        ),
        (
            {
                "data": {"sources": [{"name": "own", "path": "questions.jsonl", "levels": "absent.jsonl"}]},
                "grids": [{"name": "g", "axes": {"sources": ["own"]}}],
            },
            ["absent.jsonl: no such file of levels"],
        ),
        ({"data": OWN, "grids": [{"name": "g", "axes": {"sources": ["own"], "levels": [[7]]}}]}, ["levels", "7"]),
        (
            own_axes() | {"data": OWN | {"recipe": {"decisions": ["absent.json"]}}},
            ["data.recipe.decisions: absent.json: no such file"],
        ),
        (
            own_axes() | {"data": OWN | {"recipe": {"against": ["medqb"]}}},
            ["data.recipe: benchmark 'medqb' is neither known"],
        ),
        (own_axes() | {"data": OWN | {"recipe": {"against": ["medqa=absent"]}}}, ["data.recipe: ", "absent"]),
        # what the study sets itself, however it is written
        (
            own_axes(settings={"data.train": [["x.jsonl"], ["y.jsonl"]]}),
            ["grids.g.axes.settings: data.train is set by data; use the axis sources"],
        ),
        (
            own_axes(settings={"data": [{"train": ["x.jsonl"]}, {"train": ["y.jsonl"]}]}),
            ["axes.settings: data.train is set"],
        ),
        (own_axes() | {"settings": {"data.train": ["x.jsonl"]}}, ["settings: data.train is set by data"]),
        (
            {
                "data": OWN,
                "grids": [{"name": "g", "axes": {"sources": ["own"]}, "settings": {"data": {"train": ["x.jsonl"]}}}],
            },
            ["grids.g.settings: data.train is set by data"],
        ),
        ({"settings": {"run": {"seed": 3}}}, ["settings: run.seed is the axis seeds"]),
        ({"settings": {"run": {"steps": 3, "root": "r"}}}, ["settings: run.root is set by the study; use root"]),
        (
            {"grids": [{"name": "a", "axes": {"settings": {"optimizer": [{"lr": 1e-6}], "optimizer.lr": [1e-5]}}}]},
            ["grids.a.axes.settings: optimizer holds optimizer.lr, another axis"],
        ),
        # one condition under two names
        (
            own_axes(informativeness=[[3, 4], [4, 3]]),
            ["axes.informativeness: [4, 3] is [3, 4] in another order; give each value once"],
        ),
        (own_axes(informativeness=[[1, 1], [1]]), ["axes.informativeness: [1, 1] names a part twice"]),
        (own_axes(levels=[[1, 2], "all", [2, 1]]), ["axes.levels: [2, 1] is [1, 2] in another order"]),
        (own_axes(sources=["own+more", "more+own"]), ['axes.sources: "more+own" is "own+more" in another order']),
        (own_axes(sources=["own+own"]), ['axes.sources: "own+own" names a part twice']),
        *(
            (own_axes(**{axis: []}), [f"axes.{axis}: [] leaves no value to run; give at least one, or remove the axis"])
            for axis in ("seeds", "sizes", "levels", "informativeness", "sources")
        ),
        (own_axes(sizes=[10, 10]), ["axes.sizes: 10 is listed twice"]),
        (
            {
                "data": OWN,
                "grids": [
                    {"name": name, "axes": {"sources": ["own"], "levels": levels}}
                    for name, levels in (("a", [[1, 2]]), ("b", [[2, 1]]))
                ],
            },
            ["grids.b.axes.levels: [2, 1] is [1, 2] in another order; write it as grids.a does"],
        ),
        (
            {"grids": [{"name": "a", "axes": {"settings": {"run.steps": [4, 4.0]}}}]},
            ["grids.a: steps4.0-s5 and steps4-s5 are one run under two names; give each value once"],
        ),
        (
            {"grids": [{"name": "a"}, {"name": "b", "axes": {"settings": {"run.steps": [8]}}}]},
            ["grids.b: steps8-s5 and s5 are one run under two names"],
        ),
        # what would be refused only when the sets are made, or would take one thing for another
        (
            {"data": {"medfacts": {"categories": ["nope"]}}, "grids": [{"name": "g", "axes": {"sources": ["medfacts"]}}]},
            ["data.medfacts: category ['nope'] unknown; choose from"],
        ),
        (
            {"data": {"medfacts": {"facts": 3}}, "grids": [{"name": "g", "axes": {"sources": ["medfacts"]}}]},
            ["data.medfacts: facts: 3 make no question with 4 options; give 4 or more"],
        ),
        (
            {"data": {"medfacts": {"levels": []}}, "grids": [{"name": "g", "axes": {"sources": ["medfacts"]}}]},
            ["data.medfacts.levels: "],
        ),
        (
            {
                "data": {"medfacts": {}, "sources": [{"name": "medfacts", "path": "questions.jsonl"}]},
                "grids": [{"name": "g", "axes": {"sources": ["medfacts"]}}],
            },
            ["error: data.sources: medfacts is the name of the shipped questions"],
        ),
        (
            {
                "data": {"sources": [{"name": "alphamed19k", "path": "questions.jsonl"}]},
                "grids": [{"name": "g", "axes": {"sources": ["alphamed19k"]}}],
            },
            ["error: data.sources: alphamed19k is the name of a preset"],
        ),
        (
            {"data": {"sources": [OWN["sources"][0]] * 2}, "grids": [{"name": "g", "axes": {"sources": ["own"]}}]},
            ["error: data.sources: own is listed twice"],
        ),
        (
            own_axes(recipe={"filter": {"informativeness": [2]}}, informativeness=["all", [1]]),
            ["data.recipe.filter.informativeness: [2] and grids.g.axes.informativeness both choose questions"],
        ),
        (
            own_axes(recipe={"filter": {"levels": [2]}}, levels=[[1]]),
            ["data.recipe.filter.levels: [2] and grids.g.axes.levels"],
        ),
        (own_axes(recipe={"filter": 3}, levels=[[1]]), ["error: data.recipe.filter: 3 is not valid; it is a section"]),
        (
            {"slurm": {"options": ["--partition=gpu\ncurl x | sh"]}},
            ["error: slurm.options: '--partition=gpu\\ncurl x | sh' holds a line"],
        ),
        ({"root": "studies\nrm -r x"}, ["root: 'studies\\nrm -r x' holds a line break"]),
        (
            {"settings": {"evaluation": 3}},
            ["settings: evaluation: 3 is not valid; it is a section with settings of its own"],
        ),
    ],
)
def test_a_bad_study_is_refused_in_one_line(write, capfd, tree, words):
    refused(capfd, write(**tree), *words)


@pytest.mark.parametrize("section", ["run", "evaluation", "data"])
def test_a_base_whose_section_is_a_number_is_refused_in_one_line(write, capfd, section):
    path = write()
    (path.parent / "base.yaml").write_text(yaml.safe_dump(BASE | {section: 3}))
    refused(capfd, path, f"base.yaml: {section}: 3 is not valid; it is a section with settings of its own")


# ---------------------------------------------------------------------------------------------------------------- the data
def test_sets_are_drawn_by_source_size_level_and_seed(write):
    path = write(
        data={"sources": [OWN["sources"][0]], "per_level": True},
        grids=[{"name": "g", "axes": {"sources": ["own"], "sizes": [12], "levels": ["all", [2, 5]], "seeds": [1, 2]}}],
    )
    study = load_study(path)
    planned = plan_runs(study)
    made = make_sets(study, planned, "test")
    assert len(made) == 4 and [run.config.data.train for run in planned] == [(file,) for file in made]
    levels = [sorted(json.loads(line)["level"] for line in file.read_text().splitlines()) for file in made]
    assert levels == [[1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]] * 2 + [[2] * 6 + [5] * 6] * 2
    sets = [{json.loads(line)["id"] for line in file.read_text().splitlines()} for file in made]
    assert sets[0] != sets[1]
    assert make_sets(study, planned, "test") == []  # once is enough
    made[0].write_text("{}\n")
    assert make_sets(study, planned, "test") == [made[0]]  # not what its card says


def test_a_set_is_made_again_where_a_file_of_its_recipe_has_changed(write):
    Path("levels.jsonl").write_text("".join(json.dumps({"id": f"q{i}", "level": 1 + i % 2}) + "\n" for i in range(60)))
    data = {"sources": [{"name": "own", "path": "questions.jsonl", "levels": "levels.jsonl"}]}
    study = load_study(write(data=data, grids=[{"name": "g", "axes": {"sources": ["own"], "levels": [[2]]}}]))
    (run,) = plan_runs(study)
    assert make_sets(study, [run], "test") == [run.training_set.file] and make_sets(study, [run], "test") == []
    Path("levels.jsonl").write_text("".join(json.dumps({"id": f"q{i}", "level": 1 + (i < 10)}) + "\n" for i in range(60)))
    assert make_sets(study, [run], "test") == [run.training_set.file]
    assert len(run.training_set.file.read_text().splitlines()) == 10


def test_a_set_that_cannot_be_made_names_its_run_and_leaves_no_other(write, capfd):
    """60 questions, ten of each level: a set of 12 of level 2 cannot be drawn, that of ten can, and is made first."""
    path = write(
        data={"sources": [OWN["sources"][0]], "medfacts": {"facts": 4}},
        grids=[{"name": "g", "axes": {"sources": ["own"], "sizes": [10, 12], "levels": [[2]], "seeds": [1]}}],
    )
    assert main(["study", str(path)]) == 2
    message = capfd.readouterr().err
    assert message.startswith("error: run own-n12-l2-s1: ") and message.count("\n") == 1, message
    assert not Path("studies/s/data").exists()
    # sets of an earlier start stay
    (first,) = runs(
        other := write(
            data={"sources": [OWN["sources"][0]]},
            grids=[{"name": "g", "axes": {"sources": ["own"], "sizes": [10], "levels": [[2]], "seeds": [1]}}],
        )
    )
    assert make_sets(load_study(other), [first], "test") == [first.training_set.file]
    path = write(
        data={"sources": [OWN["sources"][0]], "medfacts": {"facts": 4}},
        grids=[{"name": "g", "axes": {"sources": ["own"], "sizes": [10, 12], "levels": [[2]], "seeds": [1]}}],
    )
    assert main(["study", str(path)]) == 2
    assert sorted(Path("studies/s/data").iterdir()) == sorted(build.files_of(first.training_set.file))
    # and so does one that is made again, because its card is damaged: a run may have been trained on it
    before = first.training_set.file.read_bytes()
    build.card_path(first.training_set.file).write_text("{")
    assert main(["study", str(path)]) == 2 and first.training_set.file.read_bytes() == before


def test_another_recipe_is_another_file(write):
    grids = [{"name": "g", "axes": {"sources": ["own"], "sizes": [10]}}]
    (first,) = runs(write(data=OWN, grids=grids))
    (other,) = runs(write(data=OWN | {"recipe": {"drop_repeats": True}}, grids=grids))
    assert first.name == other.name and first.training_set.file != other.training_set.file


# ---------------------------------------------------------------------------------------------------------------- running
TRAIN = '''
"""Stands in for `alphamed train` and `compare`: records its arguments, then does what the file `behaviour` says."""
import json, sys, time, yaml
from pathlib import Path
verb, config = sys.argv[1], None
with open("commands", "a") as commands:
    print(*sys.argv[1:], file=commands)
if verb == "compare":
    Path(sys.argv[-1]).write_text(" ".join(Path(name).name for name in sys.argv[2:-2]))
    sys.exit()
tree = yaml.safe_load(Path(sys.argv[3]).read_text())
behaviour = json.loads(Path("behaviour").read_text()).get(tree["run"]["name"], "good")
run_dir = Path(tree["run"]["root"]) / tree["run"]["name"]
if behaviour == "bad":
    print("Traceback ...")
    print("run failed: engine 0: was killed by signal 9 (SIGKILL)")
    sys.exit(1)
if behaviour == "slow":
    time.sleep(3000)
(run_dir / "config.yaml").write_text(Path(sys.argv[3]).read_text())
(run_dir / "finished.json").write_text(json.dumps({"step": tree["run"]["steps"]}) if behaviour == "good" else "{")
'''


@pytest.fixture
def trained(write, monkeypatch, tmp_path):
    """A study of three runs with a substitute for training; returns (study file, set behaviour, runs started since the last call)."""
    (tmp_path / "train.py").write_text(TRAIN)
    monkeypatch.setattr(child, "alphamed", lambda *words: [sys.executable, str(tmp_path / "train.py"), *words])
    path = write(deadline_s=1980, grids=[{"name": "g", "axes": {"seeds": [1, 2, 3]}}])

    def behave(**behaviour) -> None:
        (tmp_path / "behaviour").write_text(json.dumps(behaviour))

    def started() -> list[str]:
        log = tmp_path / "commands"
        words = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
        log.unlink(missing_ok=True)
        return [Path(line[2]).stem for line in words if line[0] == "train"]

    behave()
    return path, behave, started


def test_a_failing_run_is_named_and_the_others_go_on(trained, capfd):
    path, behave, started = trained
    behave(s2="bad")
    assert main(["study", str(path)]) == 1
    printed = capfd.readouterr()
    assert started() == ["s1", "s2", "s3"]
    assert "run s2 failed: engine 0: was killed by signal 9 (SIGKILL)" in printed.err
    assert printed.err.splitlines()[-1] == (
        f"study s: 1 of 3 runs are not finished; `alphamed study {path}` continues them here, "
        f"`alphamed study {path} --slurm` writes their scripts"
    )
    assert Path("studies/s/comparison.html").read_text() == "s1 s3"
    rows = list(csv.DictReader(Path("studies/s/results.csv").open()))
    assert [(row["run"], row["status"], row["axis:seeds"]) for row in rows] == [
        ("s1", "finished", "1"),
        ("s2", "new", "2"),
        ("s3", "finished", "3"),
    ]
    assert json.loads(Path("studies/s/runs/s3/study.json").read_text()) == {
        "study": "s",
        "grids": ["g"],
        "axes": {"seeds": 3},
        "control": None,
    }
    assert load_config("studies/s/configs/s3.yaml").run.seed == 3


def test_what_is_finished_is_not_run_again(trained, capfd):
    path, behave, started = trained
    behave(s2="bad")
    main(["study", str(path)])
    started()
    behave()
    assert main(["study", str(path)]) == 0
    assert started() == ["s2"]
    assert main(["study", str(path)]) == 0
    assert started() == []


def test_collecting_starts_nothing_and_lists_unfinished_runs(trained, capfd):
    path, behave, started = trained
    behave(s2="bad", s3="damages")
    main(["study", str(path)])
    started(), capfd.readouterr()
    behave()
    Path("studies/s/comparison.html").unlink()
    assert main(["study", str(path), "--collect"]) == 1
    printed = capfd.readouterr()
    assert started() == [] and Path("studies/s/comparison.html").read_text() == "s1"
    assert printed.err.splitlines() == [
        "run s2 is not finished: it has not started",
        "run s3 failed: studies/s/runs/s3/finished.json: not readable (JSONDecodeError); remove it, and the run is continued",
        f"study s: 2 of 3 runs are not finished; `alphamed study {path}` continues them here, "
        f"`alphamed study {path} --slurm` writes their scripts",
    ]
    Path("studies/s/runs/s3/finished.json").unlink()
    assert main(["study", str(path)]) == 0  # what the line promises
    assert started() == ["s2", "s3"]


def test_scores_of_other_settings_are_not_collected(trained, capfd):
    path, _, _ = trained
    main(["study", str(path)])
    tree = yaml.safe_load(path.read_text()) | {"settings": {"optimizer.lr": 1e-3}}
    path.write_text(yaml.safe_dump(tree))
    scores = Path("studies/s/runs/s1/evaluations/step_000000.json")
    scores.parent.mkdir()
    scores.write_text("{}")  # reading it would fail
    assert main(["study", str(path), "--collect"]) == 1
    assert (
        "run s1 failed: optimizer.lr: 0.001 but the run in studies/s/runs/s1 was started with 1e-06"
        in capfd.readouterr().err
    )
    assert {row["status"] for row in json.loads(Path("studies/s/results.json").read_text())} == {"interrupted"}


def test_a_study_is_run_once_at_a_time(trained, capfd):
    path, _, started = trained
    Path("studies/s").mkdir(parents=True)
    holder = Lock(Path("studies/s"))
    holder.take()
    assert main(["study", str(path)]) == 2
    assert "studies/s: already running (pid" in capfd.readouterr().err and started() == []
    holder.release()


def test_a_run_made_with_other_settings_is_refused(trained, capfd):
    path, behave, started = trained
    assert main(["study", str(path)]) == 0
    started()
    tree = yaml.safe_load(path.read_text()) | {"settings": {"optimizer.lr": 1e-3}}
    path.write_text(yaml.safe_dump(tree))
    assert main(["study", str(path)]) == 2
    assert "run s1: optimizer.lr: 0.001 but the run in studies/s/runs/s1 was started with 1e-06" in capfd.readouterr().err
    assert started() == []


def test_a_damaged_run_does_not_end_the_study(trained, capfd):
    path, behave, started = trained
    behave(s1="damages")
    assert main(["study", str(path)]) == 1
    printed = capfd.readouterr()
    assert started() == ["s1", "s2", "s3"] and "run s1 failed: studies/s/runs/s1/finished.json: not readable" in printed.err
    assert main(["study", str(path)]) == 2  # what stands there now is refused at once
    assert started() == []


def test_a_run_past_its_deadline_is_stopped(trained, capfd, monkeypatch):
    path, behave, started = trained
    behave(s1="slow")
    path.write_text(path.read_text().replace("deadline_s: 1980", "deadline_s: 8"))
    assert main(["study", str(path)]) == 1
    assert "run s1 failed: took longer than deadline_s (8 s)" in capfd.readouterr().err
    assert {"s1", "s2", "s3"} == set(started())


def test_a_stopped_study_stops_its_run_and_goes_on_later(trained, capfd):
    path, behave, started = trained
    behave(s1="slow")
    log = Path("studies/s/logs/s1.log")

    def stop():
        until(log.exists, "the first run's log")
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    assert main(["study", str(path)]) == 128 + signal.SIGTERM
    assert "stopped; the same command continues from here" in capfd.readouterr().err
    started()
    behave()
    assert main(["study", str(path)]) == 0
    assert started() == ["s1", "s2", "s3"]


def test_a_real_training_that_cannot_start_is_named(write, capfd):
    """The child is the real `alphamed train`: the model does not exist."""
    assert main(["study", str(write())]) == 1
    assert "run s5 failed: model.path: 'no-such-model'" in capfd.readouterr().err


@pytest.mark.parametrize(
    "text, status, why",
    [
        ("=== started 1\nrun failed: old\n=== started 2\nstep 1\nrun failed: rank 0: died\n", 1, "rank 0: died"),
        ("=== started 1\nstep 1\nerror: x: bad\nlater words\n", 2, "x: bad"),
        ("=== started 1\n\nSegmentation fault\n", -11, "ended with signal SIGSEGV; its last line: Segmentation fault"),
        ("=== started 1\n", 3, "ended with exit code 3"),
    ],
)
def test_reasons(tmp_path, text, status, why):
    (tmp_path / "log").write_text(text)
    assert child.reason(tmp_path / "log", status) == why


# ------------------------------------------------------------------------------------------------------------------- slurm
def test_slurm_scripts_are_bash_that_submits_every_unfinished_run(trained, tmp_path, monkeypatch, capfd):
    """Submitted with an sbatch that notes its arguments: ids chain into the last job's dependency."""
    path, behave, started = trained
    behave(s2="bad", s3="bad")
    main(["study", str(path)])
    assert main(["study", str(path), "--slurm"]) == 0
    scripts = sorted(Path("studies/s/slurm").iterdir())
    assert [file.name for file in scripts] == ["s2.sbatch", "s3.sbatch", "submit.sh"]
    for file in scripts:
        subprocess.run(["bash", "-n", str(file)], check=True)
    text = scripts[0].read_text()
    assert "#SBATCH --job-name=s2\n#SBATCH --nodes=1\n" in text and "--gpus-per-node" not in text  # the base is on CPU
    assert "#SBATCH --time=33\n" in text and "#SBATCH --output=studies/s/logs/s2.log\n" in text
    assert text.splitlines()[-1] == f"exec bash {ROOT / 'examples/slurm/train.sbatch'} studies/s/configs/s2.yaml"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text('#!/bin/bash\necho "$@" >> submitted\necho "$(wc -l < submitted);cluster"\n')
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    subprocess.run(["bash", str(scripts[2])], check=True, env={"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"})
    lines = Path("submitted").read_text().splitlines()
    assert lines[:2] == ["--parsable studies/s/slurm/s2.sbatch", "--parsable studies/s/slurm/s3.sbatch"]
    assert lines[2].startswith("--dependency=afterany:1:2 ") and "study" in lines[2] and "--collect" in lines[2]


@pytest.mark.parametrize("tensor, engines, nodes", [(4, 4, 1), (8, 8, 2), (8, 9, 3)])
def test_nodes(write, tensor, engines, nodes):
    """8 GPUs a node: 4 + 4 share one; 8 + 8 take two; nine engines need two of their own."""
    (config,) = [
        run.config
        for run in runs(write(settings={"cluster.device": "cuda", "parallel.tensor": tensor, "rollout.engines": engines}))
    ]
    assert slurm.nodes_of(config, 8) == nodes


# -------------------------------------------------------------------------------------------------------------- supervised
STAGES = [
    {"name": "a", "label": "taught", "train": ["{study}/examples.jsonl"], "axes": {"seeds": [1, 2]}, "settings": {"sft": {"epochs": 2}}},
    {"name": "b", "label": "then", "axes": {"seeds": [1]}, "settings": {"model.path": "{study}/runs/taught-s2/hf"}},
    {"name": "c", "axes": {"seeds": [1]}},
]  # fmt: skip


def test_arms_of_supervised_training(write, monkeypatch, capsys):
    """Supervised runs train on their own files and are started by their own verb, also where sets are built for the others."""
    path = write(grids=STAGES)
    planned = runs(path)
    assert [run.name for run in planned] == ["taught-s1", "taught-s2", "then-s1", "s1"]
    assert [str(file) for file in planned[1].config.data.train] == ["studies/s/examples.jsonl"]
    assert planned[1].config.sft.epochs == 2 and planned[2].config.sft is None
    assert planned[2].config.model.path == "studies/s/runs/taught-s2/hf"
    asked = []
    monkeypatch.setattr(
        child, "run_child", lambda command, *_: asked.append(command[3:]) or child.ChildExit(1, 0.0, "tried")
    )
    assert main(["study", str(path)]) == 1
    assert [command[0] for command in asked] == ["sft", "sft", "train", "train"]
    assert "taught-s1  2 epochs of 32 prompts, supervised: new" in capsys.readouterr().out
    data = {"sources": [{"name": "mine", "path": "questions.jsonl", "licence": "CC0"}]}
    built = [*STAGES[:1], STAGES[2] | {"axes": {"seeds": [1], "sources": ["mine"]}}]
    planned = runs(write(grids=built, data=data))
    assert [(run.name, run.training_set is None) for run in planned] == [
        ("taught-s1", True),
        ("taught-s2", True),
        ("mine-s1", False),
    ]


def test_files_and_sets_are_not_both_what_a_grid_trains_on(write, capsys):
    grid = STAGES[0] | {"axes": {"sources": ["mine"]}}
    data = {"sources": [{"name": "mine", "path": "questions.jsonl", "licence": "CC0"}]}
    assert main(["study", str(write(grids=[grid], data=data)), "--dry-run"]) == 2
    assert "grids.a.train: and axes.sources both say what its runs train on" in capsys.readouterr().err


def test_a_run_waits_for_the_one_whose_export_it_starts_from(write, tmp_path):
    path = write(grids=STAGES)
    planned = runs(path)
    found = slurm.scripts(load_study(path), path, planned, {run.name: Path(f"{run.name}.yaml") for run in planned})
    (tmp_path / "submit.sh").write_text(found[Path("studies/s/slurm/submit.sh")])
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text('#!/bin/bash\necho "$@" >> submitted\necho "$(wc -l < submitted);cluster"\n')
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    subprocess.run(["bash", "submit.sh"], check=True, env={"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"})
    lines = Path("submitted").read_text().splitlines()
    assert lines[1] == "--parsable studies/s/slurm/taught-s2.sbatch"
    assert lines[2] == "--parsable --dependency=afterok:2 --kill-on-invalid-dep=yes studies/s/slurm/then-s1.sbatch"
    assert lines[4].startswith("--dependency=afterany:1:2:3:4 ")


# ----------------------------------------------------------------------------------------------------------------- shipped
@pytest.mark.parametrize("name, count", [("cpu", 3 + 12), ("paper", 1 + 3 + 3 + 3 + 10 + 9 + 9 + 27 - 6 + 66)])
def test_shipped_studies_are_valid(name, count, monkeypatch):
    """cpu: 3 seeds of the questions and of each control. paper: the base asked directly, 3 supervised runs, 3 of RL from one of
    them; 3 seeds of the mixture and 10 controls; 9 subsets and 9 controls; 27 of quantity; 66 of difficulty."""
    monkeypatch.chdir(ROOT)
    planned = runs(ROOT / "examples" / "studies" / f"{name}.yaml")
    assert len({run.name for run in planned}) == len(planned)
    assert all((run.training_set is None) == (run.config.sft is not None) for run in planned)
    assert {run.control for run in planned} == {None, *ControlKind}


def test_the_shipped_small_study_finds_its_questions(tmp_path, monkeypatch):
    """Its sets are built from the shipped facts, twelve of them twenty times each, and share no question with its exam."""
    monkeypatch.chdir(tmp_path)
    study = load_study(ROOT / "examples" / "studies" / "cpu.yaml")
    planned = plan_runs(study)
    make_sets(study, planned, "test")
    exam = {json.loads(line)["question"] for line in planned[0].config.evaluation.files[0].read_text().splitlines()}
    for run in planned:
        rows = [json.loads(line) for line in run.config.data.train[0].read_text().splitlines()]
        assert set(Counter(row["options"][row["answer"]] for row in rows).values()) == {20} and len(rows) == 240
        assert not exam & {row["question"] for row in rows}
    assert len(planned[0].config.evaluation.files[0].read_text().splitlines()) >= 200
