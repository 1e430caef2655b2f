"""How texts are compared and counted: signs that look alike, and scripts without spaces between words."""

import json
from pathlib import Path

import pytest

from alphamed.cli import main
from alphamed.data.mcq import QuestionError, parse_question
from alphamed.data.text import content_length, content_words, normalised, normalised_option, option_set, word_count, words
from alphamed.lab.datasets.decontaminate import MatchRule, find_hits
from alphamed.lab.datasets.matching import similar_pairs
from alphamed.lab.datasets.suspects import suspects
from alphamed.lab.reports.response_patterns import ResponsePattern, repetition, response_patterns
from alphamed.records import Outcome, Question
from alphamed.rundir.metrics import is_bare_box


def question(name, stem, options, answer="A"):
    return Question(name, stem, dict(zip("ABCDEF", options)), answer)


# ----------------------------------------------------------------------------------------------- signs that look alike
TYPED = ("Graves' disease", "Tay-Sachs disease", "Stress fracture", "5-10 mg", "infiltration")
TYPESET = (
    "Graves\u2019\u00a0disease",
    "Tay\u2010Sachs dis\u00adease",
    'Stress \u200bfrac\u2060ture\n"',
    "5\u201310\u202fmg",
    "in\ufb01ltration",
)


@pytest.mark.parametrize("typed, typeset", list(zip(TYPED, TYPESET)))
def test_words_and_options_are_the_same_however_they_are_typeset(typed, typeset):
    assert words(typed) == words(typeset) and normalised_option(typed) == normalised_option(typeset)


def test_options_without_words_are_compared_as_signs():
    assert normalised_option("\u2212") == normalised_option("-") != normalised_option("+")
    assert option_set({"A": "\u2013", "B": "+"}) == option_set({"A": "+ ", "B": "-"})


def test_a_typeset_copy_is_contamination_a_repeat_and_a_conflict(tmp_path, monkeypatch):
    stem = "Which is Hashimoto's - the auto-immune one?"
    typeset = "Which is Hashimoto\u2019s \u2013 the auto\u2011immune\u200b one?"
    first, second = question("a", stem, TYPED), question("b", typeset, TYPESET)
    assert [hit.rule for hit in find_hits([first], {"x": [second]})] == [MatchRule.EXACT]
    assert suspects([first, question("c", typeset, TYPESET, "B")], {}).keys() == {"a", "c"}
    monkeypatch.chdir(tmp_path)
    rows = [{"id": q.id, "question": q.question, "options": dict(q.options), "answer": "A"} for q in (first, second)]
    Path("x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "build", "--out", "o.jsonl", "--from", "x.jsonl", "drop_repeats=true"]) == 0
    (line,) = Path("o.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["options"] == dict(first.options)  # what is written is as it was read


ROW = {"id": "q", "question": "Which?", "options": {"A": "x", "B": "y"}, "answer": "A"}


@pytest.mark.parametrize(
    "change, problem",
    [
        (
            {"options": {"A": "Graves' disease", "B": "Graves\u2019 disease"}},
            'options A and B are the same: "Graves\' disease"',
        ),
        ({"options": {"A": "5-10", "B": "x", "C": "5\u201310\ufeff"}}, "options A and C are the same: '5-10'"),
        ({"options": {"A": "x", "B": "\u200b\ufeff"}}, "option B is empty"),
        ({"question": "\u200b \u2060"}, "question is empty"),
    ],
)
def test_options_that_look_the_same_and_texts_that_show_nothing_are_refused(change, problem):
    with pytest.raises(QuestionError) as error:
        parse_question(ROW | change, "f:1")
    assert error.value.problem == problem


def test_options_that_differ_by_a_raised_digit_are_two():
    options = {"A": "10\u00b2", "B": "102"}
    assert dict(parse_question(ROW | {"options": options}, "f:1").options) == options


# ---------------------------------------------------------------------------------------------- scripts without spaces
@pytest.mark.parametrize(
    "text, expected",
    [
        ("\u60a3\u800545\u5c81", ["\u60a3", "\u8005", "45", "\u5c81"]),
        ("\u7ef4\u751f\u7d20B12 7.4\u7f3a\u4e4f", ["\u7ef4", "\u751f", "\u7d20", "b12", "7.4", "\u7f3a", "\u4e4f"]),
        ("\u8840\u538b\uff0c\u9ad8\u3002", ["\u8840", "\u538b", "\u9ad8"]),
        ("\u30d3\u30bf\u30df\u30f3\u306e", ["\u30d3", "\u30bf", "\u30df", "\u30f3", "\u306e"]),
        ("\uff8b\uff9e", ["\u30d3"]),  # half-width, in two signs
        (
            "\u0e44\u0e21\u0e48\u0e21\u0e35",
            ["\u0e44", "\u0e21\u0e48", "\u0e21\u0e35"],
        ),  # Thai: marks stay on their characters
        ("\u1019\u103b\u102c\u1038", ["\u1019\u103b\u102c\u1038"]),  # Burmese
        ("\ud608\uc555 \ub192\ub2e4", ["\ud608\uc555", "\ub192\ub2e4"]),  # Korean has blanks
        ("High blood pressure", ["high", "blood", "pressure"]),
    ],
)
def test_words_of_scripts_without_blanks_are_characters(text, expected):
    assert words(text) == expected


def test_blanks_and_punctuation_between_characters_do_not_count():
    assert normalised("\u9ad8\u8840\u538b\u3001 \u75c5 B12\u7f3a\u4e4f") == "\u9ad8\u8840\u538b\u75c5 b12 \u7f3a\u4e4f"
    assert normalised("\u9ad8\u8840\u538b\u75c5\uff0cB12 \u7f3a \u4e4f") == "\u9ad8\u8840\u538b\u75c5 b12 \u7f3a\u4e4f"


SAME = [
    (
        "一名45岁男性患者，上腹部疼痛三天并伴有恶心呕吐，血淀粉酶升高，最可能的诊断是",
        "患者男，45岁，上腹部疼痛三天，伴恶心呕吐，血淀粉酶升高，最可能的诊断是",
    ),
    ("下列哪项是急性心肌梗死最具特征性的心电图改变", "急性心肌梗死最具特征性的心电图改变是下列哪一项"),
    ("维生素B12缺乏可引起哪种贫血", "缺乏维生素B12会引起哪种贫血"),
    ("治疗肺炎链球菌肺炎的首选抗生素是", "肺炎链球菌肺炎治疗首选的抗生素为"),
    ("使用warfarin的病人监测INR的目的是什么", "病人使用warfarin时，监测INR的目的是"),
    (
        "45歳の男性。3日前からの上腹部痛と悪心を主訴に来院した。血清アミラーゼ高値。最も考えられる診断はどれか",
        "45歳男性。上腹部痛と悪心が3日前から続き来院。血清アミラーゼは高値。最も考えられる診断はどれか",
    ),
    (
        "ผู้ป่วยชายอายุ 45 ปี ปวดท้องส่วนบนมา 3 วัน ร่วมกับคลื่นไส้อาเจียน ค่าอะไมเลสในเลือดสูง การวินิจฉัยที่เป็นไปได้มากที่สุดคืออะไร",
        "ชายอายุ 45 ปี ปวดท้องส่วนบน 3 วัน คลื่นไส้อาเจียน ค่าอะไมเลสในเลือดสูง วินิจฉัยที่เป็นไปได้มากที่สุดคือ",
    ),
]
OTHER = [
    ("下列关于糖尿病患者足部护理的说法，正确的是", "下列关于糖尿病患者胰岛素注射的说法，正确的是"),
    ("下列哪项是急性心包炎最具特征性的心电图改变", "下列哪项是高钾血症最具特征性的心电图改变"),
    ("治疗支原体肺炎的首选药物是", "治疗军团菌病的首选药物是"),
    ("缺铁可引起哪种贫血", "缺铜可引起哪种疾病"),
    (
        "患者女，60岁，胸骨后疼痛两小时，向左肩放射，心电图ST段抬高，最可能的诊断是",
        "患者女，60岁，突发右侧肢体无力两小时，头颅CT未见出血，最可能的诊断是",
    ),
    ("下列药物中，属于β受体阻滞剂的是", "下列药物中，属于钙通道阻滞剂的是"),
    ("高血圧の第一選択薬はどれか", "糖尿病の第一選択薬はどれか"),
]


def test_reworded_questions_are_found_and_others_with_the_same_template_are_not():
    """All with one answer, so that the stems alone decide. By hand: which pairs ask the same."""
    train = [
        question(f"{kind}{i}", stem, ("甲", f"乙{kind}{i}"))
        for kind, pairs in (("same", SAME), ("other", OTHER))
        for i, (stem, _) in enumerate(pairs)
    ]
    bench = [
        question(f"{kind}{i}", other, ("甲", f"丙{kind}{i}"))
        for kind, pairs in (("same", SAME), ("other", OTHER))
        for i, (_, other) in enumerate(pairs)
    ]
    hits = {(hit.train.id, hit.against.id) for hit in find_hits(train, {"b": bench})}
    assert hits == {(f"same{i}", f"same{i}") for i in range(len(SAME))}


def test_similarity_of_characters_and_their_pairs_by_hand():
    """Features of each side: 4 characters and 3 pairs; common are 3 characters and 2 pairs, in both documents (weight
    log 2); of one side each are 1 character and 1 pair (weight log 3)."""
    from math import log

    (pair,) = similar_pairs(["甲乙丙丁"], ["甲乙丙戊"], 0.1)
    assert pair.similarity == pytest.approx(5 * log(2) / (5 * log(2) + 4 * log(3)))


def test_a_case_is_long_in_every_script():
    assert content_length(content_words("word " * 30)) == 30
    assert content_length(content_words("甲" * 30)) == 15
    assert content_length(content_words("甲" * 30 + " ten words" * 5)) == 25


def test_stop_phrases_are_left_out_and_negations_are_not():
    assert content_words("下列哪项不是高血压的病因") == list("不高血压病因")


# ------------------------------------------------------------------------------------------------------------- counting
@pytest.mark.parametrize(
    "text, count",
    [("患者男，45岁，B12 deficiency。", 7), ("one two - three", 4), ("", 0), ("  ", 0), ("高血压", 3), ("ไม่มี", 3)],
)
def test_words_are_counted_at_blanks_and_characters_where_there_are_none(text, count):
    """The first: 患 者 男 45 岁 B12 deficiency."""
    assert word_count(text) == count


@pytest.mark.parametrize(
    "settings, kept",
    [("filter.min_words=10", ["long"]), ("filter.max_words=12", ["short"]), ("filter.min_words=9", ["long", "short"])],
)
def test_length_filters_count_characters_and_say_so(settings, kept, tmp_path, monkeypatch, capsys):
    """9 characters with the options in `short`, 14 in `long`."""
    monkeypatch.chdir(tmp_path)
    rows = [
        ROW | {"id": "short", "question": "高血压病因是？", "options": {"A": "钠", "B": "钾盐"}},
        ROW | {"id": "long", "question": "下列何者是高血压的病因？", "options": {"A": "钠", "B": "钾盐"}},
    ]
    Path("x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "build", "--out", "o.jsonl", "--from", "x.jsonl", settings]) == 0
    assert sorted(json.loads(line)["id"] for line in Path("o.jsonl").read_text().split("\n")[:-1]) == kept
    note = "words: 2 questions in a script without spaces between words; there characters are counted as words"
    assert note in capsys.readouterr().out and note in Path("o.card.md").read_text()


def test_a_chinese_response_that_reasons_is_no_bare_box():
    assert not is_bare_box("患者血淀粉酶升高，故为胰腺炎。\\boxed{A}") and is_bare_box("答案是\\boxed{A}")
    assert response_patterns("答案是\\boxed{A}。" + "因为血淀粉酶升高，伴恶心呕吐", Outcome.CORRECT) == {
        ResponsePattern.BARE,
        ResponsePattern.AFTERWARDS,
    }
    assert repetition("甲乙丙丁" * 5) == repetition("a b c d " * 5) > 0
