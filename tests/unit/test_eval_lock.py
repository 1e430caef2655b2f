"""Two starts on one folder at once: the second is refused before it has changed a byte. What is cheap is checked first."""

import contextlib
import threading

import pytest
from test_difficulty import annotate, engines, rows, write  # noqa: F401                   engines is a fixture
from test_eval_command import evaluate, items, model, questions, results, script  # noqa: F401    model is a fixture
from waiting import LIMIT_S

from alphamed import cli
from alphamed.cluster.ledger import Lock
from alphamed.errors import ConfigError
from alphamed.evaluation import answers, benchmarks


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_second_evaluation_on_the_same_folder_changes_nothing(tmp_path, model, monkeypatch, capsys):
    """It comes while the first is asking its second question: with other questions, with the same, and to regrade."""
    out, first, second = tmp_path / "out", questions(tmp_path), questions(tmp_path, "f.jsonl")
    starts = [
        lambda: evaluate(model, out, "--benchmarks", second),
        lambda: evaluate(model, out, "--benchmarks", first),
        lambda: cli.main(["eval", "--regrade", str(out)]),
    ]
    found = []

    def says(question, j):
        if question.id == "q1":
            before = contents(out)
            found.extend((start(), contents(out) == before) for start in starts)
        return "\\boxed{A}"

    asked = script(monkeypatch, says)
    assert evaluate(model, out, "--benchmarks", first) == 0
    assert found == [(2, True)] * 3
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert [line.split(" (pid ")[0] for line in told] == [
        f"error: {option}: {out}: already running" for option in ("--out", "--out", "--regrade")
    ]
    assert all(line.endswith("wait for its end, end it, or choose another folder") for line in told)
    assert len(asked.tasks) == 4 == len(items(out)) and list(results(out)["benchmarks"]) == ["e"]
    script(monkeypatch, lambda question, j: "\\boxed{A}")
    assert evaluate(model, out, "--benchmarks", second) == 0  # the folder is free again
    assert list(results(out)["benchmarks"]) == ["e", "f"]


def test_a_folder_is_free_again_after_a_kill(tmp_path, model, monkeypatch):
    script(monkeypatch, lambda question, j: "\\boxed{A}", dies_after=2)
    assert evaluate(model, tmp_path / "out", "--benchmarks", questions(tmp_path)) == 130
    script(monkeypatch, lambda question, j: "\\boxed{A}")
    assert evaluate(model, tmp_path / "out", "--benchmarks", questions(tmp_path)) == 0


def test_a_folder_that_can_not_be_made_is_one_line(tmp_path, model, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    script(monkeypatch, lambda question, j: "never")
    assert evaluate(model, tmp_path / "file" / "out", "--benchmarks", questions(tmp_path)) == 2
    told = capsys.readouterr().err
    assert (
        told.startswith(f"error: --out: {tmp_path / 'file' / 'out'} cannot be made or written (") and told.count("\n") == 1
    )


def test_difficulty_of_one_shard_runs_once_at_a_time(tmp_path, model, engines, monkeypatch, capsys):
    """The second start of the same shard changes nothing; one of the other shard goes its way meanwhile."""
    write("q.jsonl", rows(6))
    inner, found, work = answers.answering, [], tmp_path / "out.jsonl.work"

    @contextlib.contextmanager
    def answering(config, prompted):
        monkeypatch.setattr(answers, "answering", inner)
        before = contents(work)
        found.append((annotate(model, "--shard", "1/2"), contents(work) == before))
        found.append(annotate(model, "--shard", "2/2"))
        with inner(config, prompted) as answer:
            yield answer

    monkeypatch.setattr(answers, "answering", answering)
    assert annotate(model, "--shard", "1/2") == 0
    assert found == [(2, True), 0]
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and told[0].startswith("error: --out: out.jsonl.work/shard-1-of-2: already running (pid ")
    asked, _ = engines
    assert sorted(task.question.id for task in asked) == [f"q{i}" for i in range(6)]
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 6


def test_a_lock_that_is_soon_let_go_is_waited_for(tmp_path):
    holder, other = Lock(tmp_path), Lock(tmp_path, "--out:", "choose another folder")
    holder.take()
    with pytest.raises(ConfigError, match="already running"):
        other.take(wait_s=0.1)
    threading.Timer(0.3, holder.release).start()
    other.take(wait_s=LIMIT_S)
    other.release()


# ------------------------------------------------------------------------------------------------------ what comes first
@pytest.mark.parametrize(
    "folder, names, message",
    [
        ("nope", ["medqa"], "model.path: 'nope': no such folder"),
        ("empty", ["medqa"], "/empty': holds no config.json"),
        (None, ["medqa", "medqaa"], "benchmark 'medqaa' is neither known"),
        (None, ["medqa", "absent.jsonl"], "absent.jsonl: no such file"),
        (None, ["medqa", "pubmedqa=absent"], "absent: no such file or folder"),
        (None, ["medqa", "nope=e.jsonl"], "benchmark 'nope' is not known"),
    ],
)
def test_nothing_is_fetched_for_what_can_not_be_done(tmp_path, model, monkeypatch, capsys, folder, names, message):
    def fetched(*_):
        raise AssertionError("the hub was asked")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmarks, "read_upstream", fetched)
    (tmp_path / "empty").mkdir()
    script(monkeypatch, lambda question, j: "never")
    assert evaluate(folder or model, tmp_path / "out", "--benchmarks", *names) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and message in told and told.count("\n") == 1 and not (tmp_path / "out").exists()
