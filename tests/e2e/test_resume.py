"""Four steps are two steps, a resume and two more: the same metrics and the same final weights, to FP32 rounding.

Replayed: the rollouts are made here, so no engine is needed; also with another layout before and after the resume.
Live: a deterministic FP32 engine samples the same tokens; what it says with the weights of step 2 is also what a fresh
engine says that has loaded the exported folder.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engines import generate, load, logprobs, said, start_pool
from safetensors.torch import load_file
from tiny_run import Workplace, metrics

from alphamed.algorithms.advantage import group_advantages
from alphamed.config.loading import dump_config, load_config
from alphamed.data.prompts import PromptBuilder
from alphamed.data.tokenizer import load_tokenizer
from alphamed.records import FinishReason, Outcome, Question, Rollout, RolloutGroup, Sampling, ScoredGroup
from alphamed.rollout.tasks import training_tasks
from alphamed.rundir.rollout_files import read_rollouts, rollout_path, write_rollouts

pytestmark = pytest.mark.slow
STEPS = 4
# What a resume could lose: Adam's moments and their step, the schedule, the reference, the place in the questions.
TRAINING = {
    "algorithm": {"kl_coefficient": 0.05, "mini_batches": 2},
    "optimizer": {"lr": 1e-3, "schedule": "cosine", "warmup_steps": 1},
    "logging": {"wandb": "off", "report": False, "export_hf": True},
}
COMPARED = ("policy/", "reward/", "response/", "batch/")


def compared(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name.startswith(COMPARED)}


def assert_same_training(one: Path, other: Path, steps=range(1, STEPS + 1)) -> None:
    """All metrics of these steps to FP32 rounding."""
    a, b = metrics(one), metrics(other)
    assert sorted(a) == sorted(b) == list(range(1, STEPS + 1))
    for step in steps:
        assert compared(a[step]) == pytest.approx(compared(b[step]), rel=1e-5, abs=1e-6), f"step {step}"
        assert a[step]["policy/loss"] != 0 and a[step]["policy/grad_norm"] > 0


def assert_same_weights(one: Path, other: Path) -> None:
    a, b = load_file(one / "hf" / "model.safetensors"), load_file(other / "hf" / "model.safetensors")
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


# ---------------------------------------------------------------------------------------------------------------- replayed
def random_group(model, step: int, place: int) -> ScoredGroup:
    """A prompt and four responses of random tokens with the log-probs that the model gives them."""
    generator = torch.Generator().manual_seed(100 * step + place)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 509, (length,), generator=generator).tolist())

    name, prompt = f"{step}:{place}", tokens(9 + 4 * place)
    responses = [tokens(int(n)) for n in torch.randint(2, 17, (4,), generator=generator)]
    rollouts = tuple(
        Rollout(
            name,
            f"q{place}",
            j,
            response,
            tuple(logprobs(model, prompt + response)[len(prompt) - 1 :]),
            "text",
            FinishReason.LENGTH,
            step,
        )
        for j, response in enumerate(responses)
    )
    rewards = torch.rand(4, generator=generator)
    return ScoredGroup(
        RolloutGroup(name, Question(f"q{place}", "?", {"A": "a", "B": "b"}, "A"), prompt, rollouts),
        (Outcome.WRONG,) * 4,
        tuple(rewards.tolist()),
        tuple(group_advantages(rewards, torch.zeros(4, dtype=torch.long), "grpo").tolist()),
        (None,) * 4,
    )


@pytest.fixture(scope="module")
def replays(tmp_path_factory) -> Workplace:
    """A workplace with recorded rollouts of four steps."""
    place = Workplace(tmp_path_factory.mktemp("replays"), **TRAINING)
    model = load(place.model)
    (place.folder / "recorded").mkdir()
    (place.folder / "recorded" / "config.yaml").write_text(dump_config(load_config(place.folder / "run.yaml")))
    for step in range(1, STEPS + 1):
        path = rollout_path(place.folder / "recorded", step)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_rollouts(path, step, [random_group(model, step, i) for i in range(4)])
    return place


@pytest.fixture(scope="module")
def straight(replays) -> Path:
    return replays.train("straight", "rollout.replay=recorded")


def test_the_replay_trains_on_what_was_recorded(straight):
    """Before its first update the policy is the model whose log-probs were recorded; later it is not."""
    found = metrics(straight)
    assert found[1]["policy/logprob_diff_max"] < 5e-5
    assert found[4]["policy/logprob_diff_mean"] > 0.01
    assert found[2]["policy/lr"] > found[3]["policy/lr"] > found[4]["policy/lr"] > 0


def test_replayed_steps_in_two_parts(replays, straight):
    replays.train("parts", "rollout.replay=recorded", "run.stop_after=2")
    parts = replays.train("parts", "rollout.replay=recorded")
    assert_same_training(straight, parts)
    assert_same_weights(straight, parts)


def test_replayed_steps_under_other_layouts(replays, straight):
    """Two steps with tensor parallelism, then two with pipeline and context parallelism from the same checkpoint."""
    replays.train("layouts", "rollout.replay=recorded", "run.stop_after=2", "parallel.tensor=2", "parallel.sequence=true")
    layouts = replays.train(
        "layouts", "rollout.replay=recorded", "parallel.pipeline=2", "parallel.context=2", "parallel.micro_batch_tokens=200"
    )
    one, other = metrics(straight), metrics(layouts)
    for step in range(1, STEPS + 1):
        loss = one[step]["policy/loss"]
        assert math.isclose(other[step]["policy/loss"], loss, rel_tol=0, abs_tol=1e-5 + 1e-4 * abs(loss)), f"step {step}"
        assert other[step]["policy/grad_norm"] == pytest.approx(one[step]["policy/grad_norm"], rel=1e-4), f"step {step}"
        for name in ("policy/logprob_diff_mean", "policy/entropy", "policy/kl"):
            assert other[step][name] == pytest.approx(one[step][name], abs=1e-4), f"step {step}: {name}"


# -------------------------------------------------------------------------------------------------------------------- live
@pytest.fixture(scope="module")
def live(tmp_path_factory) -> Workplace:
    """Six questions, four a step: an epoch ends within step 2. Samples are seeded by the name of the run, not its place."""
    place = Workplace(tmp_path_factory.mktemp("live"), questions=6, **TRAINING)
    straight = place.train("straight", "rollout.deterministic=true")
    place.train("parts", "rollout.deterministic=true", "run.stop_after=2")
    shutil.copytree(place.run_dir("parts") / "hf", place.folder / "after_two")
    place.train("parts", "rollout.deterministic=true")
    assert all(metrics(straight)[step]["reward/effective_groups"] > 0 for step in range(1, STEPS + 1))
    return place


@pytest.mark.matrix
def test_live_steps_in_two_parts(live):
    straight, parts = live.run_dir("straight"), live.run_dir("parts")
    for step in range(1, STEPS + 1):
        one, other = (read_rollouts(rollout_path(run, step)) for run in (straight, parts))
        assert sampled(one) == sampled(other), f"step {step}"
        assert [scored.group.question for scored in one] == [scored.group.question for scored in other]
        assert [scored.rewards for scored in one] == [scored.rewards for scored in other]
    assert_same_training(straight, parts)
    assert_same_weights(straight, parts)


@pytest.mark.matrix
def test_a_fresh_engine_on_the_exported_folder_says_what_the_trained_one_said(ray_session, live):
    """Step 3 was sampled with the weights that were exported after step 2: the same seeded requests, sent together, give the
    same tokens. Teacher-forced, transformers on that folder agrees with the engine's greedy answers."""
    recorded = read_rollouts(rollout_path(live.run_dir("straight"), 3))
    chosen = load_config(live.folder / "run.yaml", ["rollout.deterministic=true"])
    prompts = PromptBuilder(load_tokenizer(live.folder / "after_two"), chosen.prompt)
    tasks = training_tasks(chosen, 3, [scored.group.question for scored in recorded], prompts)
    assert [task.prompt_token_ids for task in tasks] == [scored.group.prompt_token_ids for scored in recorded]
    greedy = [
        replace(task, group_id=f"greedy {task.group_id}", sampling=Sampling(1, 0.0, 1.0, -1, 16), evaluation=True)
        for task in tasks
    ]
    pool = start_pool(chosen, live.folder / "after_two")
    try:
        fresh, answers = (generate(pool.engines[0], sent, 0) for sent in (tasks, greedy))
    finally:
        pool.stop()
    assert [tokens for tokens, _ in said(fresh)] == [tokens for _, _, tokens in sampled(recorded)]
    assert share_of_argmax(load(live.folder / "after_two"), answers) >= 0.95
    assert share_of_argmax(load(live.model), answers) < 0.95  # the untrained model would have said other things


def sampled(groups) -> list[tuple]:
    return [
        (group.group.prompt_token_ids, rollout.sample_index, rollout.response_token_ids)
        for group in groups
        for rollout in group.group.rollouts
    ]


def share_of_argmax(model, groups) -> float:
    """The share of response tokens that are the likeliest in transformers, given those before them."""
    agree = []
    for group in groups:
        prompt, response = group.prompt_token_ids, group.rollouts[0].response_token_ids
        with torch.no_grad():
            likeliest = model(torch.tensor([prompt + response])).logits[0].argmax(-1)
        agree += (likeliest[len(prompt) - 1 : -1] == torch.tensor(response)).tolist()
    assert len(agree) > 30
    return sum(agree) / len(agree)
