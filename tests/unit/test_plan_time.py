"""What a plan's time holds beside one round of generation and an update: refills, overlap, evaluations. Numbers by hand."""

import gzip
import json

import pytest

from alphamed.config.loading import build_config
from alphamed.lab.planner.evaluations import count_questions
from alphamed.lab.planner.plan import hours, job_of, make_plan
from alphamed.lab.planner.time import rounds, step_time, wait_seconds

QWEN_3B = "Qwen/Qwen2.5-3B-Instruct"


def config(**sections):
    tree = {
        "model": {"path": QWEN_3B},
        "data": {"train": ["x.jsonl"]},
        "cluster": {"device": "cuda"},
        "prompt": {"max_tokens": 256},
        "rollout": {"questions_per_step": 8, "max_response_tokens": 1000},
        "parallel": {"micro_batch_tokens": 4096, "recompute": "full"},
    }
    return build_config(tree | {name: tree.get(name, {}) | values for name, values in sections.items()})


def job(**sections):
    """Responses of exactly 1,000 tokens, so that all sequences run to the end; prompts of 200."""
    return job_of(config(**sections), prompt_tokens=200, response_tokens=1000)[0]


def generated(questions: int, samples: int) -> float:
    """Seconds of an engine on an H100 (989.4 TFLOPS at 44.2%, 3.35 TB/s at 75%, 5.455 ms a decoding step): Qwen2.5-3B has
    3,085,938,688 parameters (tied) and 36 layers with 2 KV heads of 128."""
    parameters, token_bytes = 3_085_938_688, 2 * 36 * 2 * 128 * 2
    reading = (parameters * 2 + questions * samples * (200 + 500) * token_bytes) / (3.35e12 * 0.75)
    prefill = questions * 200 * 2 * parameters / (989.4e12 * 0.442)
    return prefill + 1000 * (reading + 5.455e-3)


# --------------------------------------------------------------------------------------------------------------- refills
@pytest.mark.parametrize(
    ("sampling", "staleness", "expected"),
    [
        ({}, 0, [8]),
        ({"refills": 2}, 0, [8, 4, 2]),  # half of the groups have signal
        ({"refills": 9}, 0, [8, 4, 2, 1, 1]),  # 8, 4, 2, 1, 1/2, and then a quarter of a group: nothing
        ({"refills": 9, "choose": True}, 0, [8, 4, 2, 1]),  # 40% are left of each round: 3.2, 1.28, 0.512
        ({"choose": True}, 0, [8]),
        ({"refills": 9}, 1, [16]),  # replaced as they come
        ({"refills": 0}, 1, [8]),
    ],
)
def test_rounds_of_a_step(sampling, staleness, expected):
    assert rounds(job(dynamic_sampling=sampling, rollout={"questions_per_step": 8, "max_staleness": staleness})) == expected


def test_every_round_is_generated_after_the_one_before():
    planned = job(dynamic_sampling={"refills": 1})
    assert step_time(job()).generate == pytest.approx(generated(8, 8), rel=1e-6)
    assert step_time(planned).generate == pytest.approx(generated(8, 8) + generated(4, 8), rel=1e-6)
    assert wait_seconds(planned) == pytest.approx(generated(8, 8), rel=1e-6)  # each round has the deadline to itself


# --------------------------------------------------------------------------------------------------------------- overlap
def test_generation_ahead_overlaps_training():
    apart, ahead = (
        step_time(job(rollout={"questions_per_step": 8, "max_response_tokens": 1000, "max_staleness": k})) for k in (0, 1)
    )
    assert ahead.parts() == apart.parts() and ahead.training < ahead.generate
    assert apart.total == pytest.approx(apart.generate + apart.training + apart.sync + 3.0)
    assert ahead.total == pytest.approx(ahead.generate + ahead.sync + 3.0)  # training takes less time than that
    assert (apart.waited, ahead.waited) == (apart.generate, pytest.approx(ahead.generate - ahead.training))


@pytest.mark.parametrize("cluster", [{"device": "cuda", "share_gpus": True, "gpus_per_node": 1}, {"device": "cpu"}])
def test_nothing_overlaps_on_shared_devices(cluster):
    seconds = [step_time(job(cluster=cluster, rollout={"questions_per_step": 8, "max_staleness": k})).total for k in (0, 1)]
    assert seconds[0] == seconds[1]


# ----------------------------------------------------------------------------------------------------------- evaluations
@pytest.mark.parametrize(("every", "background", "between"), [(0, None, 0), (4, False, 2), (5, False, 1), (4, True, 2)])
def test_evaluations_are_in_the_hours_of_a_run(tmp_path, every, background, between):
    """Ten steps; every 4: after 4 and 8, and after the last; every 5: the second is the one after the last step."""
    exam = tmp_path / "exam.jsonl"
    exam.write_text("".join(json.dumps({"id": i}) + "\n" for i in range(700)) + "\n")
    evaluation = {
        "files": [str(exam)],
        "questions": 200,
        "before": True,
        "after": True,
        "every": every,
        "background": background,
    }
    planned = job(run={"steps": 10}, evaluation=evaluation, checkpoint={"every": 0})
    plan = make_plan(planned)
    counted, seconds = plan.assessment.evaluations, generated(200, 1)
    assert planned.evaluation_questions == (200,) and counted.seconds == pytest.approx(seconds, rel=1e-6)
    assert (counted.ends, counted.between) == (2, between)
    # beside a step the engines have the time of its training to spare
    beside = max(0.0, seconds - plan.assessment.time.training) if background else seconds
    assert counted.total == pytest.approx(2 * seconds + between * beside, rel=1e-6)
    assert hours(plan) * 3600 == pytest.approx(10 * plan.assessment.time.total + plan.checkpoint.save_s + counted.total)


def test_questions_are_counted_where_they_can_be(tmp_path):
    exam = tmp_path / "exam.jsonl"
    exam.write_text("{}\n\n{}\n{}\n")
    assert count_questions(config(evaluation={"files": [str(exam)]})) == (3,)
    assert count_questions(config(evaluation={"files": [str(exam), "not-here.jsonl"]})) is None
    assert count_questions(config(evaluation={"files": [str(exam), "not-here.jsonl"], "questions": 2})) == (2, 2)
    assert count_questions(config()) == ()
    rows = [{"question": "One\nor two?"}, {"question": "b"}, {"question": "c"}]
    (tmp_path / "array.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "cells.csv").write_text('question\n"One\nor two?"\nb\nc\n')
    with gzip.open(tmp_path / "packed.jsonl.gz", "wt") as packed:
        packed.writelines(json.dumps(row) + "\n" for row in rows)
    files = [str(tmp_path / name) for name in ("array.json", "cells.csv", "packed.jsonl.gz")]
    assert count_questions(config(evaluation={"files": files})) == (3, 3, 3)


def test_an_evaluation_past_the_deadline_is_a_problem(tmp_path):
    evaluation = {"files": ["not-here.jsonl"], "questions": 1_000_000, "before": True}
    plan = make_plan(job(evaluation=evaluation))
    assert "rollout.step_deadline_s: evaluating 1,000,000 questions takes" in plan.problems[0].text
