"""JSON lines of every kind: what separates lines, what a reader takes in, and that writers write what readers read back."""

import json
import os
import socket
from pathlib import Path

import pytest

from alphamed import jsonl
from alphamed.cli import main
from alphamed.config.loading import load_config
from alphamed.data.output import question_writer
from alphamed.data.sources import load_questions
from alphamed.errors import ConfigError, DataError
from alphamed.evaluation.benchmarks import load_benchmark
from alphamed.evaluation.command import _shots
from alphamed.files import append_json, read_json_lines, replace_json, replace_json_lines
from alphamed.lab.bundle.archive import read_archive
from alphamed.lab.datasets.difficulty import content_of, read_work
from alphamed.lab.datasets.read_sources import annotations_of
from alphamed.lab.datasets.suspects import read_models
from alphamed.records import FinishReason, Outcome, Question, Rollout, RolloutGroup, ScoredGroup
from alphamed.rundir import evaluation_log
from alphamed.rundir.metrics import read_rows
from alphamed.rundir.rollout_files import read_rollouts, write_rollouts

SEPARATORS = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei\ufeffj"
"""All that str.splitlines cuts at but for line feed and carriage return, and a byte order mark amid the text."""
QUESTION = Question("q\u20281", f"Which {SEPARATORS}?", {"A": f"x{SEPARATORS}x", "B": "y"}, "A")
ROW = {"id": QUESTION.id, "question": QUESTION.question, "options": dict(QUESTION.options), "answer": "A"}
WAYS = {
    "plain": lambda text: text,
    "byte order mark": lambda text: b"\xef\xbb\xbf" + text,
    "Windows": lambda text: text.replace(b"\n", b"\r\n"),
    "no last line end": lambda text: text.removesuffix(b"\n"),
    "blank lines": lambda text: b"\n \r\n" + text + b"\n",
}


@pytest.fixture(params=WAYS)
def write(request, tmp_path):
    def write(name, *rows):
        text = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
        (tmp_path / name).write_bytes(WAYS[request.param](text))
        return tmp_path / name

    return write


# ------------------------------------------------------------------------------------------------------- files of people
def test_questions_levels_items_and_shots_are_read_however_their_lines_end(write):
    questions = write("questions.jsonl", ROW | {"level": 3}, ROW | {"id": "r", "level": 4})
    first, second = load_questions([questions]).questions
    assert (first.question, dict(first.options), first.level) == (QUESTION.question, dict(QUESTION.options), 3)
    assert load_benchmark(str(questions)).questions == (first, second)
    assert annotations_of(questions) == {QUESTION.id: {"level": 3}, "r": {"level": 4}}
    items = write("items.jsonl", ROW | {"letter": "A", "model": "m"}, ROW | {"id": "r", "letter": None, "model": "m"})
    assert [row["id"] for row in read_models([items])["m"]] == [QUESTION.id, "r"]
    shot = {"question": QUESTION.question, "options": dict(QUESTION.options), "response": "\\boxed{A}"}
    assert _shots(write("shots.jsonl", shot, shot)) == [shot, shot]


def test_a_set_with_line_separators_can_name_itself_as_its_levels(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("annotated.jsonl", ROW | {"level": 3}, ROW | {"id": "r", "level": 4})
    Path("recipe.yaml").write_text("sources: [{name: mine, path: annotated.jsonl, levels: annotated.jsonl}]\n")
    assert main(["data", "build", "--out", "o.jsonl", "--config", "recipe.yaml"]) == 0
    assert {q.id: q.level for q in load_questions(["o.jsonl"]).questions} == {QUESTION.id: 3, "r": 4}


def test_a_file_of_blank_lines_holds_no_worked_example(tmp_path):
    (tmp_path / "shots.jsonl").write_bytes(b"\xef\xbb\xbf\r\n \n")
    with pytest.raises(ConfigError, match="holds no example"):
        _shots(tmp_path / "shots.jsonl")


# ------------------------------------------------------------------------------------------- what the program writes itself
def test_what_is_written_is_read_back(tmp_path):
    row = {"text": SEPARATORS + "\r\n\t", "half": "a\ud800b\udfff", "none": None, "number": 1.5, "more": [{"x": "\u2028"}]}
    append_json(tmp_path / "a.jsonl", row)
    append_json(tmp_path / "a.jsonl", row)
    replace_json_lines(tmp_path / "b.jsonl", [row, row])
    replace_json(tmp_path / "c.json", row)
    assert read_json_lines(tmp_path / "a.jsonl") == read_json_lines(tmp_path / "b.jsonl") == [row, row]
    assert json.loads((tmp_path / "c.json").read_text(encoding="utf-8")) == row
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert b"\\ud800b\\udfff" in (tmp_path / "a.jsonl").read_bytes()


def test_numbers_that_json_has_not_become_nothing(tmp_path):
    append_json(tmp_path / "a.jsonl", {"x": float("nan"), "y": [float("inf")]})
    assert read_json_lines(tmp_path / "a.jsonl") == [{"x": None, "y": [None]}]


def test_questions_are_written_as_they_were(tmp_path):
    for name in ("a.jsonl", "a.parquet"):
        question_writer(tmp_path / name, [QUESTION])(tmp_path / name)
        assert load_questions([tmp_path / name]).questions == (QUESTION,)


def test_logs_and_work_files_of_the_program(tmp_path):
    evaluation_log.record(tmp_path, 3, "training", [(f"set {SEPARATORS}", "test", 5)])
    assert evaluation_log.sentences(tmp_path) == [f"Test set set {SEPARATORS} was evaluated once (step 3)."]
    append_json(tmp_path / "metrics.jsonl", {"step": 1, "loss": 0.5})
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]
    append_json(
        tmp_path / "shard-1-of-1.jsonl",
        {
            "id": QUESTION.id,
            "content": content_of(QUESTION),
            "outcomes": ["correct"],
            "letters": ["A"],
            "tokens": [3],
            "question_tokens": 4,
        },
    )
    assert set(read_work(tmp_path, [QUESTION], 1)) == {QUESTION.id}


def test_half_a_surrogate_pair_in_a_response_does_not_stop_the_rollout_file(tmp_path):
    rollout = Rollout("g", QUESTION.id, 0, (1,), (-0.5,), f"{SEPARATORS}\ud800\\boxed{{A}}", FinishReason.STOP, 0)
    scored = ScoredGroup(RolloutGroup("g", QUESTION, (1,), (rollout,)), (Outcome.CORRECT,), (1.0,), (0.0,), ("A",), 0.1)
    write_rollouts(tmp_path / "r.parquet", 1, [scored])
    (read,) = read_rollouts(tmp_path / "r.parquet")
    assert read.group.rollouts[0].text == f"{SEPARATORS}?\\boxed{{A}}" and read.group.question == QUESTION


def test_half_a_last_line_is_left_out_and_cut_off_by_the_next(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"x": 1}\n{"x": "\xe2\x80')
    assert read_json_lines(tmp_path / "a.jsonl") == [{"x": 1}]
    append_json(tmp_path / "a.jsonl", {"x": 2})
    assert read_json_lines(tmp_path / "a.jsonl") == [{"x": 1}, {"x": 2}]


@pytest.mark.parametrize(
    "line, problem",
    [
        (b'{"x": 1, "x": 2}', "line 1 is not JSON that can be used: key 'x' occurs twice; remove it"),
        (b"[" * 100_000, "line 1 is not JSON that can be used: maximum recursion depth"),
        (b'{"x": "\xe9"}', "line 1 is wrong encoding: byte 0xe9 at byte 8 of the line is not UTF-8; remove it"),
        (b"{", "line 1 is not JSON: Expecting property name enclosed in double quotes at character 2; remove it"),
        (b"[1]", "line 1 is no JSON object; remove it"),
    ],
)
def test_a_line_that_is_none_is_named(tmp_path, line, problem):
    (tmp_path / "a.jsonl").write_bytes(line + b"\n")
    with pytest.raises(ConfigError) as error:
        read_json_lines(tmp_path / "a.jsonl")
    assert str(error.value).startswith(f"{tmp_path / 'a.jsonl'}: {problem}") and "\n" not in str(error.value)


def test_values_of_plain_json_are_read_as_json_reads_them():
    value = {"a": [1, 2.5, None, True, "\u00e9\U0001f600", {"b": {}}], "c": "\u2028"}
    assert jsonl.parse(json.dumps(value).encode()) == jsonl.parse(jsonl.line(value)) == value


# ---------------------------------------------------------------------------------------------------- no regular files
def pipe(path):
    os.mkfifo(path)
    return path


def device(path):
    path.symlink_to("/dev/zero")
    return path


@pytest.mark.parametrize("make, what", [(pipe, "it is a named pipe"), (device, "it is a device")])
@pytest.mark.parametrize(
    "read, error",
    [
        (lambda file: load_questions([file]), DataError),
        (annotations_of, DataError),
        (lambda file: load_benchmark(f"medqa={file}"), DataError),
        (lambda file: load_benchmark(str(file)), DataError),
        (lambda file: read_models([file]), DataError),
        (_shots, ConfigError),
        (read_json_lines, ConfigError),
    ],
)
def test_a_pipe_or_a_device_is_refused_and_not_waited_for(tmp_path, make, what, read, error):
    with pytest.raises(error, match=f"x.jsonl: cannot be read \\({what}, not a regular file\\)"):
        read(make(tmp_path / "x.jsonl"))


def test_a_socket_is_refused_and_a_link_is_followed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # addresses of sockets are short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("x.jsonl")
        with pytest.raises(DataError, match="it is a socket, not a regular file"):
            load_questions(["x.jsonl"])
    Path("real").write_bytes(jsonl.line(ROW))
    Path("link.jsonl").symlink_to("real")
    assert [q.id for q in load_questions(["link.jsonl"]).questions] == [QUESTION.id]


def test_a_named_pipe_is_no_configuration_nor_a_bundle(tmp_path):
    """Nobody writes to it: reading would wait for ever. The pipe of `<(command)` has no name, and a writer."""
    with pytest.raises(ConfigError, match="config .*: is a named pipe, not a file"):
        load_config(pipe(tmp_path / "run.yaml"))
    with pytest.raises(ConfigError, match="bundle .*: .*a named pipe, not a regular file"):
        read_archive(pipe(tmp_path / "b.tar.gz"))
    read, write = os.pipe()
    os.write(write, b"model: {path: m}\ndata: {train: [a.jsonl]}\n")
    os.close(write)
    assert load_config(f"/dev/fd/{read}").model.path == "m"
    os.close(read)
