"""Where `alphamed data` and `alphamed plan` write: never over what they read, nor two things into one file."""

import json
from pathlib import Path

import pytest
from test_data_cli import files, here, row, write  # noqa: F401 (here: a fixture)

from alphamed.cli import main
from alphamed.data.output import check_places
from alphamed.errors import ConfigError

BUILD = ["build", "--from", "a.jsonl", "--against", "bench.jsonl"]
CLEAN = ["decontaminate", "--train", "a.jsonl", "--against", "bench.jsonl"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["inspect", "a.jsonl", "--out", "a.jsonl"], "--out: a.jsonl is what FILE reads"),
        (["inspect", "a.jsonl", "--out", "./x/../a.jsonl"], "--out: x/../a.jsonl is what FILE reads"),
        (["inspect", "a.jsonl", "--out", "x.json"], "the numbers: x.json is what --out writes"),
        (["inspect", "a.jsonl", "--out", ""], "--out: '.' is not a file that can be written"),
        (["inspect", ""], "'.' is not a file that can be written"),
        ([*CLEAN, "--out", "x.jsonl", "--report", "x.jsonl"], "--report: x.jsonl is what --out writes"),
        ([*CLEAN, "--out", "a.jsonl", "--report", "r.json"], "--out: a.jsonl is what --train reads"),
        ([*CLEAN, "--out", "s.jsonl", "--report", "bench.jsonl"], "--report: bench.jsonl is what --against reads"),
        ([*CLEAN, "--out", "s.txt", "--report", "r.json"], "--out: 's.txt' ends neither in"),
        ([*BUILD, "--out", "a.jsonl"], "--out: a.jsonl is what a source reads"),
        ([*BUILD, "--out", "bench.jsonl"], "--out: bench.jsonl is what against reads"),
        (
            [*BUILD, "--out", "levels.jsonl", "sources=[{name: a, path: a.jsonl, levels: levels.jsonl}]"],
            "--out: levels.jsonl is what levels reads",
        ),
        ([*BUILD, "--out", "d.jsonl", "--decisions", "d.card.json"], "the card: d.card.json is what decisions reads"),
        (["build", "--config", "c.card.json", "--out", "c.jsonl"], "the card: c.card.json is what --config reads"),
        (["build", "--from", "medqa=copy", "--out", "copy/s.jsonl"], "--out: copy/s.jsonl is in copy, which a source reads"),
        (["build", "--from", "a.jsonl", "--out", ""], "--out: '.' is not a file that can be written"),
        (["suspects", "--questions", "a.jsonl", "--out", "a.jsonl"], "--out: a.jsonl is what --questions reads"),
        (
            ["suspects", "--questions", "a.jsonl", "--items", "bench.jsonl", "--out", "bench.jsonl"],
            "--out: bench.jsonl is what --items reads",
        ),
        (
            ["difficulty", "--questions", "a.jsonl", "--model", "m", "--out", "a.jsonl"],
            "--out: a.jsonl is what --questions reads",
        ),
    ],
)
def test_nothing_is_written_over_what_is_read_or_written(capsys, arguments, words):
    write("a.jsonl", [row(i) for i in range(3)])
    write("bench.jsonl", [row(50)])
    write("levels.jsonl", [{"id": "q0", "level": 1}])
    write("d.card.json", [{"version": 1, "decisions": []}])
    Path("c.card.json").write_text(json.dumps({"sources": [{"name": "a", "path": "a.jsonl"}]}))
    Path("copy").mkdir()
    Path("x").mkdir()
    before = {name: Path(name).read_bytes() for name in files() if Path(name).is_file()}
    assert main(["data", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and words in captured.err
    assert {name: Path(name).read_bytes() for name in files() if Path(name).is_file()} == before


def test_a_plan_is_not_written_over_its_configuration_nor_twice_into_one_file(capsys):
    Path("c.yaml").write_text("not: read\n")
    for arguments, words in (
        (["--json", "c.yaml"], "--json: c.yaml is what --config reads"),
        (["--html", "p", "--json", "p"], "--html: p is what --json writes"),
    ):
        assert main(["plan", "--config", "c.yaml", *arguments]) == 2
        assert words in capsys.readouterr().err
    assert files() == ["c.yaml"] and Path("c.yaml").read_text() == "not: read\n"
    for field, setting in (("data.train", "data.train=[a.json]"), ("evaluation.files", "evaluation.files=[a.json]")):
        Path("c.yaml").write_text("model: {path: m}\ndata: {train: [b.jsonl]}\n")
        assert main(["plan", "--config", "c.yaml", "--json", "a.json", setting]) == 2
        assert f"--json: a.json is what {field} reads" in capsys.readouterr().err


def test_a_link_is_the_file_it_leads_to():
    Path("a").write_text("")
    Path("b").symlink_to("a")
    with pytest.raises(ConfigError, match="--out: b is what --in reads; choose another file"):
        check_places({"--out": Path("b")}, {"--in": [Path("a")]}, overwrite=True)
    check_places({"--out": Path("c"), "--more": None}, {"--in": [Path("a"), None]}, overwrite=False)


# ------------------------------------------------------------------------------------------------- two of one name
def two_folders():
    for folder, number in (("d1", 1), ("d2", 2)):
        Path(folder).mkdir()
        write(f"{folder}/test.jsonl", [row(number, id=f"x{number}")])
        write(f"{folder}/train.jsonl", [row(10 * number + i) for i in range(3)])
    write("a.jsonl", [row(i) for i in range(5)])


@pytest.mark.parametrize(
    "arguments, words",
    [
        (
            ["build", "--from", "a.jsonl", "--against", "d1/test.jsonl", "--against", "d2/test.jsonl", "--out", "s.jsonl"],
            "against: two benchmarks are called test (d1/test.jsonl and d2/test.jsonl)",
        ),
        (
            [
                "decontaminate",
                "--train",
                "a.jsonl",
                "--against",
                "d1/test.jsonl",
                "--against",
                "d2/test.jsonl",
                "--out",
                "s.jsonl",
                "--report",
                "r.json",
            ],
            "against: two benchmarks are called test",
        ),
        (
            ["build", "--from", "d1/train.jsonl", "--from", "d2/train.jsonl", "--out", "s.jsonl"],
            "--from: two sources are called train (d1/train.jsonl and d2/train.jsonl); give one of them another name, as "
            "NAME=PATH",
        ),
        (
            ["build", "--from", "x=d1/train.jsonl", "--from", "x=d2/train.jsonl", "--out", "s.jsonl"],
            "two sources are called x",
        ),
        (["build", "--config", "c.yaml", "--from", "d2/train.jsonl", "--out", "s.jsonl"], "two sources are called train"),
    ],
)
def test_two_of_one_name_are_refused(capsys, arguments, words):
    two_folders()
    Path("c.yaml").write_text("sources: [{name: train, path: d1/train.jsonl}]\n")
    before = files()
    assert main(["data", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and words in captured.err
    assert files() == before


def test_two_files_with_names_of_their_own_are_both_read():
    two_folders()
    assert main(["data", "build", "--from", "d1/train.jsonl", "--from", "other=d2/train.jsonl", "--out", "s.jsonl"]) == 0
    assert {json.loads(line)["id"] for line in Path("s.jsonl").open()} == {f"q{i}" for i in (10, 11, 12, 20, 21, 22)}


def test_bad_rows_are_counted_in_words(capsys):
    write("a.jsonl", [row(0), {"id": "x"}])
    assert main(["data", "build", "--from", "a.jsonl", "--out", "s.jsonl", "bad_rows=skip"]) == 0
    output = capsys.readouterr().out
    assert "a: 1 of 1 from a.jsonl, 1 bad row left out" in output and "\n\n" not in output
    write("a.jsonl", [row(0), {"id": "x"}, {"id": "y"}])
    assert main(["data", "build", "--from", "a.jsonl", "--out", "t.jsonl"]) == 2
    assert "; 1 more bad row; fix the data" in capsys.readouterr().err


def test_an_inspection_replaces_no_file_of_the_users(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    row = '{"id": "q", "question": "Why?", "options": {"A": "x", "B": "y"}, "answer": "A"}'
    Path("orig.jsonl").write_text(row)
    Path("orig.json").write_text("[1, 2]")
    Path("other.jsonl").write_text(row)
    assert main(["data", "inspect", "orig.jsonl", "--overwrite"]) == 2
    assert "the numbers would replace orig.json, which is of no inspection; give another --out" in capsys.readouterr().err
    assert main(["data", "inspect", "orig.jsonl", "--out", "other.jsonl", "--overwrite"]) == 2
    assert "--out: other.jsonl is to be a page" in capsys.readouterr().err
    assert Path("orig.json").read_text() == "[1, 2]" and Path("other.jsonl").read_text() == row
    assert main(["data", "inspect", "other.jsonl"]) == 0 == main(["data", "inspect", "other.jsonl", "--overwrite"])


@pytest.mark.parametrize(
    "arguments, made",
    [
        ([*BUILD, "--out", "s.jsonl"], ["s.card.json", "s.card.md", "s.jsonl"]),
        ([*CLEAN, "--out", "s.jsonl", "--report", "r.json"], ["r.json", "s.jsonl"]),
        (["inspect", "a.jsonl", "--out", "p.html"], ["p.html", "p.json"]),
    ],
)
def test_what_is_there_is_replaced_with_overwrite_only(capsys, arguments, made):
    """Any one of the files that a verb writes is enough for it to be refused."""
    write("a.jsonl", [row(i) for i in range(3)])
    write("bench.jsonl", [row(50)])
    assert main(["data", *arguments]) == 0
    capsys.readouterr()
    for name in made:
        for other in made:
            Path(other).unlink(missing_ok=True)
        Path(name).write_text('{"sha256": 0, "findings": []}')
        assert main(["data", *arguments]) == 2
        assert capsys.readouterr().err.endswith(
            f": {name} exists already; choose another name, or replace it with --overwrite\n"
        )
        assert [file for file in files() if file in made] == [name] and Path(name).read_text().startswith('{"sha256": 0')
    assert main(["data", *arguments, "--overwrite"]) == 0 and set(made) <= set(files())
