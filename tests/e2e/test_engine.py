"""One real engine (TP 1, untied weights, deterministic): what it says, in which versions, and how it dies."""

import os
import signal
from dataclasses import replace

import pytest
from engines import (
    EOS,
    QUESTION,
    TEXT,
    ModelSource,
    assert_said_alike,
    config,
    generate,
    largest_difference,
    load,
    logprobs,
    said,
    score,
    start_pool,
    sync_of,
    task,
    tiny,
)

from alphamed.records import FinishReason, GenerationTask, Sampling
from alphamed.reward import process
from alphamed.rollout.coordinator import Coordinator
from alphamed.rollout.failures import EngineDied, StaleEngine, explain

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("model"), seed=0, tied=False)


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)


@pytest.fixture(scope="module")
def pool(ray_session, folder):
    pool = start_pool(config(), folder)
    yield pool
    pool.stop()


@pytest.fixture(scope="module")
def engine(pool):
    return pool.engines[0]


@pytest.fixture(scope="module")
def coordinator(ray_session, pool):
    chosen = config(max_concurrent_requests=8)
    return Coordinator.start(chosen, pool, process.start(chosen))


def test_a_fixed_text_scores_as_in_transformers(pool, model):
    assert largest_difference(score(pool)[0], logprobs(model, TEXT)) < 2e-4


def test_sampled_logprobs_are_those_of_the_distribution_sampled_from(engine, model):
    (group,) = generate(engine, [task("t", n=4, temperature=0.7, seed=11)], 0)
    assert len({rollout.response_token_ids for rollout in group.rollouts}) == 4
    for index, rollout in enumerate(group.rollouts):
        expected = logprobs(model, group.prompt_token_ids + rollout.response_token_ids, 0.7)[
            len(group.prompt_token_ids) - 1 :
        ]
        assert largest_difference(rollout.logprobs, expected) < 2e-4
        assert (rollout.group_id, rollout.question_id, rollout.sample_index, rollout.policy_version) == ("t", "q", index, 0)


def test_an_end_token_ends_the_response_and_belongs_to_it(engine, model):
    """With the end token's logit drowned in temperature it comes within 28 tokens now and then."""
    (group,) = generate(engine, [task("t", n=96, temperature=2.0, max_tokens=28, seed=1)], 0)
    ended = [rollout for rollout in group.rollouts if EOS in rollout.response_token_ids]
    assert len(ended) >= 2
    for rollout in group.rollouts:
        stops = rollout in ended
        assert rollout.finish_reason == (FinishReason.STOP if stops else FinishReason.LENGTH)
        assert rollout.response_token_ids.count(EOS) == stops
        assert rollout.response_token_ids[-1] == EOS if stops else len(rollout.response_token_ids) == 28
        assert "<|im_end|>" not in rollout.text
    sample = ended[0]
    expected = logprobs(model, group.prompt_token_ids + sample.response_token_ids, 2.0)[-1]
    assert sample.logprobs[-1] == pytest.approx(expected, abs=2e-4)


def test_greedy_takes_the_likeliest_token(engine, model):
    import torch

    (group,) = generate(engine, [task("t")], 0)
    tokens = group.prompt_token_ids + group.rollouts[0].response_token_ids
    with torch.no_grad():
        likeliest = model(torch.tensor([tokens])).logits[0].argmax(-1)
    assert tuple(likeliest[len(group.prompt_token_ids) - 1 : -1].tolist()) == group.rollouts[0].response_token_ids


def test_seeded_samples_repeat_in_any_order(engine):
    tasks = [task(f"{i}", length=12 + 5 * i, n=4, temperature=1.0, seed=1000 * i) for i in range(8)]
    first, again = (said(generate(engine, tasks, 0)) for _ in range(2))
    backwards = said(generate(engine, tasks[::-1], 0)[::-1])
    assert_said_alike(first, again)
    assert_said_alike(first, backwards)
    assert len({tokens for tokens, _ in first}) == 32


def test_sample_j_of_a_seeded_task_uses_seed_plus_j(engine):
    (together,) = generate(engine, [task("t", n=3, temperature=1.0, seed=70)], 0)
    alone = generate(engine, [task("t", n=1, temperature=1.0, seed=70 + j) for j in range(3)], 0)
    assert [r.response_token_ids for r in together.rollouts] == [g.rollouts[0].response_token_ids for g in alone]


def test_a_version_that_was_not_acknowledged_is_refused(ray_session, engine):
    with pytest.raises(ray_session.exceptions.RayTaskError) as caught:
        generate(engine, [task("t")], 1)
    error = explain(caught.value, engine.peer, "sampling")
    assert isinstance(error, StaleEngine)
    assert str(error) == f"{engine.peer}: was asked to answer with policy version 1 but holds version 0"


def test_the_coordinator_gives_groups_in_the_order_of_tasks(coordinator):
    seen = []
    tasks = [task(f"{i}", n=4, temperature=1.0, max_tokens=28 - 4 * i) for i in range(6)]
    done = coordinator.run("step 1", tasks, seen.append)
    assert [one.group.group_id for one in done.groups] == [one.group_id for one in tasks]
    assert done.response_tokens == sum(len(r.response_token_ids) for one in done.groups for r in one.group.rollouts)
    assert seen[-1] == done and 0 < done.generate_s


def test_a_prompt_that_is_too_long_is_refused_by_name(coordinator):
    from alphamed.errors import RunFailed

    long = GenerationTask("long", QUESTION, TEXT * 3, Sampling(1, 0.0, 1.0, -1, 8))
    with pytest.raises(RunFailed, match="engine 0 .*sampling long failed"):
        coordinator.run("step 2", [long])


def test_a_push_makes_the_engine_say_what_the_new_model_says(pool, engine, coordinator, tmp_path):
    """TP 1, untied: version 1, probed."""
    before = score(pool)[0]
    source = ModelSource(tiny(tmp_path / "new", seed=1, tied=False))
    assert sync_of(config(), pool, source, tmp_path, probed=True).push() == 1
    after = score(pool)[0]
    assert largest_difference(after, logprobs(source.model, TEXT)) < 2e-4
    assert largest_difference(after, before) > 0.1
    done = coordinator.run("step 3", [task("t")])
    assert done.groups[0].group.rollouts[0].policy_version == 1


def test_the_environment_of_torchrun_does_not_reach_vllm(engine):
    for name, pid in engine.processes.items():
        with open(f"/proc/{pid}/environ", "rb") as file:
            variables = {entry.split(b"=")[0] for entry in file.read().split(b"\0")}
        if name != "actor":
            assert not variables & {b"RANK", b"WORLD_SIZE", b"MASTER_ADDR", b"MASTER_PORT"}, name


def test_the_death_of_enginecore_is_noticed_and_named(pool, engine, coordinator):
    """The last test: the engine does not come back."""
    pid = engine.processes["VLLM::EngineCore"]
    many = [replace(task(f"{i}", n=4, temperature=1.0), prompt_token_ids=TEXT[: 20 + i % 50]) for i in range(2000)]
    killed = []

    def kill(progress):
        if progress.generated and not killed:
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    with pytest.raises(EngineDied) as caught:
        coordinator.run("step 4", many, kill)
    assert str(caught.value) == f"{engine.peer}: its process VLLM::EngineCore (pid {pid}) ended"
    with pytest.raises(EngineDied, match="VLLM::EngineCore"):
        coordinator.run("step 5", [task("t")])


@pytest.mark.matrix
def test_an_engine_that_can_not_start_says_why(ray_session, folder):
    """vLLM finds the cache too small in its own process, and would only point to a log."""
    from alphamed.errors import RunFailed

    with pytest.raises(
        RunFailed, match=r"engine 0.*vLLM did not start: ValueError: No available memory for the cache blocks"
    ):
        start_pool(config(kv_cache_bytes=4096), folder)
