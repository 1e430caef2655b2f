"""Difficulty: levels by hand, shards that repeat nothing after a kill, columns beside the questions, build's axes."""

import contextlib
import json
from pathlib import Path

import pytest
from tiny import tiny_hf

from alphamed import cli
from alphamed.data.sources import load_questions
from alphamed.data.tokenizer import load_tokenizer
from alphamed.evaluation import answers
from alphamed.lab.datasets.difficulty import INFORMATIVENESS, by_length, level_of, shard_of
from alphamed.records import FinishReason, Outcome, Question, Rollout, RolloutGroup, ScoredGroup
from alphamed.reward.rules import correct, grade


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_hf(tmp_path_factory.mktemp("models") / "tiny", head_dim=32)


# --------------------------------------------------------------------------------------------------------------- levels
def test_levels_of_five_samples_are_the_papers():
    assert [level_of(right, 5) for right in (5, 4, 3, 2, 1, 0)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "right, samples, level",
    [
        (1, 1, 1),
        (0, 1, 6),
        (1, 2, 4),  # 0.5 lies between 0.6 and 0.4: the harder
        (1, 3, 4),
        (2, 3, 3),  # 0.33 is nearest to 0.4, 0.67 to 0.6
        (7, 8, 2),
        (1, 8, 5),
        (99, 100, 2),
        (1, 100, 5),  # not all and not none: never 1 or 6
        (7, 10, 3),
        (9, 10, 2),
        (3, 10, 5),
    ],
)  # 0.7 as near to 0.8 as to 0.6: the harder; 0.3 likewise
def test_levels_of_any_number_of_samples(right, samples, level):
    assert level_of(right, samples) == level


def test_levels_never_rise_with_more_right_answers():
    for samples in range(1, 40):
        levels = [level_of(right, samples) for right in range(samples + 1)]
        assert levels == sorted(levels, reverse=True) and (levels[0], levels[-1]) == (6, 1)


@pytest.mark.parametrize("right, samples", [(2, 1), (-1, 5), (0, 0)])
def test_impossible_counts_are_refused(right, samples):
    with pytest.raises(ValueError, match="samples cannot be right"):
        level_of(right, samples)


def test_bins_of_length():
    assert [by_length(None, tokens) for tokens in (1, 49, 50, 99, 100, 199, 200, 4000)] == [1, 1, 2, 2, 3, 3, 4, 4]


# -------------------------------------------------------------------------------------------------------------- running
def rows(count):
    return [
        {
            "id": f"q{i}",
            "question": f"Which is {i}? " + "word " * (20 * i),
            "answer": "A",
            "source": "s",
            "level": 6,
            "options": {"A": f"one {i}", "B": f"two {i}"},
        }
        for i in range(count)
    ]


def write(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(name)


@pytest.fixture()
def engines(tmp_path, monkeypatch):
    """In place of the engines: question qI gets its first I samples right, the next ends without a box, the rest say B."""
    monkeypatch.chdir(tmp_path)
    sent, limits = [], {"dies_after": None}

    def says(question, j):
        right = int(question.id[1:])
        return "\\boxed{A}" if j < right else "no box" if j == right else "so it is \\boxed{B}"

    def answer(tasks):
        for task in tasks:
            if len(sent) == limits["dies_after"]:
                raise KeyboardInterrupt
            sent.append(task)
            texts = [says(task.question, j) for j in range(task.sampling.n)]
            rollouts = tuple(
                Rollout(task.group_id, task.question.id, j, tuple(range(len(text.split()))), (), text, FinishReason.STOP, 0)
                for j, text in enumerate(texts)
            )
            marks = [grade(task.question, text, FinishReason.STOP, correct) for text in texts]
            yield ScoredGroup(
                RolloutGroup(task.group_id, task.question, task.prompt_token_ids, rollouts),
                tuple(mark.outcome for mark in marks),
                (0.0,) * len(texts),
                (0.0,) * len(texts),
                tuple(mark.letter for mark in marks),
            )

    monkeypatch.setattr(answers, "answering", lambda config, model: contextlib.nullcontext(answer))
    return sent, limits


def annotate(model, *rest, questions="q.jsonl", out="out.jsonl"):
    return cli.main(
        [
            "data",
            "difficulty",
            "--questions",
            questions,
            "--model",
            str(model),
            "--out",
            out,
            *rest,
            "rollout.max_response_tokens=16",
            "rollout.dtype=fp32",
            "cluster.device=cpu",
        ]
    )


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_questions_get_their_columns(model, engines, capsys, suffix):
    write("q.jsonl", rows(6))
    assert annotate(model, out=f"out.{suffix}") == 0
    tasks, _ = engines
    assert {(task.sampling.n, task.sampling.temperature) for task in tasks} == {(5, 1.0)}
    questions = load_questions([f"out.{suffix}"]).questions
    assert [(q.id, q.level) for q in questions] == [("q0", 6), ("q1", 5), ("q2", 4), ("q3", 3), ("q4", 2), ("q5", 1)]
    import pandas

    table = pandas.read_json("out.jsonl", lines=True) if suffix == "jsonl" else pandas.read_parquet("out.parquet")
    assert list(table["pass_rate"]) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])  # pandas rounds when it reads JSON
    assert list(table["unparsed"]) == [0.2] * 5 + [0.0]
    assert table["response_tokens_mean"][2] == pytest.approx((1 + 1 + 2 + 4 + 4) / 5)  # words, as the script counts
    assert set(table["samples"]) == {5} and set(table["annotated_by"]) == {"tiny"}
    tokenizer = load_tokenizer(model)
    lengths = [len(tokenizer.encode(row["question"].strip())) for row in rows(6)]
    assert list(table["question_tokens"]) == lengths and lengths[0] < 50 < 200 < lengths[5]
    assert [q.informativeness for q in questions] == [1 + (n >= 50) + (n >= 100) + (n >= 200) for n in lengths]
    assert "6 questions, pass rate 50.0%; L1 1, L2 1, L3 1, L4 1, L5 1, L6 1" in capsys.readouterr().out


def test_a_killed_annotation_repeats_no_finished_question(model, engines, capsys):
    write("q.jsonl", rows(6))
    tasks, limits = engines
    limits["dies_after"] = 4
    assert annotate(model) == 130 and not Path("out.jsonl").exists()
    shard = Path("out.jsonl.work/shard-1-of-1.jsonl")
    with shard.open("a") as lines:
        lines.write('{"id": "q4", "cont')  # the kill came in the middle of a line
    first, limits["dies_after"] = [task.question.id for task in tasks], None
    tasks.clear()
    assert annotate(model) == 0
    assert sorted(first + [task.question.id for task in tasks]) == [f"q{i}" for i in range(6)]
    assert len(load_questions(["out.jsonl"]).questions) == 6 == len(shard.read_text().splitlines())


def test_shards_share_the_questions_and_the_last_one_writes(model, engines, capsys):
    write("q.jsonl", rows(6))
    tasks, _ = engines
    parts = {i: [f"q{n}" for n in range(6) if shard_of(Question(f"q{n}", "?", {}, "A"), 2) == i] for i in (1, 2)}
    assert all(parts.values()) and sorted(parts[1] + parts[2]) == [f"q{n}" for n in range(6)]
    assert annotate(model, "--shard", "1/2") == 0 and not Path("out.jsonl").exists()
    assert [task.question.id for task in tasks] == parts[1]
    assert f"{len(parts[1])} of 6 questions are annotated" in capsys.readouterr().out
    tasks.clear()
    assert annotate(model, "--shard", "2/2") == 0 and Path("out.jsonl").exists()
    assert [task.question.id for task in tasks] == parts[2]


def test_another_measure_of_informativeness_asks_nothing_again(model, engines, monkeypatch):
    monkeypatch.setitem(INFORMATIVENESS, "options", lambda question, tokens: len(question.options))
    write("q.jsonl", rows(2))
    tasks, _ = engines
    assert annotate(model) == 0
    tasks.clear()
    assert annotate(model, "--informativeness", "options") == 2 and tasks == []  # the set is there
    assert annotate(model, "--informativeness", "options", "--overwrite") == 0 and tasks == []
    assert [q.informativeness for q in load_questions(["out.jsonl"]).questions] == [2, 2]


def test_a_question_with_another_text_is_asked_anew(model, engines):
    tasks, _ = engines
    annotate(model, questions=write("q.jsonl", rows(3)))
    tasks.clear()
    annotate(model, "--overwrite", questions=write("q.jsonl", [rows(3)[0], rows(3)[1] | {"question": "Other?"}, rows(3)[2]]))
    assert [task.question.id for task in tasks] == ["q1"]


def test_build_filters_by_informativeness_and_keeps_it(model, engines):
    write("q.jsonl", rows(6))
    annotate(model)
    assert cli.main(["data", "build", "--out", "set.jsonl", "--from", "out.jsonl", "filter.informativeness=[4]"]) == 0
    long = [q.id for q in load_questions(["out.jsonl"]).questions if q.informativeness == 4]
    assert sorted(q.id for q in load_questions(["set.jsonl"]).questions) == long != []
    assert json.loads(Path("set.card.json").read_text())["set"]["informativeness"] == {"4": len(long)}


@pytest.mark.parametrize(
    "rest, message",
    [
        (["--shard", "3/2"], "--shard: '3/2' is not I/N with I from 1 to N"),
        (["--samples", "0"], "--samples: 0 is no number of samples; give 1 or more"),
        (
            ["--temperature", "0"],
            "--temperature: 0 makes all answers the same, which measures no difficulty; give one above 0",
        ),
        (["--temperature", "-1"], "--temperature: -1.0 is not between 0 and 10"),
        (["--temperature", "inf"], "--temperature: inf is not between 0 and 10"),
        (["--top-p", "7"], "--top-p: 7.0 is not above 0 and at most 1"),
        (["--out", "out.csv"], "--out: 'out.csv' ends neither in .jsonl nor in .parquet"),
        (["--model", "nowhere"], "model.path"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(model, engines, capsys, rest, message):
    write("q.jsonl", rows(2))
    assert annotate(model, *rest) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
    assert sorted(path.name for path in Path(".").iterdir()) == ["q.jsonl"]


def test_other_settings_do_not_mix(model, engines, capsys):
    write("q.jsonl", rows(2))
    assert annotate(model) == 0
    assert annotate(model, "--samples", "3", "--overwrite") == 2
    assert "sampling.samples 5, now it is 3" in capsys.readouterr().err


def test_outcomes_of_the_grader_that_are_no_answer_are_no_right_ones():
    from alphamed.lab.datasets.difficulty import Annotated

    annotation = Annotated(
        "q",
        "",
        (Outcome.CORRECT, Outcome.TRUNCATED, Outcome.UNPARSEABLE, Outcome.WRONG),
        ("A", "A", None, "B"),
        (4, 16, 3, 5),
        9,
        (True, True, False, False),
    )
    assert annotation.columns("m") == {
        "pass_rate": 0.25,
        "samples": 4,
        "unparsed": 0.25,
        "truncated": 0.5,  # one cut, yet right
        "response_tokens_mean": 7.0,
        "question_tokens": 9,
        "annotated_by": "m",
    }
    assert annotation.level == 5  # 0.25 is nearest to 0.2


def test_a_cut_answer_that_is_graded_all_the_same_counts_as_truncated():
    """reward.truncated=grade: the first answer is right and was cut."""
    from alphamed.lab.datasets.difficulty import annotated

    question = Question("q", "Which?", {"A": "this", "B": "that"}, "A")
    ends = (FinishReason.LENGTH, FinishReason.STOP)
    rollouts = tuple(Rollout("g", "q", j, (1, 2), (), "\\boxed{A}", end, 0) for j, end in enumerate(ends))
    right = (Outcome.CORRECT,) * 2
    annotation = annotated(
        ScoredGroup(RolloutGroup("g", question, (1,), rollouts), right, (1.0, 1.0), (0.0, 0.0), ("A", "A")), 9
    )
    columns = annotation.columns("m")
    assert (columns["pass_rate"], columns["truncated"]) == (1.0, 0.5)


def test_annotations_of_before_cuts_were_recorded_are_read(tmp_path):
    from alphamed.lab.datasets.difficulty import content_of, read_work

    question = Question("q", "Which?", {"A": "this", "B": "that"}, "A")
    row = {
        "id": "q",
        "content": content_of(question),
        "outcomes": ["truncated", "correct"],
        "letters": [None, "A"],
        "tokens": [16, 3],
        "question_tokens": 9,
    }
    (tmp_path / "shard-1-of-1.jsonl").write_text(json.dumps(row) + "\n")
    assert read_work(tmp_path, [question], 2)["q"].columns("m")["truncated"] == 0.5
