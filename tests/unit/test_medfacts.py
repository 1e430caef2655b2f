"""The sample questions: the table is large and clean, and each question has one right option by a reading of its own.

The checker below parses medfacts.yaml itself and recognises a question by its sentence alone, so that it shares nothing
with the generator but the data file.
"""

import configparser
import hashlib
import json
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import yaml

from alphamed.config.choices import BadRows
from alphamed.data.sources import load_questions
from alphamed.evaluation.blind import SHARED, blind_scores
from alphamed.lab.datasets import medfacts
from alphamed.lab.datasets.medfacts_table import parse, table

ROOT = Path(__file__).parents[2]
SPLITS = ("train", "heldout_wording", "heldout_fact")


# ---------------------------------------------------------------------------------- an independent reading of the table
@cache
def raw() -> dict:
    return yaml.safe_load((ROOT / "src/alphamed/lab/datasets/medfacts.yaml").read_text("utf-8"))


@cache
def truth(category: str) -> dict[str, tuple[str, frozenset[str]]]:
    """subject -> (its answer, every answer that is true or arguable)."""
    rows = {}
    for line in "".join(raw()["categories"][category]["facts"].values()).strip().splitlines():
        subject, answer, also = [cell.strip() for cell in f"{line}|".split("|")][:3]
        rows[subject] = (answer, frozenset([answer, *(other.strip() for other in also.split(";") if other.strip())]))
    return rows


@cache
def section_answers(category: str) -> dict[str, set[str]]:
    """subject -> the answers in its section."""
    found = {}
    for block in raw()["categories"][category]["facts"].values():
        rows = [[cell.strip() for cell in line.split("|")] for line in block.strip().splitlines()]
        found |= {subject: {answer for _, answer, *_ in rows} for subject, *_ in rows}
    return found


@cache
def sentences(category: str) -> dict[str, tuple[str, str, str]]:
    """Every sentence a question of the category may be -> (form, which wordings it is of, subject or answer)."""
    entry, general, found = raw()["categories"][category], raw()["general"], {}
    rows = truth(category)
    answers = sorted({answer for answer, _ in rows.values()})
    for kind in ("train", "heldout"):
        for form, keys in (("ask", list(rows)), ("reverse", answers)):
            for wording in entry[form][kind]:
                for key in keys:
                    sentence = wording.replace("{subject}", key).replace("{answer}", key)
                    found.setdefault(sentence, []).append((form, kind, key))
        for wording in general["except"][kind]:
            for key in answers:
                sentence = wording.replace("{subjects}", entry["subjects"]).replace("{predicate}", entry["predicate"])
                found.setdefault(sentence.replace("{answer}", key), []).append(("except", kind, key))
        for wording in general["pairs"][kind]:
            found.setdefault(wording.replace("{pair}", entry["pair"]), []).append(("pairs", kind, ""))
    assert all(len(meanings) == 1 for meanings in found.values()), "a sentence with two meanings"
    return {sentence: meanings[0] for sentence, meanings in found.items()}


def read(question):
    category = question.source.removeprefix("medfacts/")
    return category, *sentences(category)[question.question]


def right_options(question) -> list[str]:
    """The letters that may be right; every other option is certainly wrong."""
    category, form, _, key = read(question)
    rows = truth(category)
    if form == "ask":
        return [letter for letter, text in question.options.items() if text in rows[key][1]]
    if form == "reverse":
        return [letter for letter, text in question.options.items() if key in rows[text][1]]
    if form == "except":  # sure members are those whose main answer it is
        return [letter for letter, text in question.options.items() if rows[text][0] != key]
    pairs = {letter: text.split(" - ") for letter, text in question.options.items()}
    return [letter for letter, (subject, said) in pairs.items() if rows[subject][0] != said]


def stated_subjects(question) -> set[str]:
    """The subjects whose facts a reader of the question and its key has been told."""
    category, form, _, key = read(question)
    if form == "ask":
        return {(category, key)}
    if form == "reverse":
        return {(category, question.options[question.answer])}
    return {(category, text.split(" - ")[0]) for text in question.options.values()}


def mentioned_subjects(question) -> set[str]:
    category, form, *_ = read(question)
    options = {(category, text) for text in question.options.values()} if form == "reverse" else set()
    return stated_subjects(question) | options


build = cache(medfacts.build)


@pytest.fixture(params=[0, 1], ids="seed {}".format)
def splits(request):
    return build(request.param)


@pytest.fixture
def first():
    return build(0)


# ------------------------------------------------------------------------------------------------------------ the table
def test_the_table_is_large():
    facts = [(category, subject) for category in raw()["categories"] for subject in truth(category)]
    assert len(facts) >= 1000 and len(raw()["categories"]) >= 20
    assert all(len(truth(category)) >= 20 for category in raw()["categories"])
    ten = [c for c in raw()["categories"] if len({answer for answer, _ in truth(c).values()}) >= 10]
    assert len(ten) == len(raw()["categories"]) - 1  # acid-base has five disorders and no more


def test_no_row_comes_twice_and_cells_are_clean():
    seen, bad = Counter(), []
    for category, entry in raw()["categories"].items():
        for line in "".join(entry["facts"].values()).strip().splitlines():
            cells = [cell.strip() for cell in line.split("|")]
            seen[category, cells[0].casefold()] += 1
            bad += [line for cell in cells[:2] if not cell or any(mark in cell for mark in ("  ", " - ", "{", ";"))]
            listed = [cell.strip() for cell in cells[2].split(";")] if len(cells) == 3 else []
            bad += [line for also in listed if also == cells[1] or listed.count(also) > 1]
    assert not bad
    assert [row for row, count in seen.items() if count > 1] == []


def test_every_relation_has_its_wordings():
    for name, entry in raw()["categories"].items():
        assert len(set(entry["ask"]["train"])) >= 4 and len(set(entry["ask"]["heldout"])) >= 3, name
        assert len(set(entry["reverse"]["train"])) >= 4 and len(set(entry["reverse"]["heldout"])) >= 2, name
        for form, slot in (("ask", "{subject}"), ("reverse", "{answer}")):
            assert all(w.count(slot) == 1 and w.count("{") == 1 for kind in entry[form].values() for w in kind), name
        assert entry["predicate"].count("{answer}") == 1


def test_the_module_reads_the_table_as_the_checker_does():
    for name, category in table().items():
        assert {f.subject: (f.answer, f.also | {f.answer}) for f in category.facts} == truth(name)


BROKEN = [
    ("a | b | c | d", "write 'subject | answer'"),
    ("a |", "write 'subject | answer'"),
    ("a", "write 'subject"),
    ("a | b | c", "also ['c']"),
    ("a | b\n        a | c", "has two rows"),
]


@pytest.mark.parametrize(("rows", "message"), BROKEN)
def test_a_broken_row_is_named(rows, message):
    words = "{train: [], heldout: []}"
    text = (
        f"general: {{except: {words}, pairs: {words}}}\ncategories:\n  toys:\n    subjects: s\n    predicate: p\n"
        f"    pair: p\n    ask: {words}\n    reverse: {words}\n    facts:\n      one: |\n        {rows}\n"
    )
    with pytest.raises(ValueError, match="toys") as error:
        parse(text)
    assert message in str(error.value)


def test_the_table_is_shipped():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert "*.yaml" in setup["options.package_data"]["alphamed.lab.datasets"].split(", ")


# -------------------------------------------------------------------------------------------------------- the questions
def test_every_question_has_exactly_one_right_option(splits):
    for split in SPLITS:
        for question in getattr(splits, split):
            assert right_options(question) == [question.answer], question


def test_the_odd_one_out_is_certainly_out(splits):
    """In negated questions the keyed option is not merely another answer but false, and the rest are plain facts."""
    forms = Counter()
    for question in (q for split in SPLITS for q in getattr(splits, split)):
        category, form, _, key = read(question)
        forms[form] += 1
        if form in ("except", "pairs"):
            subject, _, said = question.options[question.answer].partition(" - ")
            assert (said or key) not in truth(category)[subject][1], question
    assert min(forms[form] for form in ("ask", "reverse", "except", "pairs")) > 100


def test_options_are_distinct_and_their_number_fits_the_level(splits):
    most = {1: 4, 2: 5, 3: 6, 4: 7, 5: 8, 6: 10}
    sizes = {level: Counter() for level in most}
    for question in splits.train:
        sizes[question.level][len(question.options)] += 1
        assert len(set(question.options.values())) == len(question.options)
        assert list(question.options) == list("ABCDEFGHIJ"[: len(question.options)])
    for level, counts in sizes.items():
        assert 4 <= min(counts) and max(counts) == most[level]
    assert all(sizes[level].most_common(1)[0][0] == most[level] for level in (1, 2, 3, 5, 6))


def test_sizes_and_levels(splits):
    assert len(splits.train) >= 1000 and len(splits.heldout_wording) >= 300 and len(splits.heldout_fact) >= 200
    for split in SPLITS:
        questions = getattr(splits, split)
        assert {q.level for q in questions} == {1, 2, 3, 4, 5, 6}
        assert {q.source.removeprefix("medfacts/") for q in questions} == set(raw()["categories"])
    everything = [q.id for split in SPLITS for q in getattr(splits, split)]
    assert len(set(everything)) == len(everything)


def test_level_1_is_short_and_plain(splits):
    for question in splits.train + splits.heldout_wording:
        if question.level == 1:
            assert read(question)[1] == "ask"
            assert len(" ".join([question.question, *question.options.values()]).split()) < 60, question


def near_share(questions) -> float:
    """The share of wrong options that are answers in the asked fact's own section."""
    near = [
        text in section_answers(read(question)[0])[read(question)[3]]
        for question in questions
        for letter, text in question.options.items()
        if letter != question.answer
    ]
    return sum(near) / len(near)


def test_level_1_takes_wrong_options_from_other_sections_where_a_group_allows(first):
    """Most categories have three sections, so that of four options two at least are of one: 1 of 6 pairs is near then, and
    by chance 3 of 9. Level 6 asks for near ones."""
    level = {number: [q for q in first.train if q.level == number and read(q)[1] == "ask"] for number in (1, 2, 6)}
    assert near_share(level[1]) < 1 / 6 < 0.5 * near_share(level[6])
    assert near_share(level[1]) < 0.6 * near_share(level[2])


def test_a_held_out_fact_occurs_nowhere_in_training(splits):
    trained = set().union(*map(mentioned_subjects, splits.train), *map(mentioned_subjects, splits.heldout_wording))
    for question in splits.heldout_fact:
        assert not stated_subjects(question) & trained, question
    assert len(set().union(*map(stated_subjects, splits.heldout_fact))) >= 150


def test_a_held_out_wording_is_never_used_in_training(splits):
    assert {read(q)[2] for q in splits.train} == {"train"}
    assert {read(q)[2] for q in splits.heldout_fact} == {"train"}
    assert {read(q)[2] for q in splits.heldout_wording} == {"heldout"}
    assert not {q.question for q in splits.train} & {q.question for q in splits.heldout_wording}
    asked = set().union(*map(stated_subjects, splits.heldout_wording))
    assert asked == set().union(*map(stated_subjects, splits.train))


def test_answers_are_balanced_over_the_letters(splits):
    for split in SPLITS:
        by_size = {}
        for question in getattr(splits, split):
            by_size.setdefault(len(question.options), Counter())[question.answer] += 1
        for size, counts in by_size.items():
            total, share = counts.total(), 1 / size
            bound = 4 * (total * share * (1 - share)) ** 0.5  # four standard deviations of a fair die
            assert all(abs(counts[letter] - total * share) <= bound for letter in "ABCDEFGHIJ"[:size]), (split, counts)


# ------------------------------------------------------------------------------------------ determinism, filters, files
def test_the_files_are_the_same_bytes_everywhere(tmp_path):
    """Pinned: a change here means that runs on the sample are no longer comparable with earlier ones."""
    digest = hashlib.sha256()
    for path in medfacts.write(tmp_path, 0).values():
        digest.update(path.read_bytes())
    assert digest.hexdigest() == "5ed685fa8b075919517ea0ca298202c1a9ecc46d77906b71cc87bd5ccbb8ab78"


def test_another_seed_draws_other_questions_and_holds_out_other_facts(first):
    other = build(1)
    held = [set().union(*map(stated_subjects, s.heldout_fact)) for s in (first, other)]
    assert held[0] != held[1]
    shared = {q.id for q in first.train} & {q.id for q in other.train}
    assert len(shared) < 0.01 * len(first.train)


def test_filters_choose_and_change_nothing(first):
    some = medfacts.build(0, levels=(1, 3), categories=("nutrients", "ecg"))
    sources = ("medfacts/nutrients", "medfacts/ecg")
    for split in SPLITS:
        wanted = [q for q in getattr(first, split) if q.level in (1, 3) and q.source in sources]
        assert list(getattr(some, split)) == wanted


def test_the_number_of_facts_and_copies():
    easy = {"levels": (1,), "categories": ("nutrients", "signs"), "facts": 40}
    few = medfacts.build(0, **easy, copies=5)
    for split in (few.train, few.heldout_wording):
        asked = Counter(subject for question in split for subject in stated_subjects(question))
        assert (
            len(asked) == 40 and min(asked.values()) == 5 and len(split) <= 40 * 5 + 2 * 3
        )  # a last group may be filled up
    trained = set().union(*map(stated_subjects, few.train))
    assert set().union(*map(stated_subjects, few.heldout_wording)) == trained
    plain = medfacts.build(0, **easy)
    assert {q.id for q in plain.train} < {q.id for q in few.train}  # more copies add, they do not change


def test_facts_are_dealt_to_categories_and_wrong_options_come_from_them_alone():
    few = medfacts.build(0, levels=(1,), categories=("antidotes", "signs", "nutrients"), facts=14, copies=4)
    subjects = {subject for question in few.train for subject in stated_subjects(question)}
    assert sorted(Counter(category for category, _ in subjects).values()) == [4, 5, 5]
    answers = {truth(category)[subject][0] for category, subject in subjects}
    assert {text for question in few.train for text in question.options.values()} == answers
    two = medfacts.build(0, levels=(1,), categories=("antidotes", "signs", "nutrients"), facts=11)
    assert len({q.source for q in two.train}) == 2  # 11 facts are groups of four in two categories


@pytest.mark.parametrize("seed", [0, 3])
def test_facts_held_out_beside_few_trained_ones_share_no_answer_with_them(seed):
    """Who has learnt that Aedes carries dengue fever answers a held-out question about Zika by what the two have in common."""
    names = ("vectors", "cell_products", "viruses")
    few = medfacts.build(seed, levels=(1, 5), categories=names, facts=12, copies=4)
    trained = set().union(*map(stated_subjects, few.train))
    answers = {truth(category)[subject][0] for category, subject in trained}
    asked = set().union(*map(stated_subjects, few.heldout_fact))
    assert len(asked) >= 3 * 8 and not asked & trained
    assert not {truth(category)[subject][0] for category, subject in asked} & answers
    said = {part for q in few.heldout_fact for text in q.options.values() for part in text.split(" - ")}
    assert not said & answers  # nor is one offered as a wrong option, or in a false pair


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (20, "facts: 20 leave none to hold out whose answer is not one of theirs; ask for fewer"),
        (3, "facts: 3 make no question with 4 options"),
        (24, "facts: 24 are 24 of acid_base, which has 23"),
    ],
)
def test_facts_that_are_not_there_are_refused(facts, message):
    with pytest.raises(ValueError, match=message):
        medfacts.build(0, categories=("acid_base",), facts=facts)


def test_so_many_copies_that_none_is_new_end():
    few = medfacts.build(0, levels=(1,), categories=("ecg",), facts=4, copies=500)
    assert 4 * 60 <= len(few.train) <= 4 * 4 * 24  # of each fact four wordings, each with 24 orders of its options
    assert len({q.id for q in few.train}) == len(few.train)


# -------------------------------------------------------------------------------------- nothing but the question decides
def test_each_option_of_a_closed_group_is_right_once(splits):
    """Whatever looks at the options alone, at their texts, lengths, letters or order, is right as often as chance is."""
    for split in SPLITS:
        keys = {}
        for question in getattr(splits, split):
            if read(question)[1] in ("ask", "reverse"):
                arranged = (question.level, tuple(question.options.values()))
                keys.setdefault(arranged, Counter())[question.answer] += 1
        assert len(keys) > 50
        for (_, texts), counts in keys.items():
            assert set(counts) == set("ABCDEFGHIJ"[: len(texts)]) and len(set(counts.values())) == 1, texts


QUICKSTART = {"levels": (1,), "categories": ("antidotes", "signs", "nutrients")}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "filters",
    [
        QUICKSTART | {"facts": 12, "copies": 20},
        QUICKSTART | {"facts": 24, "copies": 10},
        QUICKSTART,
        {"levels": (1,), "categories": ("bacteria", "drug_targets"), "facts": 24, "copies": 8},
    ],
)
def test_no_blind_policy_is_more_than_5_points_above_chance(filters, seed):
    sets = medfacts.build(seed, **filters)
    for questions, train in ((sets.train, None), (sets.train, sets.train), (sets.heldout_wording, sets.train)):
        for one in blind_scores(questions, train):
            assert one.value <= one.chance + 0.05, one


def test_no_policy_that_reads_options_alone_beats_chance_on_any_level(first):
    """That which compares words with the question is left out: some diseases are called after their cause."""
    for level in range(1, 7):
        questions = [q for q in first.heldout_wording if q.level == level]
        for one in blind_scores(questions, first.train):
            assert one.policy == SHARED or one.value <= one.chance + 0.02, (level, one)


def test_false_pairs_of_held_out_wordings_were_never_keys_in_training(first):
    keys = [{q.options[q.answer] for q in part if read(q)[1] == "pairs"} for part in (first.train, first.heldout_wording)]
    assert min(map(len, keys)) > 1000 and not keys[0] & keys[1]


@pytest.mark.parametrize("filters", [{"levels": (7,)}, {"categories": ("astrology",)}])
def test_an_unknown_filter_is_refused(filters):
    with pytest.raises(ValueError, match="unknown; choose from"):
        medfacts.build(0, **filters)


def test_written_files_load_as_any_question_file(tmp_path, first, capsys):
    medfacts.main([str(tmp_path / "questions"), "--levels", "1", "2"])
    paths = [tmp_path / "questions" / f"{split}.jsonl" for split in SPLITS]
    assert sorted(path.name for path in (tmp_path / "questions").iterdir()) == sorted(path.name for path in paths)
    loaded = load_questions(paths, BadRows.REFUSE)
    assert list(loaded.questions) == [q for split in SPLITS for q in getattr(first, split) if q.level <= 2]
    assert f"train: {sum(q.level <= 2 for q in first.train)} questions" in capsys.readouterr().out
    row = json.loads(paths[0].read_text("utf-8").splitlines()[0])
    assert list(row) == ["id", "question", "options", "answer", "source", "level"]


def test_a_wrong_level_on_the_command_line_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        medfacts.main([str(tmp_path), "--levels", "9"])
    assert stop.value.code == 2 and "invalid choice: 9" in capsys.readouterr().err


def test_too_few_facts_on_the_command_line_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        medfacts.main([str(tmp_path / "questions"), "--facts", "3"])
    assert stop.value.code == 2 and "facts: 3 make no question with 4 options" in capsys.readouterr().err
    assert not (tmp_path / "questions").exists()
