"""Question files: what loads, what is refused, and what the refusal says."""

import json
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alphamed.config.choices import BadRows
from alphamed.data.sources import load_questions
from alphamed.errors import DataError

REAL = Path(__file__).parents[3] / "shared" / "data"


def row(i, **changes) -> dict:
    return {"id": f"q{i}", "question": f"Question {i}?", "options": {"A": "yes", "B": "no"}, "answer": "A"} | changes


def write(file: Path, *lines: dict | bytes) -> Path:
    file.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return file


# --------------------------------------------------------------------------------------------------------------- JSONL
def test_rows_keep_file_order(tmp_path):
    files = [write(tmp_path / "b.jsonl", row(3), row(1)), write(tmp_path / "a.jsonl", row(2))]
    loaded = load_questions(files)
    assert [q.id for q in loaded.questions] == ["q3", "q1", "q2"]
    assert loaded.skipped == ()


def test_byte_order_mark_windows_line_ends_blank_lines_and_unicode_line_separators_do_no_harm(tmp_path):
    second = json.dumps(row(2, question="a\u2028b\x85c"), ensure_ascii=False)
    text = "\r\n".join(["\ufeff", json.dumps(row(1)), "  ", second])
    (tmp_path / "x.jsonl").write_bytes(text.encode())
    loaded = load_questions([tmp_path / "x.jsonl"])
    assert [q.question for q in loaded.questions] == ["Question 1?", "a\u2028b\x85c"]


BAD_LINES = [
    (b'{"id": "q1", ', "not JSON: Expecting property name enclosed in double quotes at character 14"),
    (b"question,answer", "not JSON: Expecting value at character 1"),
    ('{"id": "é"}'.encode("latin-1"), "wrong encoding: byte 0xe9 at byte 9 of the line is not UTF-8"),
    (b'{"id": "q", "id": "r"}', "not JSON that can be used: key 'id' occurs twice"),
    (b'{"options": {"A": "x", "A": "y"}}', "not JSON that can be used: key 'A' occurs twice"),
    (b"[" * 100_000, "not JSON that can be used: maximum recursion depth exceeded"),
    (b"[1]", "not an object of keys and values but a list"),
    (b'{"id": "q"}', "no question"),
]


def test_every_bad_row_is_listed_with_its_line(tmp_path):
    file = write(tmp_path / "x.jsonl", row(1), b"", *(line for line, _ in BAD_LINES), row(2), row(1))
    with pytest.raises(DataError) as error:
        load_questions([file])
    problems = [(p.file, p.line, p.problem) for p in error.value.problems]
    duplicate = (str(file), 12, f"duplicate id 'q1', first at {file}:1")
    assert [f[:2] for f in problems] == [(str(file), line) for line in (3, 4, 5, 6, 7, 8, 9, 10, 12)]
    for (_, _, problem), (_, expected) in zip(problems, BAD_LINES):
        assert problem.startswith(expected)  # the recursion message goes on, differently between Python versions
    assert problems[-1] == duplicate
    assert str(error.value) == (
        f"{file}:3: {BAD_LINES[0][1]}; 8 more bad rows; fix the data, or leave bad rows out "
        "with data.bad_rows=skip (--bad-rows skip on the command line)"
    )
    assert pickle.loads(pickle.dumps(error.value)).problems == error.value.problems


def test_one_bad_row_is_refused_without_talk_of_others(tmp_path):
    file = write(tmp_path / "x.jsonl", row(1), row(2, answer="E"))
    with pytest.raises(DataError) as error:
        load_questions([file])
    assert str(error.value) == (
        f"{file}:2: answer 'E' is not among the options A, B; fix the data, or leave bad rows "
        "out with data.bad_rows=skip (--bad-rows skip on the command line)"
    )


def test_skipping_keeps_the_good_rows_and_counts_the_bad(tmp_path):
    file = write(tmp_path / "x.jsonl", row(1), *(line for line, _ in BAD_LINES), row(2))
    loaded = load_questions([file], BadRows.SKIP)
    assert [q.id for q in loaded.questions] == ["q1", "q2"]
    assert len(loaded.skipped) == len(BAD_LINES)


def test_duplicate_ids_are_found_across_files(tmp_path):
    a, b = write(tmp_path / "a.jsonl", row(1), row(2)), write(tmp_path / "b.jsonl", row(3), row(2))
    with pytest.raises(DataError, match=f"^{b}:2: duplicate id 'q2', first at {a}:2; fix"):
        load_questions([a, b])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda d: [d / "none.jsonl"], "none.jsonl: no such file; name an existing one (.jsonl, .json, "),
        (lambda d: [d], ": is a folder; name the files in it (.jsonl, .json, .csv, "),
        (
            lambda d: [write(d / "x.xlsx", b"a,b")],
            "x.xlsx: .xlsx is not supported; give .jsonl, .json, .csv, .tsv (each also with .gz) or .parquet",
        ),
        (lambda d: [write(d / "data", b"a,b")], "data: a name without suffix is not supported; give .jsonl, .json,"),
        (lambda d: [write(d / "x.jsonl", b"")], "x.jsonl: is empty; give a file with questions"),
        (lambda d: [write(d / "x.jsonl", b" \n\n")], "x.jsonl: is empty; give a file with questions"),
        (lambda d: [write(d / "x.jsonl", row(1)), d / "." / "x.jsonl"], "x.jsonl: named twice; name every data file once"),
        (lambda d: [write(d / "x.jsonl", row(1)), d / "y.jsonl"], "y.jsonl: no such file; name an existing one"),
        (lambda d: [write(d / "x.parquet", b"PAR1 not really")], "x.parquet: not a readable Parquet file"),
        (lambda d: [], "no data file is given; name one (.jsonl, .json, "),
    ],
)
def test_a_file_that_can_not_be_used_is_one_line(tmp_path, make, message):
    for bad_rows in BadRows:
        with pytest.raises(DataError) as error:
            load_questions(make(tmp_path), bad_rows)
        assert message in str(error.value) and "\n" not in str(error.value)


def test_skipping_everything_is_refused(tmp_path):
    file = write(tmp_path / "x.jsonl", b"a", b"b")
    with pytest.raises(DataError, match="no usable question, all 2 rows are bad"):
        load_questions([file], BadRows.SKIP)


# ------------------------------------------------------------------------------------------------------------- Parquet
def parquet(file: Path, **columns) -> Path:
    pq.write_table(pa.table(columns), file)
    return file


TEXTS = {"id": ["q1", "q2"], "question": ["One?", "Two?"], "answer": ["B", "C"]}
STRUCT = pa.array([{"A": "x", "B": "y", "C": None}, {"A": "x", "B": "y", "C": "z"}])
MAP = pa.array([[("A", "x"), ("B", "y")], [("A", "x"), ("B", "y"), ("C", "z")]], pa.map_(pa.string(), pa.string()))
PAIRS = pa.array(
    [
        [{"letter": "A", "text": "x"}, {"letter": "B", "text": "y"}],
        [{"letter": "A", "text": "x"}, {"letter": "B", "text": "y"}, {"letter": "C", "text": "z"}],
    ]
)
JSON_TEXT = pa.array(['{"A": "x", "B": "y"}', '{"A": "x", "B": "y", "C": "z"}'])


@pytest.mark.parametrize("options", [STRUCT, MAP, PAIRS, JSON_TEXT], ids=["struct", "map", "pairs", "json"])
def test_options_in_every_usual_parquet_form(tmp_path, options):
    loaded = load_questions([parquet(tmp_path / "x.parquet", **TEXTS, options=options)])
    assert [list(q.options.items()) for q in loaded.questions] == [
        [("A", "x"), ("B", "y")],
        [("A", "x"), ("B", "y"), ("C", "z")],
    ]


def test_parquet_columns_beyond_the_schema_and_float_levels_of_pandas(tmp_path):
    file = parquet(
        tmp_path / "x.parquet",
        **TEXTS,
        options=STRUCT,
        level=[3.0, float("nan")],
        licence=["MIT", None],
        context=[None, "An abstract."],
    )
    first, second = load_questions([file]).questions
    assert (first.level, second.level) == (3, None)
    assert (first.context, second.context) == (None, "An abstract.")


def test_bad_parquet_rows_are_named_by_number(tmp_path):
    offsets = b"".join(i.to_bytes(4, "little") for i in range(7))  # six texts of one byte each
    latin = pa.Array.from_buffers(pa.string(), 6, [None, pa.py_buffer(offsets), pa.py_buffer(b"ab\xe9def")])
    good = '{"A": "x", "B": "y"}'
    file = parquet(
        tmp_path / "x.parquet",
        id=[f"q{i}" for i in range(6)],
        question=latin,
        answer=["A", "A", "A", None, "A", "A"],
        options=[good, '{"A": "x", "A": "y"}', good, good, "x or y", '{"A": "x", "B": "x"}'],
    )
    loaded = load_questions([file], BadRows.SKIP)
    assert [q.id for q in loaded.questions] == ["q0"]
    assert [(p.line, p.problem) for p in loaded.skipped] == [
        (2, "options cannot be used: key 'A' occurs twice"),
        (3, "wrong encoding: question is not UTF-8"),
        (4, "no answer"),
        (5, "options cannot be used: Expecting value: line 1 column 1 (char 0)"),
        (6, "options A and B are the same: 'x'"),
    ]


def test_parquet_without_a_needed_column(tmp_path):
    file = parquet(tmp_path / "x.parquet", id=["a"], question=["b"], choices=["c"])
    with pytest.raises(DataError) as error:
        load_questions([file], BadRows.SKIP)
    assert str(error.value) == (
        f"{file}: has no column options, answer; its columns are id, question, choices: rename or add what is missing"
    )


def test_parquet_without_rows(tmp_path):
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({**TEXTS, "options": JSON_TEXT}).slice(0, 0), file)
    with pytest.raises(DataError, match="is empty"):
        load_questions([file])


def test_jsonl_and_parquet_of_the_same_rows_are_equal(tmp_path):
    rows = [row(1, level=2, context="c"), row(2)]
    jsonl = write(tmp_path / "x.jsonl", *rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert load_questions([jsonl]).questions == load_questions([tmp_path / "x.parquet"]).questions


# ----------------------------------------------------------------------------------------------------------- real data
@pytest.mark.skipif(not REAL.is_dir(), reason="the real medical files of ../shared/data are not on this machine")
@pytest.mark.parametrize(
    "name, rows, repeated_options, some_labels, all_labels",
    [
        ("train_medqa", 2706, 1, 0, 0),
        ("train_medmcqa", 7131, 20, 3, 6),
        ("train_pubmedqa", 950, 0, 0, 0),
        ("train_headqa_en", 2565, 2, 0, 0),
    ],
)
def test_real_files_load_through_the_same_path(name, rows, repeated_options, some_labels, all_labels):
    """Row counts are those of the data's own README; repeated options were counted with a script of a few lines, labels of one
    option ("b)Atenolol") and of all options by reading all that begin with a letter and a sign."""
    file = REAL / f"{name}.jsonl"
    loaded = load_questions([file], BadRows.SKIP)
    assert len(loaded.questions) == rows - repeated_options - some_labels
    assert sum("are the same" in p.problem for p in loaded.skipped) == repeated_options
    assert sum("carries" in p.problem for p in loaded.skipped) == some_labels == len(loaded.skipped) - repeated_options
    assert loaded.readings[0].labels_removed == all_labels
    if repeated_options:
        with pytest.raises(DataError, match="data.bad_rows=skip"):
            load_questions([file])
