"""Containers of question files: what each gives, by every way a file is read, and what is refused."""

import csv
import gzip
import json
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from upstream_layouts import MEDMCQA, PUBMEDQA

from alphamed.cli import main
from alphamed.config.choices import BadRows
from alphamed.data.mcq import check_questions
from alphamed.data.reading import interpret
from alphamed.data.sources import load_questions
from alphamed.data.tables import bare_name, kind_of
from alphamed.data.upstream import read_upstream
from alphamed.errors import DataError
from alphamed.evaluation.benchmarks import BENCHMARKS, load_benchmark
from alphamed.evaluation.runner import load_sets
from alphamed.lab.datasets.catalogue import SOURCES

NAMES = (
    "mine.jsonl",
    "mine.json",
    "mine.csv",
    "mine.tsv",
    "mine.jsonl.gz",
    "mine.json.gz",
    "mine.csv.gz",
    "mine.tsv.gz",
    "MINE.CSV",
    "Mine.JSONL.GZ",
)
# Texts that a reader may take for something else: missing values, numbers, truth, dates, signs of CSV itself
ODD = (
    "None",
    "NA",
    "N/A",
    "null",
    "nan",
    "NaN",
    "",
    "5.0",
    "007",
    "1e3",
    "TRUE",
    "2020-01-01",
    "-",
    'a "quoted", text',
    "two\nlines",
    "tab\there",
    "\u2028",
    "'",
    "[1]",
)
ROWS = [
    {
        "id": f"q{i}",
        "question": f"Question {i}, really?",
        "options": {"A": text or "empty", "B": f"other {i}"},
        "answer": "A",
        "context": text or None,
        "level": i % 6 + 1,
    }
    for i, text in enumerate(ODD)
]
FOUND = [
    (row["id"], row["question"], row["options"], "A", (row["context"] or "").strip() or None, row["level"]) for row in ROWS
]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / ".cache")


def table(file, rows, delimiter=","):
    with open(file, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return Path(file)


def save(name, rows=tuple(ROWS)):
    """Write rows into a file of this name by Python's own libraries, not by the program's."""
    kind = kind_of(name)
    if kind == ".jsonl":
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == ".json":
        Path(name).write_text(json.dumps(list(rows), indent=1))
    else:
        table(name, [row | {"options": json.dumps(row["options"])} for row in rows], "\t" if kind == ".tsv" else ",")
    if name.lower().endswith(".gz"):
        Path(name).write_bytes(gzip.compress(Path(name).read_bytes()))
    return Path(name)


def rows_of(questions):
    return [(q.id, q.question, dict(q.options), q.answer, q.context, q.level) for q in questions]


def stripped(questions):
    return [
        (i, question, {letter: text.strip() for letter, text in options.items()}, *rest)
        for i, question, options, *rest in questions
    ]


# -------------------------------------------------------------------------------------------------------- what is read
@pytest.mark.parametrize("name", NAMES)
def test_every_container_gives_the_same_questions_by_every_way(name):
    """U+2028 counts as white space at the end of a text, so that one option would be empty: it is left out here."""
    rows = [row for row in ROWS if row["options"]["A"].strip()]
    expected = [row for row in stripped(FOUND) if row[2]["A"]]
    save(name, rows)
    assert rows_of(load_questions([name]).questions) == expected
    assert (
        rows_of(load_benchmark(name).questions) == expected
        and load_benchmark(name).name == Path(name).name.partition(".")[0]
    )
    assert rows_of(load_benchmark(f"medqa={name}").questions) == expected
    (evaluated,) = load_sets([Path(name)], None, 0, BadRows.REFUSE)
    assert sorted(rows_of(evaluated.questions)) == sorted(expected) and evaluated.name == Path(name).name.partition(".")[0]
    assert main(["data", "build", "--out", "out.jsonl", "--from", name, "shuffle=false"]) == 0
    assert rows_of(load_questions(["out.jsonl"]).questions) == expected


@pytest.mark.parametrize("name", NAMES)
def test_a_name_without_folder_and_endings(name):
    assert bare_name(f"a.b/{name}") == Path(name).name.partition(".")[0]


def test_names_that_are_no_container():
    assert [kind_of(name) for name in ("x", "x.txt", "x.gz", "x.parquet.gz", "x.jsonl.zip", "x.xlsx", ".jsonl")] == [""] * 7
    assert bare_name("a/mine.v2.gz") == "mine.v2" and bare_name("a/mine.v2.jsonl") == "mine.v2"


def test_an_object_of_objects_names_its_rows_by_its_keys():
    Path("x.json").write_text(
        json.dumps(
            {row["id"]: {key: row[key] for key in ("question", "options", "answer")} for row in ROWS[:3]}
            | {"q9": ROWS[3], "q10": ROWS[4] | {"id": None}}
        )
    )
    assert [q.id for q in load_questions(["x.json"]).questions] == ["q0", "q1", "q2", "q3", "q10"]  # an id of its own stays


def test_a_json_name_may_hold_json_lines_or_a_single_row():
    Path("x.json").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:2]) + "{\n")
    loaded = load_questions(["x.json"], BadRows.SKIP)
    assert [q.id for q in loaded.questions] == ["q0", "q1"] and str(loaded.skipped[0]).startswith("x.json:3: not JSON: ")
    Path("y.json").write_text(json.dumps(ROWS[0], indent=1))
    assert [q.id for q in load_questions(["y.json"]).questions] == ["q0"]


@pytest.mark.parametrize("field, key", [("answer_idx", "B"), ("answer_index", "1"), ("answer", "it's")])
def test_a_table_may_state_its_keys_in_any_of_their_fields(field, key):
    rows = [
        {"id": "q1", "question": "Why?", "options": '["x", "it\'s"]', field: key},
        {"id": "q2", "question": "How?", "options": '["x", "y"]', field: {"B": "A", "1": "0", "it's": "x"}[key]},
    ]
    for name in ("x.csv", "x.tsv"):
        table(name, rows, "\t" if name == "x.tsv" else ",")
        assert [q.answer for q in load_questions([name]).questions] == ["B", "A"]


def test_an_empty_cell_is_missing_and_a_python_dict_is_read():
    table(
        "x.csv",
        [
            {
                "id": "q1",
                "question": "Why?",
                "options": "{'A': 'None', 'B': \"it's\"}",
                "answer": "A",
                "context": " ",
                "source": "",
                "level": "3.0",
                "": "7",
            }
        ],
    )
    (question,) = load_questions(["x.csv"]).questions
    assert (dict(question.options), question.context, question.source, question.level) == (
        {"A": "None", "B": "it's"},
        None,
        None,
        3,
    )


def test_a_context_that_begins_with_a_bracket_stays_text():
    table(
        "x.csv",
        [
            {"id": f"q{i}", "question": "Why?", "options": '{"A": "x", "B": "y"}', "answer": "A", "context": text}
            for i, text in enumerate(["[1]", "[BACKGROUND] Text. [1]", '["a"]'])
        ],
    )
    assert [q.context for q in load_questions(["x.csv"]).questions] == ["[1]", "[BACKGROUND] Text. [1]", '["a"]']


# --------------------------------------------------------------------------------------------------- public sets as CSV
def medmcqa(texts):
    """Rows of MedMCQA; option `opd` and the id are what a reader may take for something else."""
    return [MEDMCQA[0] | {"id": f"e{i}", "opd": text, "cop": 3, "exp": "", "topic_name": ""} for i, text in enumerate(texts)]


MISSING = ("None", "NA", "N/A", "null", "nan", "5", "5.0", "007", "Aortic arch")


@pytest.mark.parametrize("texts", [MISSING, ("5", "6.0")], ids=["mixed", "numbers alone"])
def test_options_that_pandas_takes_for_missing_or_for_numbers_stay_texts(texts):
    """As a file, as a local folder in the hub's layout, and by hub name: `datasets` reads the last two with pandas."""
    expected = {f"medmcqa-e{i}": ("D", text) for i, text in enumerate(texts)}
    source = SOURCES["medmcqa"]
    Path("copy").mkdir()
    table("copy/train.csv", medmcqa(texts))
    for rows in (
        read_upstream(source, Path("copy/train.csv")),
        read_upstream(source, Path("copy")),
        read_upstream(replace(source, hub=str(Path("copy").resolve())), None),
    ):
        questions, problems = check_questions(interpret(rows, source.answer)[0])
        assert problems == [] and {q.id: (q.answer, q.options["D"]) for q in questions} == expected


def test_the_authors_file_of_pubmedqa_is_read():
    tree = {
        "101": {
            "QUESTION": "Does walking help?",
            "CONTEXTS": ["We let 10 people walk.", "They felt better."],
            "final_decision": "yes",
            "LONG_ANSWER": "It does.",
        },
        "102": {"QUESTION": "Does priority help?", "CONTEXTS": ["We let 10 people stand."], "final_decision": "maybe"},
    }
    Path("ori_pqal.json").write_text(json.dumps(tree, indent=4))
    Path("hub.json").write_text(json.dumps(list(PUBMEDQA)))
    source = BENCHMARKS["pubmedqa1000"]
    assert [row.value for row in read_upstream(source, Path("ori_pqal.json"))] == [
        row.value for row in read_upstream(source, Path("hub.json"))
    ]


@pytest.mark.parametrize(
    "content, message",
    [
        (
            '{"101": {"QUESTION": "Does wal',
            "hub.json: not JSON: Unterminated string starting at at character 22 (the file seems "
            "cut off); give an array of rows",
        ),
        ('{"101": {"Q": "x"}, "101": {}}', "hub.json: not JSON that can be used: key '101' occurs twice; give"),
        ('[{"a": 1}]', "hub.json: rows are not in the layout of pubmedqa1000 (no 'pubid'); its columns are 'a'"),
        (
            '["a"]',
            "hub.json gives no question (all 1 rows are bad, the first: hub.json:1: not an object of keys and values but "
            "text)",
        ),
        ("[]", "hub.json: is empty"),
        ("", "hub.json: is empty"),
    ],
)
def test_a_whole_json_file_that_can_not_be_used_says_why(content, message):
    Path("hub.json").write_text(content)
    with pytest.raises(DataError) as error:
        load_benchmark("pubmedqa1000=hub.json")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_folder_that_can_not_be_loaded_names_the_cause():
    Path("copy").mkdir()
    Path("copy/train.json").write_text('{"a": 1,')
    with pytest.raises(DataError) as error:
        load_benchmark("pubmedqa1000=copy")
    assert "An error occurred" not in str(error.value) and "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------------------- what is refused
HEAD = b"id,question,options,answer\n"
OPTIONS = b'"{""A"": ""x"", ""B"": ""y""}"'


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x.csv", HEAD + b'q1,"Why?,' + OPTIONS + b",A\n", "x.csv: line 2 cannot be read as a table ("),
        ("x.csv", HEAD + b'q1,"Why" not?,' + OPTIONS + b",A\n", "x.csv: line 2 cannot be read as a table ("),
        ("x.csv", b"id,question,question,answer\n", "x.csv: has two columns called 'question'; rename one"),
        (
            "x.csv",
            b"id;question;options;answer\n1;2;3;4\n",
            "x.csv: has no column question, options, answer; its columns are id;question;options;answer",
        ),
        ("x.csv", HEAD, "x.csv: is empty"),
        ("x.csv", b"", "x.csv: is empty"),
        ("x.csv", "\ufeffid,question".encode("utf-16"), "x.csv: is UTF-16; save it as UTF-8"),
        ("x.jsonl", json.dumps(ROWS[0]).encode("utf-16"), "x.jsonl: is UTF-16; save it as UTF-8"),
        ("x.json", json.dumps(ROWS[0]).encode("utf-16"), "x.json: is UTF-16; save it as UTF-8"),
        ("x.jsonl.gz", b"plain", "x.jsonl.gz: cannot be read (not a complete gzip file: Not a gzipped file"),
        ("x.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 1000)[:-12], "x.jsonl.gz: cannot be read (not a complete gzip file: "),
        ("x.csv.gz", gzip.compress(HEAD)[:-4], "x.csv.gz: cannot be read (not a complete gzip file: "),
        ("x.parquet.gz", b"", "x.parquet.gz: .gz is not supported; give .jsonl, .json,"),
    ],
)
def test_a_file_that_can_not_be_read_is_one_line(name, content, message):
    Path(name).write_bytes(content)
    for bad_rows in BadRows:
        with pytest.raises(DataError) as error:
            load_questions([name], bad_rows)
        assert message in str(error.value) and "\n" not in str(error.value)


def test_bad_rows_of_a_table_are_named_and_the_others_count():
    lines = [
        b'q1,"Two\nlines?",' + OPTIONS + b",A",
        b"q2,Short?," + OPTIONS,
        b"q3,Caf\xe9?," + OPTIONS + b",A",
        b"q4,Options?,A or B,A",
        b'q5,Options?,"{""A"": ""x""",A',
        b'q6,Options?,"[""x""}",A',
        b"",
        b"q7,Good?," + OPTIONS + b",B",
    ]
    Path("x.csv").write_bytes(HEAD + b"\r\n".join(lines))
    loaded = load_questions(["x.csv"], BadRows.SKIP)
    assert [q.id for q in loaded.questions] == ["q1", "q7"]
    assert [str(problem) for problem in loaded.skipped] == [
        "x.csv:4: 3 cells in a table of 4 columns",
        "x.csv:5: wrong encoding: byte 0xe9 in question is not UTF-8",
        "x.csv:6: options cannot be used: Expecting value: line 1 column 1 (char 0)",
        "x.csv:7: options cannot be used: Expecting ',' delimiter: line 1 column 10 (char 9)",
        "x.csv:8: options cannot be used: not JSON (Expecting ',' delimiter at character 5)",
    ]
