"""The report from whole and partial run directories: what it says, that it asks for nothing, that text stays text."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from alphamed.config.loading import build_config, dump_config
from alphamed.errors import ConfigError
from alphamed.evaluation.items import Asked, GradedAnswer
from alphamed.evaluation.runner import Evaluation, QuestionSet, SetResult, write_evaluation
from alphamed.evaluation.score import score
from alphamed.files import append_json, replace_text
from alphamed.lab.reports.figures import figures
from alphamed.lab.reports.plots import Series, line_chart, nice_ticks, number, sheet, smoothed, stacked_bars
from alphamed.lab.reports.report import edges, length_bias_warning, main, training_sentences, write_report
from alphamed.lab.reports.samples import changes, marked
from alphamed.lab.reports.summary import summary
from alphamed.records import FinishReason, Outcome, Question, Rollout, RolloutGroup, ScoredGroup
from alphamed.rundir import provenance
from alphamed.rundir.rollout_files import rollout_path, write_rollouts

C, W, U = Outcome.CORRECT, Outcome.WRONG, Outcome.UNPARSEABLE
EVIL = "</div><script>alert(1)</script><img src=x onerror=alert(2)> {{ 7*7 }} \\boxed{A}"


def row(step, **more):
    return {
        "step": step,
        "policy_version": step,
        "reward/mean": step / 40,
        "reward/correct": 0.5,
        "reward/boxed": 0.75,
        "reward/unparseable": 0.25,
        "reward/truncated": 0.0,
        "reward/bare_box": 0.1,
        "time/step_s": 10.0,
        "time/generate_s": 4.0,
        "time/update_s": 5.0,
        "time/wall_s": 10.0 * step,
    } | more


def graded(name, outcomes, text="because \\boxed{A}", key="A"):
    question = Question(name, f"<i>{name}</i> & more?", {"A": "<b>a</b>", "B": "b"}, key)
    rollouts = tuple(Rollout(name, name, j, (1, 2), (-0.5, -0.5), text, FinishReason.STOP, 0) for j in range(len(outcomes)))
    rewards = tuple(float(outcome == C) for outcome in outcomes)
    return ScoredGroup(
        RolloutGroup(name, question, (1,), rollouts), tuple(outcomes), rewards, rewards, (key,) * len(outcomes)
    )


def evaluate(run_dir, step, outcomes, text="because \\boxed{A}", keys="A"):
    groups = tuple(graded(f"q{i}", [outcome], text, keys[i % len(keys)]) for i, outcome in enumerate(outcomes))
    questions = QuestionSet("wording", Path("wording.jsonl"), tuple(g.group.question for g in groups), len(groups))
    write_evaluation(
        run_dir / "evaluations", f"step_{step:06d}", step, Evaluation(0, (SetResult(questions, groups, score(groups)),), 1.0)
    )


@pytest.fixture
def run_dir(tmp_path):
    """A directory with nothing but a configuration."""
    config = build_config(
        {
            "model": {"path": "some/model"},
            "data": {"train": ["train.jsonl"]},
            "prompt": {"system": "<script>alert(3)</script>"},
            "run": {"steps": 40},
        }
    )
    replace_text(tmp_path / "config.yaml", dump_config(config))
    return tmp_path


def fill(run_dir):
    for step in range(1, 41):
        append_json(run_dir / "metrics.jsonl", row(step))
    evaluate(run_dir, 0, [W] * 60 + [C] * 10 + [U] * 130, EVIL, "AB")  # one key for all would be had without reading
    evaluate(run_dir, 40, [C] * 150 + [W] * 40 + [U] * 10, EVIL, "AB")
    for step in (1, 40):
        write_rollouts(rollout_path(run_dir, step), step, [graded(f"r{step}", [C, W, U], EVIL)])
    provenance.record_start(run_dir, ["alphamed", "train", "<u>"], [], None, {"continued_after_step": 0, "changed": {}})


class Page(HTMLParser):
    """Visible text, tags and all addresses a browser would ask for."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.addresses, self.words, self._hidden = set(), [], [], False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self._hidden = tag == "style"
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data", "poster")]
        assert not [name for name, _ in attrs if name.startswith("on")], attrs

    def handle_endtag(self, tag):
        self._hidden = False

    def handle_data(self, data):
        if not self._hidden:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


# ----------------------------------------------------------------------------------------------------------- whole page
def test_the_page_has_the_results(run_dir):
    fill(run_dir)
    page = Page(write_report(run_dir).read_text())
    # steps 1..5 of 40 have mean reward 3/40, steps 36..40 38/40
    assert "Mean reward rose: 0.07 in the first 5 steps, 0.95 in the last 5, 12.7 times as much." in page.text
    assert "The answer format was learnt: the share of boxed answers rose, 35.0% [28.7%, 41.8%]" in page.text
    assert "Knowledge: among boxed answers more are right than before" in page.text
    # of 200 questions 10 were right before (numbers 60..69) and stay right; 140 of the others became right
    assert "140 became correct 10 stayed correct 0 no longer correct 50 wrong both times" in page.text
    assert "40 of 40 steps" in page.text and "some/model" in page.text and "Time per step" in page.text
    assert "Step 1" in page.text and "Step 40" in page.text
    assert (run_dir / "curves.svg").exists()


def test_evaluations_of_other_questions_are_not_compared(run_dir):
    """A resume may change evaluation.questions: 200 questions before and 4 of them after show no change."""
    evaluate(run_dir, 0, [W] * 200)
    evaluate(run_dir, 20, [C] * 4)
    page = Page(write_report(run_dir).read_text())
    assert "Knowledge:" not in page.text and "before (step" not in page.text and "On 4 questions" not in page.text
    assert "4 questions, greedy answers" in page.text
    evaluate(run_dir, 40, [W] * 4)
    assert "before (step 20) → after (step 40)" in Page(write_report(run_dir).read_text()).text


def test_model_text_config_and_commands_stay_text(run_dir):
    fill(run_dir)
    html = write_report(run_dir).read_text()
    page = Page(html)
    assert not page.tags & {"script", "img", "i", "u", "iframe", "object", "link"}
    assert "</div><script>alert(1)</script><img src=x onerror=alert(2)> {{ 7*7 }}" in page.text
    assert "<script>alert(3)</script>" in page.text and "<i>q" in page.text and "alphamed train <u>" in page.text


def test_the_page_is_one_file_that_asks_for_nothing(run_dir):
    fill(run_dir)
    html = write_report(run_dir).read_text()
    page = Page(html)
    assert page.addresses == [] and "@import" not in html and "url(" not in html
    assert set(re.findall(r"https?://[^\s\"'<]+", html)) <= {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'; style-src 'unsafe-inline'" in html
    assert "prefers-color-scheme:dark" in html


def collapsed(run_dir):
    """Twelve steps in which every answer is B, and the key A."""
    for step in range(1, 13):
        append_json(run_dir / "metrics.jsonl", row(step))
        write_rollouts(rollout_path(run_dir, step), step, [always_b(f"q{k}", step) for k in range(4)])


def always_b(name, step):
    group = graded(name, [W, W], "It is \\boxed{B} " + EVIL.replace("\\boxed{A}", ""))
    question = Question(name, "Which?", {"A": "a", "B": "b"}, "A", None, f"source {step % 2}", 1 + step % 2)
    return ScoredGroup(
        RolloutGroup(name, question, (1,), group.group.rollouts), group.outcomes, group.rewards, group.advantages, ("B", "B")
    )


def test_a_collapsed_run_is_called_one(run_dir):
    collapsed(run_dir)
    page = Page(write_report(run_dir).read_text())
    assert (
        "One letter for all questions: in the last 5 recorded steps 100.0% of the answers are B, which is the key of 0.0% "
        "of these questions."
    ) in page.text
    assert "Accuracy by level" in page.text and "Accuracy by source" in page.text and "One letter: B" in page.text
    assert "Answers without reasoning" in page.text and "onerror=alert(2)" in page.text and "script" not in page.tags
    assert "4 questions trained on, 4 of them at more than one step" in page.text
    assert any(line.startswith("  Warning. One letter for all questions: ") for line in summary(run_dir))


def test_the_numbers_are_in_files(run_dir):
    fill(run_dir)
    write_report(run_dir)
    numbers = json.loads((run_dir / "report.json").read_text())
    assert numbers["last_step"] == 40 and numbers["evaluations"]["wording"]["40"]["accuracy"]["count"] == 150
    first, last = numbers["responses"]["recorded_steps"]
    assert (first["step"], last["step"], first["responses"], first["correct"], first["boxed"]) == (1, 40, 3, 1, 2)
    assert numbers["responses"]["questions"]["visited"] == 2 and numbers["warnings"] == []
    lines = (run_dir / "report_questions.csv").read_text().splitlines()
    assert lines[1] == "r1,,,,1,1,1,0.3333,0.3333,,0" and len(lines) == 3


def test_a_run_without_rollout_files_says_so_once(run_dir):
    append_json(run_dir / "metrics.jsonl", row(1))
    page = Page(write_report(run_dir).read_text())
    assert page.text.count("No responses are recorded (logging.rollout_files: false") == 1
    assert "Rewards without reasoning?" not in page.text and not (run_dir / "report_questions.csv").exists()
    assert json.loads((run_dir / "report.json").read_text())["responses"] is None


def test_one_letter_on_an_evaluation_set_is_reported(run_dir):
    evaluate(run_dir, 0, [C] * 30)  # the key is A and so is every answer: no collapse
    assert "One letter" not in Page(write_report(run_dir).read_text()).text
    items = run_dir / "evaluations" / "step_000000.items.jsonl"
    items.write_text(items.read_text().replace('"answer": "A"', '"answer": "B"').replace("correct", "wrong"))
    assert "One letter for all questions: on wording after step 0 100.0%" in Page(write_report(run_dir).read_text()).text


def without_steps(run_dir):
    pass


def one_step_of_a_replay(run_dir):
    append_json(run_dir / "metrics.jsonl", {"step": 1, "policy_version": 3, "reward/mean": 0.5, "policy/loss": None})


def only_before(run_dir):
    append_json(run_dir / "metrics.jsonl", row(1))
    evaluate(run_dir, 0, [C, W, U])


def nothing_boxed(run_dir):
    evaluate(run_dir, 0, [U, U])
    evaluate(run_dir, 5, [U, U])


def killed_amid_an_evaluation(run_dir):
    append_json(run_dir / "metrics.jsonl", row(1))
    evaluate(run_dir, 0, [C])
    (run_dir / "evaluations" / "step_000005.items.jsonl").write_text("")


@pytest.mark.parametrize(
    "make, expected",
    [
        (without_steps, "No step is recorded yet."),
        (one_step_of_a_replay, "1 step recorded, too few to compare"),
        (only_before, "3 questions, greedy answers"),
        (nothing_boxed, "0 boxed answers before, 0 after"),
        (killed_amid_an_evaluation, "1 question, greedy"),
    ],
)
def test_what_a_run_lacks_is_left_out(run_dir, make, expected):
    make(run_dir)
    page = Page(write_report(run_dir).read_text())
    assert expected in page.text and "nan" not in page.text.lower().split()


def test_three_evaluations_make_a_curve_with_intervals(run_dir):
    for step, right in ((0, 10), (10, 50), (20, 90)):
        evaluate(run_dir, step, [C] * right + [W] * (100 - right))
    html = write_report(run_dir).read_text()
    assert "Over the steps" in html and "before (step 0) → after (step 20)" in html


def test_a_folder_that_is_no_run_is_refused(tmp_path, run_dir, capsys):
    with pytest.raises(ConfigError, match="holds no config.yaml, so it is not a run directory"):
        main(tmp_path / "elsewhere")
    assert main(run_dir) == 0 and capsys.readouterr().out == f"{run_dir / 'report.html'}\n"


# ------------------------------------------------------------------------------------------------------------ sentences
def test_edges_skip_what_was_not_measured():
    rows = [{"step": k, "m": None if k == 2 else float(k)} for k in range(1, 13)]
    assert edges(rows, "m") == ((1 + 3 + 4 + 5) / 4, 10.0)
    assert edges(rows, "absent") == (None, None)


@pytest.mark.parametrize(
    "end, sentence",
    [
        (0.9, "Mean reward rose: 0.20 in the first 5 steps, 0.90 in the last 5, 4.5 times"),
        (0.1, "Mean reward fell: 0.20"),
        (0.2, "Mean reward did not change: 0.20"),
    ],
)
def test_reward_is_compared_at_both_ends(end, sentence):
    rows = [row(k, **{"reward/mean": 0.2 if k < 6 else end}) for k in range(1, 11)]
    assert training_sentences(rows)[0].startswith(sentence)


def test_dropped_groups_are_reported_with_their_length():
    rows = [row(k, **{"response/tokens_mean": 100.0}) for k in range(1, 5)]
    rows[1] |= {"staleness/dropped": 1.0, "staleness/dropped_tokens_mean": 700.0}
    rows[2] |= {"staleness/dropped": 3.0, "staleness/dropped_tokens_mean": 300.0}
    assert training_sentences(rows)[-1] == (  # (700 + 3 x 300) / 4
        "Groups dropped because they took longer than rollout.max_staleness steps: 4; the mean length of their responses "
        "was 400 tokens, that of the responses trained on 100. rollout.stragglers=wait trains on them."
    )


@pytest.mark.parametrize(
    ("share", "tokens", "warned"),
    [
        (0.04, 300.0, True),  # in one of two steps: 2% of the groups, three times as long
        (0.04, 149.0, False),  # hardly longer than those trained on
        (0.019, 300.0, False),  # fewer than 1%
    ],
)
def test_losing_the_long_answers_is_a_warning(share, tokens, warned):
    rows = [
        row(k, **{"response/tokens_mean": 100.0, "staleness/dropped": 0.0, "staleness/dropped_share": 0.0}) for k in (1, 2)
    ]
    rows[1] |= {"staleness/dropped": 2.0, "staleness/dropped_share": share, "staleness/dropped_tokens_mean": tokens}
    expected = (
        "Long answers are lost: 2.0% of the groups were dropped as too old, and their responses were 3.0 times as long as "
        "those trained on (300 and 100 tokens). rollout.stragglers=wait or a larger rollout.max_staleness trains on them."
    )
    assert length_bias_warning(rows) == ([expected] if warned else [])


def test_steps_of_unequal_size_are_reported():
    rows = [row(k, **{"sampling/questions": float(size)}) for k, size in enumerate((8, 8, 3), start=1)]
    assert training_sentences(rows)[-1] == (
        "Steps had 3 to 8 questions: run.min_steps adapted their size to the time that was left."
    )
    assert "Steps had" not in " ".join(training_sentences(rows[:2]))


def test_less_reasoning_is_reported():
    rows = [row(k, **{"reward/bare_box": 0.1 if k < 6 else 0.6}) for k in range(1, 11)]
    assert "in the last 5 steps 60.0% of boxed responses have fewer than 5 words" in training_sentences(rows)[1]
    assert len(training_sentences([row(k) for k in range(1, 11)])) == 1


# -------------------------------------------------------------------------------------------------------------- samples
def test_changes_are_counted_over_common_questions():
    def items(**outcomes):
        return {
            ("s", name): GradedAnswer(
                Asked("s", None, Question(name, "?", {"A": "a", "B": "b"}, "A")),
                0,
                "",
                FinishReason.STOP,
                1,
                None,
                Outcome(outcome),
            )
            for name, outcome in outcomes.items()
        }

    counts = changes(
        items(a="correct", b="wrong", c="correct", d="unparseable", e="wrong"),
        items(a="correct", b="correct", c="truncated", d="correct", f="correct"),
        "s",
        limit=1,
    )
    assert (counts.stayed_correct, counts.got_better, counts.got_worse, counts.stayed_wrong) == (1, 2, 1, 0)
    assert len(counts.better) == 1 and counts.worse[0].before.asked.question.id == "c"
    assert changes(items(a="correct"), items(b="correct"), "s") is None
    assert changes(items(a="correct"), items(a="correct"), "other") is None


@pytest.mark.parametrize(
    "text, boxes",
    [
        ("so \\boxed{A} or \\boxed {B}.", ["\\boxed{A}", "\\boxed {B}"]),
        ("\\boxed{A", []),
        ("", []),
        ("\\boxed{}", ["\\boxed{}"]),
    ],
)
def test_boxes_are_marked_and_no_letter_is_lost(text, boxes):
    pieces = marked(text)
    assert [piece for piece, box in pieces if box] == boxes and "".join(piece for piece, _ in pieces) == text


# --------------------------------------------------------------------------------------------------------------- charts
@pytest.mark.parametrize(
    "low, high, ticks",
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 64, [0, 20, 40, 60, 80]),
        (-0.02, 0.03, [-0.02, -0.01, 0, 0.01, 0.02, 0.03]),
        (0, 12, [0, 2.5, 5, 7.5, 10, 12.5]),
    ],
)
def test_ticks_are_round_and_cover(low, high, ticks):
    assert nice_ticks(low, high) == pytest.approx(ticks)


def test_smoothing_is_a_centred_mean_of_what_exists():
    assert smoothed([1, 2, None, 4, 6], 3) == [1.5, 1.5, None, 5.0, 5.0]
    assert smoothed([3.0, None], 1) == [3.0, None]


@pytest.mark.parametrize(
    "value, unit, text",
    [
        (0.5, "share", "50%"),
        (0.125, "share", "12.5%"),
        (5e-5, "", "5e-5"),
        (3.25e-6, "", "3.2e-6"),
        (0.0, "", "0"),
        (12345.6, "", "12,346"),
        (None, "", "-"),
    ],
)
def test_numbers_are_short(value, unit, text):
    assert number(value, unit) == text


def points(svg):
    path = ElementTree.fromstring(svg).findall(".//{*}path")[-1].get("d")
    return [tuple(map(float, pair)) for pair in re.findall(r"[ML]([\d.]+) ([\d.]+)", path)], path.count("M")


def test_a_line_runs_through_its_values_and_breaks_where_there_is_none():
    (drawn, pens) = points(line_chart([1, 2, 3, 4, 5], [Series("", [0.0, 1.0, None, 0.5, 1.0])]))
    assert len(drawn) == 4 and pens == 2
    bottom, top = drawn[0][1], drawn[1][1]
    assert bottom > top and drawn[2][1] == pytest.approx((bottom + top) / 2, abs=0.11) and drawn[3][1] == top
    assert drawn[1][0] - drawn[0][0] == pytest.approx((drawn[3][0] - drawn[0][0]) / 4, abs=0.11)


def test_a_logarithmic_axis_spaces_powers_of_ten_evenly():
    drawn, _ = points(line_chart([1, 2, 3, 4], [Series("", [1e-6, 1e-5, 1e-4, 1e-3])], log=True))
    gaps = [a[1] - b[1] for a, b in zip(drawn, drawn[1:])]
    assert gaps == pytest.approx([gaps[0]] * 3, abs=0.11) and gaps[0] > 10


def test_bars_stack_to_the_total():
    svg = ElementTree.fromstring(stacked_bars([1], [Series("a", [3.0]), Series("b", [None]), Series("c", [1.0])]))
    heights = [float(bar.get("height")) for bar in svg.findall(".//{*}rect") if bar.get("class", "").startswith("f")]
    assert len(heights) == 2 and (heights[0] + 0.6) / (heights[1] + 0.6) == pytest.approx(3, rel=0.02)


def test_every_figure_is_well_formed_and_names_are_escaped():
    for figure in figures([row(step, **{"policy/kl": 0.1, "policy/loss": None}) for step in range(1, 30)]):
        ElementTree.fromstring(figure.svg)
    chart = line_chart([1.0, 2.0, 3.0, 4.0], [Series("<b>", [1, 2, 3, 4])])
    ElementTree.fromstring(sheet([("a & b", chart)], "<title>"))


def test_figures_without_information_are_left_out():
    keys = {figure.key for figure in figures([row(step, **{"policy/kl": 0.0}) for step in range(1, 4)])}
    assert {"reward", "outcomes", "bare_box", "time"} <= keys and not keys & {"kl", "loss", "memory"}
    assert figures([]) == []
