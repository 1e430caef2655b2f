"""The page of a set: its numbers, its findings, that it asks for nothing and that text stays text."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from alphamed.cli import main
from alphamed.lab.datasets.checks import check_set
from alphamed.lab.datasets.page import examples, set_figures
from alphamed.lab.reports.plots import histogram, ranked_bars
from alphamed.records import Question

EVIL = "</div><script>alert(1)</script><img src=x onerror=alert(2)> {{ 7*7 }}"


def question(i, stem="Why is it so", options=("one", "two", "three", "four"), answer="A", source="s", context=None):
    return Question(f"q{i}", f"{stem} {i}?", dict(zip("ABCDEF", options)), answer, context, source)


def titles(questions):
    return {finding.title: finding.count for finding in check_set(questions)}


# ------------------------------------------------------------------------------------------------------------ findings
def test_an_even_set_has_no_findings():
    even = [question(i, options=(f"a{i}", f"b{i}", f"c{i}", f"d{i}"), answer="ABCD"[i % 4]) for i in range(80)]
    assert check_set(even) == []


@pytest.mark.parametrize(
    "change, title, count",
    [
        (lambda i: {"answer": "A" if i < 32 else "BCD"[i % 3]}, "Skewed letters", 32),  # 32 of 80 > 1.25 / 4
        (lambda i: {"options": ("yes", "no") if i < 41 else ("no", "yes"), "answer": "A"}, "A constant answer pays", 41),
        (
            lambda i: {"options": (f"a{i} is long", f"b{i}", f"c{i}", f"d{i}"), "answer": "A" if i < 36 else "BCD"[i % 3]},
            "Long keys",
            36,
        ),  # chance is 20 of 80
        (lambda i: {"stem": "The photograph shows what" if i < 3 else "Why"}, "Images that are not there", 3),
        (
            lambda i: {
                "options": (f"a{i}", f"b{i}", f"c{i}", "all of the above") if i < 4 else (f"a{i}", f"b{i}", f"c{i}", "d")
            },
            "Options that refer to options",
            4,
        ),
    ],
)
def test_each_finding_counts(change, title, count):
    base = {"options": None, "answer": None}
    questions = []
    for i in range(80):
        settings = (
            {key: value for key, value in base.items() if value}
            | {"options": (f"a{i}", f"b{i}", f"c{i}", f"d{i}"), "answer": "ABCD"[i % 4]}
            | change(i)
        )
        questions.append(question(i, **settings))
    assert titles(questions).get(title) == count


def test_repeats_and_conflicts():
    twins = [
        Question("a", "Why?", {"A": "x", "B": "y"}, "A"),
        Question("b", "why", {"A": "y", "B": "x"}, "B"),
        Question("c", "Why?", {"A": "x", "B": "y"}, "B"),
    ]
    assert titles(twins) == {"Repeated questions": 1, "Conflicting keys": 3}


# -------------------------------------------------------------------------------------------------------------- figures
def test_bars_tell_counts_and_shares():
    svg = ranked_bars([("medqa", 30), ("<b>", 10)], total=50)
    assert "60%" in svg and "20%" in svg and "&lt;b&gt;" in svg and "<b>" not in svg
    widths = [float(width) for width in re.findall(r'<rect class="f0"[^>]*width="([\d.]+)"', svg)]
    assert widths[0] == pytest.approx(3 * widths[1], rel=0.01)
    svg = histogram([0, 10, 20], [3, 6], "words")
    heights = [float(height) for height in re.findall(r'<rect class="f0"[^>]*height="([\d.]+)"', svg)]
    assert heights[1] == pytest.approx(2 * heights[0], rel=0.01) and "10 to 20: 6" in svg


def test_the_last_bar_of_lengths_holds_the_longest():
    questions = [question(i) for i in range(199)] + [question(199, stem="word " * 5000)]
    svg = next(figure.svg for figure in set_figures(questions) if figure.key == "words")
    told = [int(count) for count in re.findall(r"<title>[\d.]+ to [\d.]+: (\d+)</title>", svg)]
    assert sum(told) == 200 and told[-1] == 1


def test_examples_take_turns_between_sources():
    questions = [question(i, source="big") for i in range(100)] + [question(i + 100, source="small") for i in range(2)]
    assert [q.source for q in examples(questions)] == ["big", "small"] * 2 + ["big"] * 6


# ----------------------------------------------------------------------------------------------------------------- page
class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes = set(), set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}


def test_the_page_is_one_safe_file_and_its_numbers_are_json(tmp_path, capsys):
    rows = [
        {
            "id": f"q{i}",
            "question": EVIL + str(i),
            "options": {"A": EVIL, "B": "b"},
            "answer": "B",
            "source": EVIL,
            "context": EVIL,
            "level": i % 6 + 1,
        }
        for i in range(60)
    ] + [{"id": "bad"}]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    assert main(["data", "inspect", str(tmp_path / "set.jsonl")]) == 0
    page_line, *blind_lines = capsys.readouterr().out.splitlines()
    assert page_line == str(tmp_path / "set.html")
    assert len(blind_lines) == 5 and all("without reading the question: " in line for line in blind_lines)
    page = (tmp_path / "set.html").read_text()
    found = Tags()
    found.feed(page)
    assert not found.tags & {"script", "img", "iframe", "object", "link", "form"}
    assert not found.attributes & {"src", "onerror", "onclick"}
    assert "default-src 'none'" in page and "{{ 7*7 }}" in page and "prefers-color-scheme:dark" in page
    numbers = json.loads((tmp_path / "set.json").read_text())
    assert numbers["questions"] == 60 and numbers["levels"] == {str(level): 10 for level in range(1, 7)}
    assert {finding["title"]: finding["count"] for finding in numbers["findings"]} == {
        "Bad rows": 1,
        "A blind policy beats chance": 60,
        "A constant answer pays": 60,
        "Skewed letters": 60,
    }
    assert Path(numbers["file"]).name == "set.jsonl"
