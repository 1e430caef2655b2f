"""The card of a built set adds up: read, left out by which step, kept; and what it says of balance is true of the set."""

import json
from pathlib import Path

import pytest
import yaml
from test_data_cli import here, row, write  # noqa: F401 (here: a fixture)

from alphamed.cli import main
from alphamed.data.sources import load_questions
from alphamed.data.text import fingerprint


def build(*arguments):
    assert main(["data", "build", "--out", "s.jsonl", *arguments]) == 0
    return json.loads(Path("s.card.json").read_text()), Path("s.card.md").read_text()


def test_every_step_is_counted_and_the_sum_is_what_was_read(capsys):
    """40 questions of a and 10 of b are read. Of a, q0 is quarantined, q1 and q2 have a long stem, q3 stands again as `twin`
    (a repeat), q4 is in the benchmark. So 35 of a are left: 29 say "no" and 6 "yes", and the balance leaves 6 and 6. A quota
    takes 10 of these 12; b has none, its 10 are left out. `size` takes 7 of the 10."""

    def yes_no(i, **changes):
        return row(i, options={"A": "no", "B": "yes"}, answer="B" if i >= 33 else "A", **changes)

    a = [yes_no(i) for i in range(39)]
    for i in (1, 2):
        a[i]["question"] += " indeed" * 50
    write("a.jsonl", [*a, a[3] | {"id": "twin"}, {"id": "bad"}])
    write("b.jsonl", [row(i + 100) for i in range(10)])
    write("bench.jsonl", [a[4] | {"id": "x4", "options": {"A": "no", "B": "yes", "C": "perhaps"}}])
    Path("d.yaml").write_text(
        yaml.safe_dump(
            {
                "version": 1,
                "decisions": [
                    {
                        "id": "q0",
                        "fingerprint": of(a[0]),
                        "decision": "quarantine",
                        "who": "R",
                        "when": "2026-01-31",
                        "why": "unclear",
                    },
                    {"id": "none such", "fingerprint": "0" * 16},
                ],
            }
        )
    )
    card, page = build(
        "--from",
        "a.jsonl",
        "--from",
        "b.jsonl",
        "--decisions",
        "d.yaml",
        "--against",
        "bench.jsonl",
        "overlap=drop",
        "filter.max_words=40",
        "drop_repeats=true",
        "balance=[{source: a}]",
        "bad_rows=skip",
        "quotas=[{source: a, count: 10}]",
        "size=7",
        "shuffle_options=true",
    )
    assert card["counts"] == {
        "read": 50,
        "kept": 7,
        "left_out": {"decisions": 1, "filter": 2, "repeats": 1, "overlap": 1, "balance": 23, "quotas": 12, "size": 3},
    }
    assert len(Path("s.jsonl").read_text().splitlines()) == 7 == 50 - sum(card["counts"]["left_out"].values())
    sentence = (
        "50 questions read, 43 left out (decisions 1, filter 2, repeats 1, overlap 1, balance 23, quotas 12, size 3), 7 "
        "kept. 1 bad row is in none of these numbers."
    )
    assert sentence in page and sentence in capsys.readouterr().out
    for step in (
        "decisions: d.yaml version 1: 0 fixed, 1 quarantined and left out, 0 stale, 0 open, 1 on ids that no question has",
        "filter: 2 left out by length",
        "repeats: 1 left out",
        "quotas: 12 left out that no quota took",
        "size: 3 left out over 7 in all",
        "letters: options put in a new order",
    ):
        assert step in card["steps"] and f"- {step}\n" in page


def of(plain):
    """The fingerprint of a row."""
    write("one.jsonl", [plain])
    return fingerprint(load_questions(["one.jsonl"]).questions[0])


def test_what_only_quotas_leave_out_is_said():
    write("a.jsonl", [row(i) for i in range(120)])
    card, page = build("--from", "a.jsonl", "quotas=[{source: a, count: 90}]")
    assert card["counts"] == {"read": 120, "left_out": {"decisions": 0, "filter": 0, "quotas": 30, "size": 0}, "kept": 90}
    assert "120 questions read, 30 left out (quotas 30), 90 kept.\n" in page and "nothing" not in page


def test_where_nothing_is_left_out_the_card_says_so_and_no_empty_line_is_printed(capsys):
    write("a.jsonl", [row(i) for i in range(3)])
    card, page = build("--from", "a.jsonl")
    assert card["steps"] == [] and "3 questions read, 0 left out, 3 kept.\n" in page
    assert "" not in capsys.readouterr().out.splitlines()


def test_options_that_refer_to_one_another_keep_their_letters():
    write("a.jsonl", [row(0), row(1, options={"A": "x", "B": "y", "C": "both A and B"})])
    card, _ = build("--from", "a.jsonl", "shuffle_options=true")
    assert card["steps"] == ["letters: options put in a new order; 1 left as they were, their options refer to one another"]


@pytest.mark.parametrize("count", [20, 7, 5])
def test_what_is_said_of_balance_is_true_of_the_set(count):
    """30 say no and 10 yes: balanced there are 10 and 10. Of an odd number that a quota draws one answer has more than
    half."""
    write("a.jsonl", [row(i, options={"A": "no", "B": "yes"}, answer="AAAB"[i % 4]) for i in range(40)])
    card, _ = build("--from", "a.jsonl", "balance=[{source: a, max_share: 0.5}]", f"quotas=[{{source: a, count: {count}}}]")
    answers = [q.options[q.answer] for q in load_questions(["s.jsonl"]).questions]
    most = max(("no", "yes"), key=answers.count)
    share = answers.count(most) / count
    (step,) = (step for step in card["steps"] if step.startswith("balance"))
    if count == 20:
        assert step.startswith("balance: 20 questions of a left out; in the set its commonest answer, '")
        assert step.endswith("makes up 50.0%, at most the 50.0% asked for")
    else:
        assert share > 0.5
        assert step == (
            f"balance: 20 questions of a left out; in the set its commonest answer, '{most}', makes up "
            f"{share:.1%}, which is more than the 50.0% asked for; quotas and size draw after balance"
        )


def test_balance_of_a_source_that_no_quota_takes():
    write("a.jsonl", [row(i, options={"A": "no", "B": "yes"}, answer="AB"[i % 2]) for i in range(4)])
    write("b.jsonl", [row(100)])
    card, _ = build("--from", "a.jsonl", "--from", "b.jsonl", "balance=[{source: a}]", "quotas=[{source: b, count: 1}]")
    assert card["steps"][0] == "balance: 0 questions of a left out; none of it is in the set"


def test_a_number_that_no_column_holds_is_a_bad_row(capsys):
    write("a.jsonl", [row(0, informativeness=10**30)])
    assert main(["data", "build", "--from", "a.jsonl", "--out", "s.parquet"]) == 2
    error = capsys.readouterr().err
    assert (
        error.count("\n") == 1 and "is not a whole number from 1 to 1000" in error and "a.jsonl:1: informativeness" in error
    )
    write("a.jsonl", [row(0, informativeness=1000)])
    assert main(["data", "build", "--from", "a.jsonl", "--out", "s.parquet"]) == 0
