"""`alphamed data` from the command line: what it writes, and that every mistake is one line and leaves nothing behind."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import upstream_layouts as layouts
import yaml
from upstream_layouts import hub_folder

from alphamed.cli import main
from alphamed.data.sources import load_questions

REAL = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / ".cache")


def row(i, **changes):
    return {
        "id": f"q{i}",
        "question": f"Which finding number {i} points to disease {i}?",
        "answer": "A",
        "options": {"A": f"sign {i}", "B": f"sign {i + 1}", "C": f"sign {i + 2}"},
    } | changes


def write(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def files():
    return sorted(path.name for path in Path(".").iterdir() if path.name != ".cache")


# --------------------------------------------------------------------------------------------------------------- build
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_build_writes_the_set_and_a_card_that_agrees_with_it(suffix, capsys):
    write("a.jsonl", [row(i, source="a/x" if i % 2 else "a/y", level=i % 6 + 1, licence="MIT") for i in range(12)])
    write("b.jsonl", [row(i, id=f"b{i}", options={"A": "yes", "B": "no"}, context="ctx") for i in range(5)])
    assert (
        main(
            [
                "data",
                "build",
                "--out",
                f"set.{suffix}",
                "--from",
                "a.jsonl",
                "--from",
                "bee=b.jsonl",
                "seed=3",
                "filter.levels=[]",
                "quotas=[{source: a, per_level: 1}, {source: bee, count: 4}]",
            ]
        )
        == 0
    )
    questions = load_questions([f"set.{suffix}"]).questions
    card = json.loads(Path("set.card.json").read_text())
    assert len(questions) == 10 == card["set"]["questions"]
    assert Counter(q.level for q in questions) == {None: 4} | dict.fromkeys(range(1, 7), 1)
    assert card["set"]["levels"] == {"none": 4} | {str(level): 1 for level in range(1, 7)}
    assert card["set"]["sources"] == Counter(q.source or "unknown" for q in questions)
    assert card["set"]["options"] == {"2": 4, "3": 6} and card["set"]["answers"] == {"A": 10}
    assert card["sources"]["a"].pop("reading") == {
        "keys": {"answer": "letter"},
        "labels_removed": 0,
        "ids_made": 0,
        "repeats": [],
    }
    assert {key: value for key, value in card["sources"]["a"].items() if key != "sha256"} == {
        "place": "a.jsonl",
        "read": 12,
        "bad_rows": 0,
        "note": "",
        "problems": [],
        "kept": 6,
        "licences": {"MIT": 6},
    }
    assert card["sources"]["bee"]["licences"] == {"not stated": 4}
    assert card["recipe"]["seed"] == 3
    assert card["command"] == (
        f"alphamed data build --out set.{suffix} --from a.jsonl --from bee=b.jsonl seed=3 "
        "'filter.levels=[]' 'quotas=[{source: a, per_level: 1}, {source: bee, count: 4}]'"
    )
    digest = subprocess.run(["sha256sum", f"set.{suffix}"], capture_output=True, text=True).stdout.split()[0]
    assert card["file_sha256"] == digest and digest in Path("set.card.md").read_text()
    # "Which finding number i points to disease i?" has 8 words; an option of a has 2, of b 1; the context of b is one more
    assert card["set"]["words"]["min"] == 8 + 2 + 1 and card["set"]["words"]["max"] == 8 + 3 * 2
    assert "set." + suffix in capsys.readouterr().out


def test_a_seed_gives_the_same_bytes_and_the_two_formats_the_same_questions():
    write("a.jsonl", [row(i) for i in range(30)])
    for name, seed in (("x.jsonl", 1), ("y.jsonl", 1), ("z.jsonl", 2), ("w.parquet", 1)):
        assert (
            main(["data", "build", "--out", name, "--from", "a.jsonl", f"seed={seed}", "size=20", "shuffle_options=true"])
            == 0
        )
    assert Path("x.jsonl").read_bytes() == Path("y.jsonl").read_bytes() != Path("z.jsonl").read_bytes()
    cards = {name: json.loads(Path(f"{name}.card.json").read_text())["set"]["content_sha256"] for name in "xyzw"}
    assert cards["x"] == cards["y"] == cards["w"] != cards["z"]
    assert load_questions(["x.jsonl"]).questions == load_questions(["w.parquet"]).questions


def test_a_preset_with_local_copies_in_the_hubs_layout_and_annotated_levels():
    rows = [layouts.MEDMCQA[0] | {"id": f"e{i}", "question": f"Question {i}?"} for i in range(1300)]
    folder = hub_folder(Path("copy"), None, "train", rows)
    write("levels.jsonl", [{"id": f"medmcqa-e{i}", "level": i % 6 + 1, "pass_rate": 0.2} for i in range(1300)])
    arguments = ["data", "build", "--out", "small.parquet", "--preset", "medmcqa1200", "--from", f"medmcqa={folder}"]
    assert main(arguments) == 2  # no levels, so no quotas by level
    assert main([*arguments, "sources=[{name: medmcqa, path: copy, levels: levels.jsonl}]"]) == 0
    questions = load_questions(["small.parquet"]).questions
    assert Counter(q.level for q in questions) == dict.fromkeys(range(1, 7), 200)
    assert all(q.level == int(q.id.removeprefix("medmcqa-e")) % 6 + 1 for q in questions)
    assert "1,300 usable questions, 182,822 were expected" in Path("small.card.md").read_text()


@pytest.mark.parametrize("form, answer", [("index", 1), ("index1", 2), ("text", " SIGN 8"), ("letter", "B")])
def test_answers_in_every_form_when_told(form, answer):
    write("a.jsonl", [row(7, options=["sign 7", "sign 8", "sign 9"], answer=answer)])
    assert main(["data", "build", "--out", "s.jsonl", f"sources=[{{name: a, path: a.jsonl, answer: {form}}}]"]) == 0
    (question,) = load_questions(["s.jsonl"]).questions
    assert (question.options[question.answer], question.answer) == ("sign 8", "B")


def test_a_hub_set_whose_rows_are_in_the_schema():
    rows = [row(1, answer=2), row(2, answer=0, options={"A": "x", "B": "y"})]
    folder = hub_folder(Path("repository"), "hard", "dev", rows)
    assert (
        main(
            [
                "data",
                "build",
                "--out",
                "s.jsonl",
                "shuffle=false",
                f"sources=[{{name: mine, hub: {folder}, config: hard, split: dev, answer: index, licence: CC0}}]",
            ]
        )
        == 0
    )
    questions = load_questions(["s.jsonl"]).questions
    assert [(q.id, q.answer, len(q.options)) for q in questions] == [("q1", "C", 3), ("q2", "A", 2)]
    assert json.loads(Path("s.card.json").read_text())["sources"]["mine"]["licences"] == {"CC0": 2}


def test_decisions_are_applied_and_recorded():
    write("a.jsonl", [row(i) for i in range(3)] + [row(0, id="twin", answer="B")])
    assert main(["data", "suspects", "--questions", "a.jsonl", "--out", "d.yaml"]) == 0
    tree = yaml.safe_load(Path("d.yaml").read_text())
    assert (tree["version"], {decision["id"] for decision in tree["decisions"]}) == (1, {"q0", "twin"})
    signed = {"who": "R", "when": "2026-01-31", "why": "textbook"}
    for decision in tree["decisions"]:
        decision |= signed | (
            {"decision": "quarantine"} if decision["id"] == "twin" else {"decision": "fix", "answer": "sign 2"}
        )
    Path("d.yaml").write_text(yaml.safe_dump(tree | {"version": 2}))
    arguments = ["data", "build", "--from", "a.jsonl", "--decisions", "d.yaml", "--out"]
    assert main([*arguments, "s.jsonl", "decisions_version=2"]) == 0
    assert {q.id: q.answer for q in load_questions(["s.jsonl"]).questions} == {"q0": "C", "q1": "A", "q2": "A"}
    (recorded,) = json.loads(Path("s.card.json").read_text())["decisions"]
    assert (recorded["version"], recorded["fixed"], recorded["quarantined"]) == (2, 1, 1)
    assert main([*arguments, "t.jsonl", "decisions_version=1"]) == 2 and not Path("t.jsonl").exists()


# ------------------------------------------------------------------------------------------------------------- overlap
def overlapping():
    write("a.jsonl", [row(i) for i in range(20)])
    turned = row(8, id="x8", options={"A": "sign 10", "B": "sign 8", "C": "sign 9"}, answer="B")
    write("bench.jsonl", [row(7, id="x7"), row(90, id="x90"), turned])
    return ["data", "build", "--out", "s.jsonl", "--from", "a.jsonl", "--against", "bench.jsonl"]


def test_a_set_that_overlaps_a_benchmark_is_refused_unless_told(capsys):
    arguments = overlapping()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: 2 questions of the set are in bench too (the first: q7 is x7, exact)")
    assert error.count("\n") == 1
    assert files() == ["a.jsonl", "bench.jsonl"]
    assert main([*arguments, "overlap=drop"]) == 0
    assert {q.id for q in load_questions(["s.jsonl"]).questions} == {f"q{i}" for i in range(20)} - {"q7", "q8"}
    assert main([*arguments, "--overwrite", "overlap=flag"]) == 0
    marked = {row["id"]: row.get("overlaps") for row in map(json.loads, Path("s.jsonl").read_text().splitlines())}
    assert len(marked) == 20
    assert {k: v for k, v in marked.items() if v} == {"q7": "bench:x7 (exact)", "q8": "bench:x8 (exact)"}


def test_decontaminate_drops_or_flags_and_reports(capsys):
    overlapping()
    arguments = [
        "data",
        "decontaminate",
        "--train",
        "a.jsonl",
        "--against",
        "bench.jsonl",
        "--out",
        "clean.parquet",
        "--report",
        "r.json",
    ]
    assert main(arguments) == 0
    assert len(load_questions(["clean.parquet"]).questions) == 18
    report = json.loads(Path("r.json").read_text())
    assert (report["contaminated"], report["action"], report["benchmarks"]["bench"]["touched"]) == (2, "drop", 2)
    assert {(hit["train"]["id"], hit["against"]["id"]) for hit in report["hits"]} == {("q7", "x7"), ("q8", "x8")}
    assert "bench (bench.jsonl): 2 of 3 questions touched; 2 exact" in capsys.readouterr().out
    assert main([*arguments, "--flag"]) == 2 and len(load_questions(["clean.parquet"]).questions) == 18
    assert main([*arguments, "--flag", "--overwrite"]) == 0
    table = pq.read_table("clean.parquet").to_pylist()
    assert {row["id"] for row in table if row["overlaps"]} == {"q7", "q8"} and len(table) == 20


# ----------------------------------------------------------------------------------------------------------- bad input
def cut_parquet():
    pq.write_table(pa.Table.from_pylist([row(1), row(2)]), "in.parquet")
    Path("in.parquet").write_bytes(Path("in.parquet").read_bytes()[:-30])
    return "in.parquet"


def other_columns():
    pq.write_table(pa.table({"prompt": ["a"], "response": ["b"]}), "in.parquet")
    return "in.parquet"


def raw(content):
    Path("in.jsonl").write_bytes(content)
    return "in.jsonl"


GOOD = json.dumps(row(1)).encode() + b"\n"
BAD_INPUT = {
    "truncated Parquet": (cut_parquet, "not a readable Parquet file"),
    "wrong schema": (other_columns, "has no column question, options, answer"),
    "wrong keys": (lambda: write("in.jsonl", [{"prompt": "a"}]), "in.jsonl:1: no question"),
    "an index of unknown base": (
        lambda: write("in.jsonl", [row(1, answer=1)]),
        "in.jsonl: its keys (answer) can be numbers from 0 or numbers from 1",
    ),
    "two forms of answers": (
        lambda: write("in.jsonl", [row(1), row(2), row(3, answer=0)]),
        "in.jsonl:3: answer 0 of 3 options is "
        "of another form than 2 of 3 keys of the file, letters (in.jsonl:1: 'A' of 3 options)",
    ),
    "answer that is none": (
        lambda: write("in.jsonl", [row(1, answer="sign 9")]),
        "answer 'sign 9' is not among the options",
    ),
    "more options than letters": (
        lambda: write("in.jsonl", [row(1, options=[f"o{i}" for i in range(27)])]),
        "in.jsonl:1: 27 options, at most 26 can have a letter",
    ),
    "duplicate options": (lambda: write("in.jsonl", [row(1, options={"A": "x", "B": "x "})]), "options A and B are"),
    "duplicate ids": (lambda: write("in.jsonl", [row(1), row(1)]), "in.jsonl:2: duplicate id 'q1'"),
    "not UTF-8": (lambda: raw(GOOD + '{"id": "é"}\n'.encode("latin-1")), "in.jsonl:2: wrong encoding: byte 0xe9"),
    "cut JSON": (lambda: raw(GOOD + GOOD[:40]), "in.jsonl:2: not JSON"),
    "empty file": (lambda: raw(b""), "in.jsonl: is empty"),
    "no file": (lambda: "none.jsonl", "none.jsonl: no such file"),
    "a folder": (lambda: Path("in.jsonl").mkdir() or "in.jsonl", "in.jsonl: cannot be read as in"),
}


@pytest.mark.parametrize("verb", ["build", "decontaminate", "suspects"])
@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line_and_leaves_nothing(capsys, verb, name):
    make, words = BAD_INPUT[name]
    file = make()
    write("bench.jsonl", [row(50)])
    before = files()
    arguments = {
        "build": ["--out", "s.parquet", "--from", f"in={file}"],
        "decontaminate": ["--train", file, "--against", "bench.jsonl", "--out", "s.parquet", "--report", "r.json"],
        "suspects": ["--questions", file, "--out", "d.yaml"],
    }[verb]
    assert main(["data", verb, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and captured.out == ""
    if verb == "build":
        assert words in captured.err
    else:
        assert words.partition("; fix")[0].partition(": cannot")[0] in captured.err
    assert files() == before


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["build", "--out", "s.csv", "--from", "a.jsonl"], "--out: 's.csv' ends neither in .jsonl nor in .parquet"),
        (["build", "--out", "s.jsonl"], "no source is given"),
        (["build", "--out", "s.jsonl", "--from", "nosuch"], "'nosuch' is neither a known set"),
        (["build", "--out", "s.jsonl", "--preset", "alphamed"], "choose from alphamed19k"),
        (["build", "--out", "s.jsonl", "--from", "a.jsonl", "sorce=1"], "sorce: unknown key; did you mean 'sources'?"),
        (
            ["build", "--out", "s.jsonl", "--from", "a.jsonl", "filter.min_words=900"],
            "no question is left (filter: 3 left out by length)",
        ),
        (
            ["build", "--out", "s.jsonl", "--from", "a.jsonl", "--from", "b=a.jsonl"],
            "question 'q0' is in a and in b; keep one of the two with drop_repeats=true",
        ),
        (["build", "--out", "s.jsonl", "--from", "a.jsonl", "--against", "nosuch"], "benchmark 'nosuch' is neither known"),
        (["build", "--out", "s.jsonl", "--from", "a.jsonl", "--decisions", "none.yaml"], "none.yaml: no such file"),
        (["build", "--out", "s.jsonl", "sources=[{name: mine}]"], "'mine' is not known and has neither path nor hub"),
        (["build", "--out", "a.jsonl/s.jsonl", "--from", "a.jsonl"], "cannot be written"),
        (
            ["decontaminate", "--train", "a.jsonl", "--against", "a.jsonl", "--out", "s.jsonl", "--report", "r.json"],
            "all 3 questions of a.jsonl are in the benchmarks",
        ),
        (
            [
                "decontaminate",
                "--train",
                "a.jsonl",
                "--against",
                "a.jsonl",
                "--out",
                "s.jsonl",
                "--report",
                "r.json",
                "--similarity",
                "7",
            ],
            "--similarity: 7.0",
        ),
        (["suspects", "--questions", "a.jsonl", "--items", "a.jsonl", "--out", "d.yaml"], "a.jsonl:1: no graded answer"),
        (["suspects", "--questions", "a.jsonl", "--models", "0", "--out", "d.yaml"], "--models: 0 is no number of models"),
        (["suspects", "--questions", "a.jsonl", "--models", "-3", "--out", "d.yaml"], "--models: -3 is no number of models"),
        (
            ["suspects", "--questions", "a.jsonl", "--share", "7", "--out", "d.yaml"],
            "--share: 7 is not above 0 and at most 1",
        ),
        (["suspects", "--questions", "a.jsonl", "--share", "nan", "--out", "d.yaml"], "--share: nan is not"),
        (["inspect", "none.jsonl"], "none.jsonl: no such file"),
        ([], "VERB"),
        (["bild"], "bild"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, words):
    write("a.jsonl", [row(i) for i in range(3)])
    assert main(["data", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and words in captured.err
    assert files() == ["a.jsonl"]


@pytest.mark.parametrize("out", ["s.jsonl", "s.parquet"])
def test_a_full_disk_leaves_the_old_files_as_they_were(out):
    """A limit on file sizes stands for the full disk: writes beyond it fail as they do there, with OSError."""
    random = Random(0)
    write("a.jsonl", [row(i, question=random.randbytes(500).hex()) for i in range(200)])  # Parquet cannot shrink it
    write("small.jsonl", [row(1)])
    assert main(["data", "build", "--out", out, "--from", "small.jsonl"]) == 0
    before = {name: Path(name).read_bytes() for name in files()}
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)); "
        "from alphamed.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "data", "build", "--out", out, "--from", "a.jsonl", "--overwrite"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "cannot be written (" in done.stderr and "File too large" in done.stderr
    assert {name: Path(name).read_bytes() for name in files()} == before


@pytest.mark.skipif(not REAL.is_dir(), reason="the real medical files of ../shared/data are not on this machine")
def test_a_mixture_of_real_questions(capsys):
    """Counts from the data's own README: 2,706 + 7,131 + 950 + 2,565 rows, 23 of them with repeated options; three questions of
    MedMCQA have one option that carries a label ("b)Atenolol"), and one of its questions stands there with two keys."""
    sources = [
        part
        for name in ("medqa", "medmcqa", "pubmedqa", "headqa_en")
        for part in ("--from", f"{name}={REAL / f'train_{name}.jsonl'}")
    ]
    assert (
        main(
            [
                "data",
                "build",
                "--out",
                "s.parquet",
                *sources,
                "--against",
                f"medqa={REAL / 'dev_medqa.jsonl'}",
                "bad_rows=skip",
                "overlap=drop",
                "conflicts=drop",
                "balance=[{source: pubmedqa, max_share: 0.5}]",
                "quotas=[{source: medqa, count: 600}, {source: medmcqa, count: 600}, {source: pubmedqa, count: 400}]",
            ]
        )
        == 0
    )
    card = json.loads(Path("s.card.json").read_text())
    assert [source["read"] for source in card["sources"].values()] == [2705, 7108, 950, 2563]
    assert [source["kept"] for source in card["sources"].values()] == [600, 600, 400, 0]
    yes = sum(q.options[q.answer] == "yes" for q in load_questions(["s.parquet"]).questions)
    assert 150 <= yes <= 250 and "1,267 questions, 1,273 were expected" in capsys.readouterr().out
