"""What the report says beside a gain: blind policies fitted on the training questions, agreement, the facts of a lesson."""

import json
from pathlib import Path

import pytest

from alphamed.config.loading import build_config, dump_config
from alphamed.errors import ConfigError
from alphamed.evaluation.runner import Evaluation, QuestionSet, SetResult, summary, write_evaluation
from alphamed.evaluation.score import score
from alphamed.files import replace_text
from alphamed.lab.reports import choices
from alphamed.lab.reports.report import evaluations, set_reports, write_report
from alphamed.lab.reports.summary import summary as run_summary
from alphamed.records import FinishReason, Outcome, Question, Rollout, RolloutGroup, ScoredGroup

KEYS = ("iron", "zinc", "iodine", "copper")


def closed(i):
    """Questions 4n to 4n + 3 share their options; each is right once."""
    return Question(f"q{i}", f"Number {i}?", dict(zip("ABCD", KEYS)), "ABCD"[i % 4])


def leaky(i):
    """The key is one of two texts that are never wrong options."""
    texts = ["salt", "sugar", "water"]
    texts.insert(i % 4, KEYS[i % 2])
    return Question(f"q{i}", f"Number {i}?", dict(zip("ABCD", texts)), "ABCD"[i % 4])


def graded(question, letter, text=None):
    text = f" {question.options[letter]} ({letter}) \\boxed{{{letter}}}" if letter and text is None else text or "no"
    outcome = Outcome.UNPARSEABLE if letter is None else Outcome.CORRECT if letter == question.answer else Outcome.WRONG
    rollout = Rollout(question.id, question.id, 0, (1, 2), (-0.5, -0.5), text, FinishReason.STOP, 0)
    group = RolloutGroup(question.id, question, (1,), (rollout,))
    return ScoredGroup(group, (outcome,), (0.0,), (0.0,), (letter,))


def evaluation(groups):
    questions = tuple(group.group.question for group in groups)
    return Evaluation(
        0, (SetResult(QuestionSet("set", Path("s.jsonl"), questions, len(groups)), groups, score(groups)),), 1.0
    )


def evaluate(run_dir, step, groups):
    write_evaluation(run_dir / "evaluations", f"step_{step:06d}", step, evaluation(tuple(groups)))


@pytest.fixture
def run_dir(tmp_path):
    config = build_config({"model": {"path": "m"}, "data": {"train": [str(tmp_path / "train.jsonl")]}})
    replace_text(tmp_path / "config.yaml", dump_config(config))
    return tmp_path


def write_train(run_dir, make, count=40):
    rows = [{"id": q.id, "question": q.question, "options": q.options, "answer": q.answer} for q in map(make, range(count))]
    (run_dir / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def half_right(make, count=200):
    """Right for every other question, else the next letter."""
    for i in range(count):
        question = make(i)
        yield graded(question, question.answer if i % 8 < 5 else "ABCD"[(i + 1) % 4])


def test_a_gain_above_all_blind_policies(run_dir):
    write_train(run_dir, closed)
    evaluate(run_dir, 0, [graded(closed(i), "C") for i in range(200)])
    evaluate(run_dir, 5, half_right(closed))  # 125 of 200
    (report,) = set_reports(run_dir, evaluations(run_dir))
    assert report.sentences[-1] == (
        "Without reading the question: best constant letter (A) 25.0% [19.5%, 31.4%], was ever a key (fitted on 40 training "
        "questions) 25.0% [19.5%, 31.4%], longest option 25.0% [19.5%, 31.4%], shortest option 25.0% [19.5%, 31.4%], most words "
        "shared with the question 25.0% [19.5%, 31.4%]; chance 25.0%. The share of correct answers is above all of them, "
        "outside its interval."
    )
    assert f"  {report.sentences[-1]}" in run_summary(run_dir)
    assert any(text.startswith("Knowledge: ") for text in report.sentences)
    assert "Without reading the question" in write_report(run_dir).read_text()
    numbers = json.loads((run_dir / "report.json").read_text())["choices"]["set"]
    assert numbers["blind_policies"]["was ever a key"]["accuracy"] == 0.25
    assert numbers["choices"]["letters"]["A"] == {"share": 3 / 8, "even": 0.25}
    assert ("Text and letter agree", "100.0% [98.1%, 100.0%]", "100.0% [98.1%, 100.0%]") in report.table
    # A, B, C and D are chosen 3, 1, 2 and 2 times in 8: 1.9056 bits, Miller's 3 / 400 nats more, of 2
    assert ("Entropy of letters", "0% of an even choice's", "96% of an even choice's") in report.table


def test_a_gain_that_needs_no_question(run_dir):
    """125 of 200 are right, but whoever picks what was a key in training has all 200."""
    write_train(run_dir, leaky)
    evaluate(run_dir, 0, [graded(leaky(i), "C") for i in range(200)])
    evaluate(run_dir, 5, half_right(leaky))
    (report,) = set_reports(run_dir, evaluations(run_dir))
    assert "was ever a key (fitted on 40 training questions) 100.0% [98.1%, 100.0%]" in report.sentences[-1]
    assert report.sentences[-1].endswith(
        "The share of correct answers (62.5% [55.6%, 68.9%]) is not shown to be above the best of them, so that it shows no "
        "knowledge."
    )
    for text in (" ".join(report.sentences), "\n".join(run_summary(run_dir))):
        assert "Knowledge:" not in text and "not more than without reading the question (100.0%)" in text


def test_without_the_training_files_the_set_itself_is_fitted_on(run_dir):
    evaluate(run_dir, 0, [graded(leaky(i), "C") for i in range(200)])
    evaluate(run_dir, 5, half_right(leaky))
    assert (
        "was ever a key (fitted on all other questions of the set) 100.0%"
        in set_reports(run_dir, evaluations(run_dir))[0].sentences[-1]
    )
    (run_dir / "train.jsonl").write_text('{"prompt": "no question", "responses": ["x"]}\n')
    assert "(fitted on all other questions of the set)" in set_reports(run_dir, evaluations(run_dir))[0].sentences[-1]


def test_one_evaluation_claims_no_gain(run_dir):
    evaluate(run_dir, 0, [graded(closed(i), "C") for i in range(20)])
    (report,) = set_reports(run_dir, evaluations(run_dir))
    assert report.sentences == () and ("Text and letter agree", "100.0% [83.9%, 100.0%]", "") in report.table


def test_the_console_says_how_responses_choose():
    first, second = summary(evaluation(tuple(graded(closed(i), "AC"[i % 2]) for i in range(40))))
    assert first.startswith("evaluation of set (n = 40): accuracy 25.0%")
    assert second.startswith(
        "  text and letter agree in 100.0% of 40 boxed answers that name an option; letters A 50.0%, B 0.0%"
    )


# --------------------------------------------------------------------------------------------------- a lesson in form
def facts(run_dir, groups):
    evaluate(run_dir, 0, groups)
    return run_dir / "evaluations" / "step_000000.items.jsonl"


def test_the_four_facts_after_a_lesson(run_dir, capsys):
    """Every letter for a quarter of each key's questions: 50 of 200 are right."""
    path = facts(run_dir, [graded(closed(i), "ABCD"[i // 4 % 4]) for i in range(208)])
    assert choices.main(path) == 0
    assert capsys.readouterr().out.splitlines() == [
        "set: boxes always: yes: 100.0% [98.2%, 100.0%]",
        "set: text names the boxed option: yes: 100.0% [98.2%, 100.0%] of 208 answers that name one",
        "set: chooses evenly: yes: letters A 25.0%, B 25.0%, C 25.0%, D 25.0%; entropy 100.0% of an even choice's, of option "
        "texts 100.0%; one answer to each question, so that small likings decide if it is greedy (--samples 4 shows how small)",
        "set: knows no more than chance: yes: right 25.0% [19.6%, 31.3%], chance 25.0%",
    ]


@pytest.mark.parametrize(
    ("answer", "failing"),
    [
        (lambda i: graded(closed(i), "ABCD"[i // 4 % 4] if i % 10 else None), ["boxes always"]),
        (lambda i: graded(closed(i), "ABCD"[i // 4 % 4], "zinc" if i % 5 == 0 else None), ["text names the boxed option"]),
        (lambda i: graded(closed(i), "ABCD"[i // 4 % 4], "so it is"), ["text names the boxed option"]),
        (lambda i: graded(closed(i), "ABCDA"[i // 4 % 5]), ["chooses evenly"]),
        (lambda i: graded(closed(i), "ABCD"[i % 4]), ["knows no more than chance"]),
        (lambda i: graded(closed(i), "C"), ["chooses evenly"]),
    ],
)
def test_each_fact_can_fail(run_dir, capsys, answer, failing):
    assert choices.main(facts(run_dir, [answer(i) for i in range(200)])) == 1
    assert [line.split(": ")[1] for line in capsys.readouterr().out.splitlines() if ": NO: " in line] == failing


@pytest.mark.parametrize(
    ("samples", "shown", "holds"),
    [
        # 16 answers to each of four questions. 4 of every letter: 4 x 6 of 120 pairs are alike. 8, 3, 3 and 2: 28 + 3 + 3 + 1
        ("AAAABBBBCCCCDDDD", "20.0%", True),
        ("AAAAAAAABBBCCCDD", "29.2%", True),
        # 12, 2, 1 and 1: 66 + 1; the liked option has another letter in each question, so that letters are even
        ("AAAAAAAAAAAABBCD", "55.8%", False),
    ],
)
def test_several_samples_show_likings(samples, shown, holds):
    """Even choice among four options gives 25% of pairs that are alike; more than half as much again is uneven."""
    turned = [{letter: "ABCD"[(place + turn) % 4] for place, letter in enumerate("ABCD")} for turn in range(4)]
    rows = [
        {"id": f"q{i}", "options": dict(closed(i).options), "answer": closed(i).answer, "text": "", "outcome": "wrong"}
        | {"letter": turned[i][letter]}
        for i in range(4)
        for letter in samples
    ]
    _, _, even, _ = choices.form_facts(choices.choices_of(rows))
    assert even.detail.endswith(f"two answers to a question are alike in {shown} of pairs, even choice 25.0%")
    assert even.holds is holds and "letters A 25.0%, B 25.0%" in even.detail


def test_a_file_without_answers_is_refused(tmp_path):
    (tmp_path / "items.jsonl").write_text("")
    with pytest.raises(ConfigError, match="holds no graded answer"):
        choices.main(tmp_path / "items.jsonl")
