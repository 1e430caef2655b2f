"""Filters, balance, quotas, order and letters of a training set: counts worked out by hand."""

from collections import Counter

import pytest

from alphamed.config.loading import validated
from alphamed.data.describe import length_words
from alphamed.errors import ConfigError, DataError
from alphamed.lab.datasets.mixture import PoolItem, balanced, drawn, filtered, largest_cap, mixed, relettered, shuffled
from alphamed.lab.datasets.recipe import BalanceRecipe, BuildRecipe, FilterRecipe, QuotaRecipe, Short
from alphamed.records import Question


def item(i, origin="s", level=None, options=("w", "x", "y", "z"), answer="A", stem="Why", source=None, context=None):
    lettered = dict(zip("ABCDEFGHIJ", options))
    return PoolItem(Question(f"{origin}{i}", stem, lettered, answer, context, source or origin, level), origin, "MIT")


def ids(items):
    return [item.question.id for item in items]


# ------------------------------------------------------------------------------------------------------------- filters
def test_words_are_those_of_context_question_and_options():
    assert length_words(item(1, stem="one two", options=("a b", "c"), context="three four five").question) == 3 + 2 + 3


@pytest.mark.parametrize(
    "settings, kept, reasons",
    [
        ({}, ["s1", "s2", "s3", "t4"], {}),
        ({"sources": ["t"]}, ["t4"], {"source": 3}),
        ({"sources": ["s/b", "t"]}, ["s2", "t4"], {"source": 2}),
        ({"levels": [2, 3]}, ["s2", "t4"], {"level": 2}),
        ({"min_options": 3}, ["s1", "s3"], {"options": 2}),
        ({"max_words": 6}, ["s1", "s2", "t4"], {"length": 1}),
        ({"min_words": 5, "max_options": 4, "levels": [1, 2]}, ["s1"], {"level": 2, "length": 1}),
        ({"exclude": ["IMAGE|figure"]}, ["s1", "s2", "t4"], {"excluded text": 1}),
    ],
)
def test_filters_and_their_reasons(settings, kept, reasons):
    items = [
        item(1, level=1),
        item(2, level=2, options=("a", "b"), source="s/b"),
        item(3, stem="See the image of this poor man"),
        item(4, "t", level=3, options=("a", "b")),
    ]
    passing, dropped = filtered(items, FilterRecipe(**settings))
    assert (ids(passing), dict(dropped)) == (kept, reasons)


# ------------------------------------------------------------------------------------------------------------- balance
@pytest.mark.parametrize(
    "counts, share, cap",
    [
        ([75, 20, 5], 0.5, 25),  # 25 of 25 + 20 + 5
        ([75, 20, 5], 0.4, 16),  # 16 of 16 + 16 + 5 = .432 is too much; 15 of 35 = .429; ... see the check below
        ([30, 30], 0.5, 30),
        ([9, 1], 0.5, 1),
        ([9], 0.5, 0),
        ([], 0.5, 0),
    ],
)
def test_the_largest_cap(counts, share, cap):
    by_hand = max(
        (c for c in range(max(counts, default=0) + 1) if c <= share * sum(min(n, c) for n in counts) + 1e-9), default=0
    )
    assert largest_cap(counts, share) == by_hand
    if (counts, share) != ([75, 20, 5], 0.4):
        assert by_hand == cap


def test_balance_cuts_the_commonest_answer_of_one_source_only():
    options = ("yes", "no", "maybe")
    answers = ["A"] * 75 + ["B"] * 20 + ["C"] * 5
    items = [item(i, "p", options=options, answer=a) for i, a in enumerate(answers)]
    others = [item(i, "m", options=options, answer="A") for i in range(10)]
    balanced_items, left_out = balanced([*items, *others], BalanceRecipe(source="p", max_share=0.5), seed=1)
    counts = Counter(item.question.answer for item in balanced_items if item.origin == "p")
    assert (counts, left_out) == ({"A": 25, "B": 20, "C": 5}, 50)
    assert sum(item.origin == "m" for item in balanced_items) == 10


def test_balance_goes_by_text_not_by_letter():
    items = [item(i, "p", options=("yes", "no"), answer="A") for i in range(6)]
    items += [item(i + 6, "p", options=("no", "yes"), answer="B") for i in range(2)]
    items += [item(i + 8, "p", options=("no", "yes"), answer="A") for i in range(4)]
    balanced_items, left_out = balanced(items, BalanceRecipe(source="p", max_share=0.5), seed=0)
    assert left_out == 4
    assert Counter(item.question.options[item.question.answer] for item in balanced_items) == {"yes": 4, "no": 4}


def test_balance_that_can_not_be_had_is_refused():
    with pytest.raises(DataError, match="1 different answers"):
        balanced([item(1, "p")], BalanceRecipe(source="p", max_share=0.5), seed=0)


# -------------------------------------------------------------------------------------------------------------- quotas
def pool():
    return [item(i, "a", level=i % 6 + 1) for i in range(60)] + [item(i, "b") for i in range(40)]


def test_quotas_by_count_and_by_level():
    quotas = [QuotaRecipe(source="a", per_level=3), QuotaRecipe(source="b", count=7)]
    chosen, missing = mixed(pool(), quotas, 5, Short.REFUSE)
    assert missing == []
    assert Counter(item.question.level for item in chosen if item.origin == "a") == dict.fromkeys(range(1, 7), 3)
    assert sum(item.origin == "b" for item in chosen) == 7 and len(chosen) == 25


def test_a_smaller_quota_takes_a_part_of_a_larger_one_and_file_order_does_not_count():
    def taken(count, items):
        return set(ids(mixed(items, [QuotaRecipe(source="b", count=count)], 5, Short.REFUSE)[0]))

    assert taken(7, pool()) < taken(12, pool())
    assert taken(7, pool()) == taken(7, pool()[::-1])
    assert taken(7, pool()) != set(ids(mixed(pool(), [QuotaRecipe(source="b", count=7)], 6, Short.REFUSE)[0]))


def test_a_source_without_a_quota_is_left_out():
    chosen, _ = mixed(pool(), [QuotaRecipe(source="b", count=2)], 0, Short.REFUSE)
    assert {item.origin for item in chosen} == {"b"}


def test_what_is_short_is_refused_or_told():
    quotas = [QuotaRecipe(source="a", per_level=11, levels=(1, 2)), QuotaRecipe(source="b", count=40)]
    with pytest.raises(DataError, match=r"a level 1: 10 of 11, a level 2: 10 of 11\)"):
        mixed(pool(), quotas, 0, Short.REFUSE)
    chosen, missing = mixed(pool(), quotas, 0, Short.TAKE)
    assert len(chosen) == 60 and missing == ["a level 1: 10 of 11", "a level 2: 10 of 11"]


def test_quotas_by_level_without_levels_say_what_to_do():
    with pytest.raises(DataError, match="no question has a level.*alphamed data difficulty"):
        mixed([item(i) for i in range(9)], [QuotaRecipe(source="s", per_level=1)], 0, Short.REFUSE)


def test_size_keeps_the_order():
    chosen = drawn(pool(), 30, 1)
    assert len(chosen) == 30 and [name for name in ids(pool()) if name in set(ids(chosen))] == ids(chosen)
    assert drawn(pool(), None, 1) == pool() == drawn(pool(), 100, 1)


# --------------------------------------------------------------------------------------------------- order and letters
def test_the_order_depends_on_seed_and_ids_alone():
    assert ids(shuffled(pool(), 3)) == ids(shuffled(pool()[::-1], 3)) != ids(shuffled(pool(), 4))
    assert sorted(ids(shuffled(pool(), 3))) == sorted(ids(pool()))


def test_new_letters_keep_the_right_text_and_are_dealt_evenly():
    items = [item(i, answer="B") for i in range(40)]
    items += [item(i, "five", options=tuple("vwxyz"), answer="E") for i in range(10)]
    lettered, unchanged = relettered(items, 2)
    assert unchanged == 0
    assert [item.question.options[item.question.answer] for item in lettered] == ["x"] * 40 + ["z"] * 10
    assert all(
        sorted(new.question.options.values()) == sorted(old.question.options.values()) for new, old in zip(lettered, items)
    )
    assert Counter(item.question.answer for item in lettered[:40]) == dict.fromkeys("ABCD", 10)
    assert Counter(item.question.answer for item in lettered[40:]) == dict.fromkeys("ABCDE", 2)
    assert any(
        list(new.question.options.values()) != list(old.question.options.values()) for new, old in zip(lettered, items)
    )


def test_options_that_refer_to_others_stay():
    fixed = item(1, options=("a", "b", "both A and B", "none of the above"), answer="C")
    assert relettered([fixed], 0) == ([fixed], 1)


# -------------------------------------------------------------------------------------------------------------- recipe
@pytest.mark.parametrize(
    "tree, words",
    [
        ({"sources": []}, "sources: [] is not valid"),
        ({"sources": [{"name": "a"}, {"name": "a"}]}, "a occurs twice"),
        ({"sources": [{"name": "a", "pth": "x"}]}, "sources.0.pth: unknown key; did you mean 'path'?"),
        ({"sources": [{"name": "a"}], "filtr": {}}, "filtr: unknown key; did you mean 'filter'?"),
        ({"sources": [{"name": "a"}], "quotas": [{"source": "b", "count": 1}]}, "quotas: 'b' is none of the sources a"),
        ({"sources": [{"name": "a"}], "quotas": [{"source": "a"}]}, "a needs either count or per_level"),
        ({"sources": [{"name": "a"}], "balance": [{"source": "a", "max_share": 1.5}]}, "balance.0.max_share: 1.5"),
        ({"sources": [{"name": "a"}], "filter": {"levels": [7]}}, "filter.levels.0: 7 is not valid"),
        ({"sources": [{"name": "a"}], "filter": {"min_options": 5, "max_options": 4}}, "filter.min_options: 5 is above"),
        ({"sources": [{"name": "a"}], "filter": {"exclude": ["fine", "("]}}, "filter.exclude: '(' is no regular expression"),
        ({"sources": [{"name": "a"}], "filter": {"exclude": ["a{99999999999999999999}"]}}, "is no regular expression"),
        ({"sources": [{"name": "a"}], "similarity": 0}, "similarity: 0 is not valid"),
        ({"sources": [{"name": "a"}], "decisions_version": 2}, "decisions_version: 2"),
        ({"sources": [{"name": "a", "answer": "number"}]}, "sources.0.answer: 'number' is not valid"),
    ],
)
def test_mistakes_in_a_recipe_are_one_line(tree, words):
    with pytest.raises(ConfigError) as error:
        validated(BuildRecipe, tree)
    assert words in str(error.value) and "\n" not in str(error.value)
