"""Contamination: the exact join against brute force, the rules on a hand-labelled fixture, real near-duplicates."""

import math
from collections import Counter
from pathlib import Path
from random import Random

import pytest
import yaml

from alphamed.config.choices import BadRows
from alphamed.data.sources import load_questions
from alphamed.data.text import content_words
from alphamed.lab.datasets.decontaminate import MatchRule, find_hits, report
from alphamed.lab.datasets.matching import similar_pairs
from alphamed.records import Question

FIXTURE = Path(__file__).parents[1] / "contamination.yaml"
REAL = Path(__file__).parents[3] / "shared" / "data"


def question(name, stem, options=("yes", "no"), answer=None):
    lettered = dict(zip("ABCDEFGHIJ", options))
    return Question(name, stem, lettered, next(k for k, text in lettered.items() if text == (answer or options[0])))


# ------------------------------------------------------------------------------------------------------------ the join
def brute_force(base, queries, threshold):
    """The definition in matching.py, pair by pair with plain sets."""

    def features(text):
        content = content_words(text)
        return set(content) | set(zip(content, content[1:]))

    sides = [[features(text) for text in texts] for texts in (base, queries)]
    frequency = Counter(f for side in sides for document in side for f in document)
    total = len(base) + len(queries)

    def weigh(chosen):
        return sum(math.log1p(total / frequency[f]) for f in chosen)

    similarities = {}
    for j, query in enumerate(sides[1]):
        for i, document in enumerate(sides[0]):
            both = weigh(query | document)
            if both and weigh(query & document) / both >= threshold - 1e-9:
                similarities[j, i] = weigh(query & document) / both
    return similarities


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8, 1.0])
def test_the_join_finds_what_brute_force_finds(threshold):
    random = Random(7)
    words = [f"w{i}" for i in range(40)] + ["the", "of"]
    texts = [" ".join(random.choices(words, k=random.randint(0, 9))) for _ in range(160)]
    base, queries = texts[:100], [*texts[100:], *texts[:10], "", "the of"]
    similarities = {(pair.query, pair.base): pair.similarity for pair in similar_pairs(base, queries, threshold)}
    expected = brute_force(base, queries, threshold)
    assert similarities.keys() == expected.keys() and len(similarities) >= 10
    assert all(abs(similarities[key] - expected[key]) < 1e-9 for key in similarities)


def test_empty_sides_give_nothing():
    assert list(similar_pairs([], ["a b"], 0.5)) == [] == list(similar_pairs(["a b"], [], 0.5))
    assert list(similar_pairs(["the", ""], ["of", "?"], 0.5)) == []


# ------------------------------------------------------------------------------------------------------------ the rules
def test_precision_and_recall_on_labelled_pairs():
    """Every benchmark question against all training questions of the fixture; a pair that is not listed is not the same.
    Prints what the documentation quotes."""
    benchmark, train, same, kinds = [], [], set(), {}
    for i, entry in enumerate(yaml.safe_load(FIXTURE.read_text())):
        benchmark.append(question(f"b{i}", entry["question"], entry["options"], entry["answer"]))
        for k, other in enumerate(entry["train"]):
            name = f"t{i}.{k}"
            options = other.get("options", entry["options"])
            train.append(question(name, other["question"], options, other.get("answer", entry["answer"])))
            kinds[name] = other["kind"]
            if other["same"]:
                same.add((name, f"b{i}"))
    pairs = {(hit.train.id, hit.against.id) for hit in find_hits(train, {"fixture": benchmark})}
    precision, recall = len(pairs & same) / len(pairs), len(pairs & same) / len(same)
    missed = Counter(kinds[name] for name, _ in same - pairs)
    print(
        f"\n{len(train)} training questions, {len(same)} of them the same as one of {len(benchmark)}: precision "
        f"{precision:.3f}, recall {recall:.3f}; missed: {dict(missed)}; wrong: {sorted(pairs - same)}"
    )
    assert len(train) >= 45 and len(same) >= 25
    assert precision >= 0.95 and recall >= 0.75
    assert set(missed) <= {"heavy rewording", "shortened", "light rewording"}
    rewordings = [pair for pair in same if kinds[pair[0]] == "light rewording"]
    assert sum(pair in pairs for pair in rewordings) >= 0.8 * len(rewordings)


STEM = "Which enzyme of the liver splits fructose bisphosphate in glycolysis"
OPTIONS = ("Aldolase", "Enolase", "Hexokinase", "Pyruvate kinase")


@pytest.mark.parametrize(
    "stem, options, answer, rule",
    [
        (STEM + "?", OPTIONS, "Aldolase", MatchRule.EXACT),
        (STEM.upper() + " :", OPTIONS[::-1], "Aldolase", MatchRule.EXACT),
        ("In the liver which enzyme is it that splits its substrate?", OPTIONS[::-1], "Aldolase", MatchRule.OPTIONS),
        (STEM + " of a healthy man?", ("Aldolase", "Lyase", "Ligase", "Lipase"), "Aldolase", MatchRule.SIMILAR),
        (STEM + "?", ("Trypsin", "Lyase", "Ligase", "Lipase"), "Lyase", None),  # other answer, other options
        ("What turns glucose over first?", OPTIONS, "Aldolase", None),  # same options and key, other words
        ("Which enzyme of the liver makes fat?", OPTIONS, "Enolase", None),
    ],
)
def test_each_rule(stem, options, answer, rule):
    hits = find_hits([question("t", stem, options, answer)], {"b": [question("q", STEM + "?", OPTIONS, "Aldolase")]})
    assert [hit.rule for hit in hits] == ([rule] if rule else [])


def test_a_common_option_set_says_nothing():
    train = [question(f"t{i}", f"Does drug{i} help against fever?", ("yes", "no", "maybe")) for i in range(150)]
    benchmark = [question("q", "Does drug700 help against pain?", ("yes", "no", "maybe"))]
    assert find_hits(train, {"b": benchmark}) == []
    assert [hit.rule for hit in find_hits(train[:50], {"b": benchmark})] == [MatchRule.OPTIONS] * 50


def test_the_report_has_the_evidence():
    train = [question("t", STEM + "?", OPTIONS), question("u", "Something else entirely?")]
    benchmarks = {"b": [question("q", STEM + "?", OPTIONS[::-1], "Aldolase")], "c": [question("r", "Unrelated words here?")]}
    evidence = report(train, benchmarks, find_hits(train, benchmarks), 0.6)
    assert (evidence["train_questions"], evidence["contaminated"]) == (2, 1)
    assert evidence["benchmarks"] == {
        "b": {"questions": 1, "touched": 1, "rules": {"exact": 1}},
        "c": {"questions": 1, "touched": 0, "rules": {}},
    }
    hit = evidence["hits"][0]
    assert (hit["rule"], hit["similarity"], hit["same_answer"], hit["shared_options"]) == ("exact", 1.0, True, 1.0)
    assert (hit["train"]["id"], hit["against"]["id"], hit["against"]["options"]["D"]) == ("t", "q", "Aldolase")


# ----------------------------------------------------------------------------------------------------------- real data
@pytest.mark.skipif(not REAL.is_dir(), reason="the real medical files of ../shared/data are not on this machine")
def test_planted_copies_of_real_questions_are_found_among_real_ones():
    """20 questions of the development file, changed by a few words and with shuffled letters, among 2,563 others."""
    train = list(load_questions([REAL / "train_headqa_en.jsonl"], BadRows.SKIP).questions)
    dev = [
        q
        for q in load_questions([REAL / "dev_headqa_en.jsonl"], BadRows.SKIP).questions
        if len(content_words(q.question)) >= 8
    ][:20]
    planted = [
        question(
            f"planted-{i}",
            "Indicate: " + q.question.rstrip(":.?") + ", in general",
            tuple(q.options.values())[::-1],
            q.options[q.answer],
        )
        for i, q in enumerate(dev)
    ]
    hits = find_hits([*train, *planted], {"dev": dev})
    pairs = {(hit.train.id, hit.against.id) for hit in hits if hit.train.id.startswith("planted")}
    assert pairs == {(copy.id, original.id) for copy, original in zip(planted, dev)}
