"""What policies that do not read the question score: by hand on small sets, on a closed one, and what inspect says of it."""

import json

import pytest

from alphamed.cli import main
from alphamed.evaluation.blind import CONSTANT, EVER_KEY, LONGEST, SHARED, SHORTEST, blind_scores
from alphamed.records import Question


def question(i, stem, options, answer):
    return Question(f"q{i}", stem, dict(zip("ABCD", options)), answer)


SET = [
    question(0, "Which organ makes bile?", ("liver", "the spleen", "kidney"), "A"),
    question(1, "Which organ stores bile?", ("liver", "gall bladder", "lung"), "B"),
    question(2, "Which bladder holds urine?", ("gall bladder", "urinary bladder"), "B"),
    question(3, "Where is iron kept?", ("liver", "skin", "bone", "nail"), "A"),
]


def values(scores):
    return {score.policy: score.value for score in scores}


def test_scores_of_four_questions_by_hand():
    scores = values(blind_scores(SET))
    assert scores[CONSTANT] == 2 / 4  # A and B are right twice
    # q0: liver is a key of q3, the others of none -> right. q1: liver -> wrong. q2: "gall bladder" is a key of q1 -> wrong.
    # q3: liver is a key of q0 -> right
    assert scores[EVER_KEY] == 2 / 4
    assert scores[LONGEST] == (0 + 1 + 1 + 1) / 4  # "the spleen"; "gall bladder"; "urinary bladder"; "liver"
    assert scores[SHORTEST] == pytest.approx((1 + 0 + 0 + 0) / 4)  # "liver"; "lung"; "gall bladder"; three of 4 letters
    # no word of q0, q1 and q3 is shared: one of 3, 3 and 4 at random; q2: both share "bladder"
    assert scores[SHARED] == pytest.approx((1 / 3 + 1 / 3 + 1 / 2 + 1 / 4) / 4)
    for score in blind_scores(SET):
        assert score.chance == pytest.approx((1 / 3 + 1 / 3 + 1 / 2 + 1 / 4) / 4) and score.n == 4


def test_keys_are_learnt_from_the_training_questions_where_there_are_some():
    train = [question(9, "?", ("Lung.", "spleen"), "A"), question(8, "?", ("bone", "spleen"), "A")]
    scores = {score.policy: score for score in blind_scores(SET, train)}
    # q0 and q2: none was a key, 1/3 and 1/2; q1: "lung" -> wrong; q3: "bone" -> wrong
    assert scores[EVER_KEY].value == pytest.approx((1 / 3 + 0 + 1 / 2 + 0) / 4)
    assert scores[EVER_KEY].detail == "fitted on 2 training questions"


def test_words_are_shared_by_their_first_letters():
    asked = [question(1, "Which hypertensive drug?", ("the kidney", "portal hypertension", "liver"), "B")]
    assert values(blind_scores(asked))[SHARED] == 1.0


def test_a_set_without_questions_has_no_scores():
    assert blind_scores([]) == []


def closed(copies=50):
    """Two groups: every option is right as often as any other, every letter too."""
    groups = [("iron", "zinc", "copper", "iodine"), ("liver", "spleen", "kidney", "lung")]
    return [
        question(f"{g}-{i}-{c}", f"Stem {c} of {text}, of what?", texts, "ABCD"[i])
        for c in range(copies)
        for g, texts in enumerate(groups)
        for i, text in enumerate(texts)
    ]


def leaky(copies=50):
    """Right answers never serve as wrong options."""
    return [
        question(
            f"{i}-{c}", f"Stem {c} of {text}?", tuple(["x", "yy", "zzz"][:p] + [text] + ["x", "yy", "zzz"][p:]), "ABCD"[p]
        )
        for c in range(copies)
        for i, text in enumerate(("iron", "zinc"))
        for p in [(c + i) % 4]
    ]


def test_a_warning_needs_more_than_5_points_beyond_the_interval():
    (score,) = [score for score in blind_scores(leaky()) if score.policy == EVER_KEY]
    assert (score.value, score.n, score.chance) == (1.0, 100, 0.25) and score.beats_chance
    assert not any(score.beats_chance for score in blind_scores(closed()) if score.policy != SHARED)
    # 41 of 100: Wilson's lower end is 31.9% > 30%; 38 of 100: 29.1%
    for right, warned in ((41, True), (38, False)):
        even = ["BCD"[i % 3] for i in range(100 - right)]
        letters = ["A"] * right + even
        scores = blind_scores([question(i, "?", (f"a{i}", f"b{i}", f"c{i}", f"d{i}"), key) for i, key in enumerate(letters)])
        assert [score.beats_chance for score in scores if score.policy == CONSTANT] == [warned]


def write(path, questions):
    rows = [{"id": q.id, "question": q.question, "options": dict(q.options), "answer": q.answer} for q in questions]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_inspect_prints_and_writes_the_scores_and_warns(tmp_path, capsys):
    train, test = write(tmp_path / "train.jsonl", leaky()), write(tmp_path / "test.jsonl", leaky(10))
    assert main(["data", "inspect", str(test), "--train", str(train)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        "warning: without reading the question: was ever a key (fitted on 100 training questions) 100.0% [83.9%, 100.0%], "
        "chance 25.0%, n = 20" in lines
    )
    assert any(line.startswith("without reading the question: best constant letter (") for line in lines)
    numbers = json.loads((tmp_path / "test.json").read_text())
    assert numbers["blind_policies"]["was ever a key"]["accuracy"] == 1.0
    assert numbers["blind_policies"]["was ever a key"]["beats_chance"] is True
    assert "A blind policy beats chance" in {finding["title"] for finding in numbers["findings"]}
    page = (tmp_path / "test.html").read_text()
    assert "Without reading the question" in page and "fitted on 100 training questions" in page


def test_a_closed_set_is_not_warned_of(tmp_path, capsys):
    questions = [Question(q.id, f"Number {i}?", q.options, q.answer) for i, q in enumerate(closed())]
    assert main(["data", "inspect", str(write(tmp_path / "closed.jsonl", questions))]) == 0
    assert "warning" not in capsys.readouterr().out


def test_a_training_file_that_is_not_there_is_refused(tmp_path, capsys):
    test = write(tmp_path / "test.jsonl", leaky(10))
    assert main(["data", "inspect", str(test), "--train", str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl: no such file" in capsys.readouterr().err and not (tmp_path / "test.html").exists()
