"""Rollouts ahead of the policy with real engines: a whole run one step ahead, and a push that finds requests under way.

transformers' FP32 log-probs say which weights a token was sampled with.
"""

import subprocess
import sys
from collections import Counter

import pytest
from engines import (
    DEADLINE_S,
    ModelSource,
    config,
    generate,
    largest_difference,
    load,
    logprobs,
    start_engines,
    sync_of,
    task,
    tiny,
)
from tiny_reader import PROMPT, tiny_reader, unknown_questions

from alphamed.files import read_json_lines
from alphamed.rundir.rollout_files import question_json, read_rollouts, rollout_path

pytestmark = pytest.mark.slow


# -------------------------------------------------------------------------------------------------------------- a whole run
STEPS = 5
CONFIG = """
model: {{path: model, dtype: fp32}}
data: {{train: [questions.jsonl]}}
run: {{name: ahead, seed: 1, steps: {steps}}}
prompt: {{template: {prompt.template}, instruction: "{prompt.instruction}", max_tokens: {prompt.max_tokens}}}
rollout: {{questions_per_step: 8, samples_per_question: 8, max_response_tokens: 4, dtype: fp32, max_staleness: 1}}
dynamic_sampling: {{refills: 4, choose: true}}
reward: {{overlong_buffer_tokens: 1}}
optimizer: {{lr: 5e-4, weight_decay: 0.0}}
checkpoint: {{every: 2}}
evaluation: {{files: [questions.jsonl], allow_overlap: true, every: 2, background: true}}
logging: {{wandb: off, report: false, export_hf: false}}
cluster: {{device: cpu}}
"""


def test_a_run_one_step_ahead(tmp_path):
    tiny_reader(tmp_path / "model", 1)
    questions = unknown_questions(1)
    (tmp_path / "questions.jsonl").write_text("".join(question_json(one) + "\n" for one in questions))
    (tmp_path / "ahead.yaml").write_text(CONFIG.format(steps=STEPS, prompt=PROMPT))
    done = subprocess.run(
        [sys.executable, "-m", "alphamed.cli", "train", "--config", "ahead.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs" / "ahead"
    metrics = {row["step"]: row for row in read_json_lines(run / "metrics.jsonl")}
    assert sorted(metrics) == list(range(1, STEPS + 1))
    assert metrics[1]["staleness/max"] == 0.0
    assert all(metrics[step]["staleness/max"] <= 1.0 for step in metrics)
    assert sum(metrics[step]["staleness/mean"] for step in metrics) > 0  # generation went on during training
    for step, row in metrics.items():
        groups = read_rollouts(rollout_path(run, step))
        ages = [step - rollout.policy_version for scored in groups for rollout in scored.group.rollouts]
        assert len(groups) == 8 and set(ages) <= {0, 1}  # the weights of step n are version n
        assert row["staleness/mean"] == pytest.approx(sum(ages) / len(ages)) and row["policy_version"] == step - max(ages)
        assert row["sampling/refill_limit_reached"] or all(
            0 < sum(outcome == "correct" for outcome in scored.outcomes) < 8 for scored in groups
        )
        assert row["policy/corrected_fraction"] <= 0.5
    asked = Counter(
        name for step in metrics for name in {scored.group.group_id for scored in read_rollouts(rollout_path(run, step))}
    )
    assert max(asked.values()) == 1  # no group is trained on twice
    evaluated = sorted(path.name for path in (run / "evaluations").glob("step_*.json"))
    assert evaluated == ["step_000002.json", "step_000004.json"]
    audited = subprocess.run(
        [sys.executable, "-m", "alphamed.cli", "audit", str(run)], capture_output=True, text=True, timeout=120
    )
    assert audited.returncode == 0, audited.stdout + audited.stderr
    assert "step_000004" in audited.stdout and f"{STEPS} of {STEPS} steps agree" in audited.stdout


# -------------------------------------------------------------------------------------------- a push with requests under way
LENGTH = 700
"""Tokens of a response at most: a short one is answered long before."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of two models; the second is pushed."""
    return [tiny(tmp_path_factory.mktemp("model"), seed=seed, tied=False) for seed in (0, 1)]


@pytest.fixture(scope="module")
def judges(models):
    return [load(folder) for folder in models]


@pytest.fixture(scope="module")
def pushed(ray_session, models, tmp_path_factory):
    """What engines that wait, keep and abort had under way when version 1 came; and the pool, which holds it now."""
    import ray

    modes = ("wait", "keep", "abort")
    chosen = {
        mode: config(
            max_staleness=1, on_push=mode, deterministic=False, max_response_tokens=LENGTH, max_concurrent_requests=16
        )
        for mode in modes
    }
    pool = start_engines([(chosen[mode], models[0]) for mode in modes])
    try:
        long = [
            [engine.actor.generate.remote(task(f"{i}", n=2, temperature=1.0, max_tokens=LENGTH), 0) for i in range(3)]
            for engine in pool.engines
        ]
        for engine in pool.engines:
            generate(engine, [task("short", max_tokens=4)], 0)
        push = sync_of(chosen["wait"], pool, ModelSource(models[1]), tmp_path_factory.mktemp("run"), probed=True)
        assert push.push() == 1
        yield pool, dict(zip(modes, (ray.get(calls, timeout=DEADLINE_S) for calls in long), strict=True))
    finally:
        pool.stop()


def agreement(judges, group, rollout) -> tuple[list[bool], list[bool]]:
    """Token by token, whether the old and the new model give the log-prob that the engine reported."""
    prompt = group.prompt_token_ids
    both = [logprobs(model, prompt + rollout.response_token_ids)[len(prompt) - 1 :] for model in judges]
    return tuple(
        [abs(mine - theirs) < 2e-3 for mine, theirs in zip(rollout.logprobs, expected, strict=True)] for expected in both
    )


def test_requests_that_a_push_waits_for_are_of_the_old_version(judges, pushed):
    for group in pushed[1]["wait"]:
        for rollout in group.rollouts:
            assert rollout.policy_version == 0 and all(agreement(judges, group, rollout)[0])


def test_kept_requests_go_on_with_the_new_weights(judges, pushed):
    """Old log-probs up to some token, new ones from there; the sample carries the older version."""
    switched = 0
    for group in pushed[1]["keep"]:
        for rollout in group.rollouts:
            old, new = agreement(judges, group, rollout)
            assert rollout.policy_version == 0
            first = old.index(False) if False in old else len(old)
            assert all(old[:first]) and all(new[first:])
            switched += 0 < first < len(old)
    assert switched > 0


def test_aborted_requests_begin_anew_with_the_new_weights(judges, pushed):
    begun_anew = 0
    for group in pushed[1]["abort"]:
        versions = {rollout.policy_version for rollout in group.rollouts}
        assert len(versions) == 1
        begun_anew += versions == {1}
        for rollout in group.rollouts:
            assert all(agreement(judges, group, rollout)[rollout.policy_version])
    assert begun_anew > 0


def test_afterwards_a_request_for_the_old_version_gets_the_new_one(judges, pushed):
    for engine in pushed[0].engines:
        (group,) = generate(engine, [task("later")], 0)
        assert group.rollouts[0].policy_version == 1
        expected = logprobs(judges[1], group.prompt_token_ids + group.rollouts[0].response_token_ids)
        assert largest_difference(group.rollouts[0].logprobs, expected[len(group.prompt_token_ids) - 1 :]) < 2e-4
