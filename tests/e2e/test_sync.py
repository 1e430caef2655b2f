"""Pushes into real engines, of whole tensors and of shards: TP 1 with tied weights beside a twin that loaded the same from
disk, TP 2 tied and untied, both in bf16.

(TP 1 untied is pushed to in test_engine.py.) transformers' log-probs are the judge.
"""

import os
import signal

import pytest
import torch
from engines import (
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
    start_engines,
    start_pool,
    sync_of,
    task,
    tiny,
)

from alphamed.errors import RunFailed
from alphamed.rollout.failures import ActorDied, EngineDied

pytestmark = pytest.mark.slow


def hook(engine, method, **arguments):
    import ray

    ray.get(engine.actor.call_workers.remote(f"alphamed_hook_{method}", **arguments), timeout=600)


# --------------------------------------------------------------------------------------------------------- TP 1, tied, twins
@pytest.fixture(scope="module")
def old(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("old"), seed=0, tied=True)


@pytest.fixture(scope="module")
def new(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("new"), seed=1, tied=True)


@pytest.fixture(scope="module")
def twins(ray_session, old, new):
    """Engine 0 has loaded `old`, engine 1 `new`; pushes go to both."""
    pool = start_pool(config(), old, new)
    yield pool
    pool.stop()


@pytest.fixture(scope="module")
def fresh(twins):
    """What an engine says that has loaded `new` from disk and was never pushed to."""
    return said(generate(twins.engines[1], TASKS, 0)), score(twins, 0)[1]


TASKS = [task(f"{i}", length=10 + 7 * i, max_tokens=24) for i in range(10)]


def test_engines_begin_with_what_they_loaded(twins, fresh, old, new):
    one, two = score(twins, 0)
    assert largest_difference(one, logprobs(load(old), TEXT)) < 2e-4
    assert largest_difference(two, logprobs(load(new), TEXT)) < 2e-4


@pytest.mark.parametrize("transport", ["gloo", "ipc"])
@pytest.mark.parametrize("mode", ["gather", "direct"])
def test_after_a_push_an_engine_says_what_a_fresh_one_says(twins, fresh, old, new, tmp_path, mode, transport):
    if twins.version:
        sync_of(config(), twins, ModelSource(old), tmp_path).push()
    before = said(generate(twins.engines[0], TASKS, twins.version))
    source = ModelSource(new)
    version = sync_of(config(mode, transport), twins, source, tmp_path, probed=True).push()
    pushed = said(generate(twins.engines[0], TASKS, version))
    assert_said_alike(pushed, fresh[0])
    assert [tokens for tokens, _ in pushed] != [tokens for tokens, _ in before]
    assert score(twins)[0] == fresh[1]  # alone in its engine: to the last bit
    assert largest_difference(score(twins)[0], logprobs(source.model, TEXT)) < 2e-4
    assert_said_alike(said(generate(twins.engines[1], TASKS, version)), fresh[0])


@pytest.mark.parametrize("mode", ["gather", "direct"])
def test_a_stale_tied_head_shows(twins, fresh, old, new, tmp_path, mode):
    """Without the refresh vLLM multiplies by the old output layer: what the comparisons above are able to see."""
    sync_of(config(), twins, ModelSource(old), tmp_path).push()
    hook(twins.engines[0], "stale_head", stale=True)
    source = ModelSource(new)
    sync_of(config(mode), twins, source, tmp_path).push()
    stale, good = score(twins)
    assert largest_difference(stale, logprobs(source.model, TEXT)) > 0.1 and good == fresh[1]
    hook(twins.engines[0], "stale_head", stale=False)


def test_the_probe_catches_a_tensor_that_was_loaded_wrongly(twins, new, tmp_path):
    hook(twins.engines[1], "misload", name="model.layers.2.mlp.down_proj.weight")
    with pytest.raises(RunFailed, match=r"engine 1 \(pid \d+\): its log-probs of a fixed text differ"):
        sync_of(config(), twins, ModelSource(new), tmp_path, probed=True).push()
    hook(twins.engines[1], "misload", name=None)


def test_a_bucket_damaged_on_its_way_is_caught_by_its_digest(ray_session, twins, old, tmp_path):
    version = twins.version
    hook(twins.engines[1], "damage", bucket_index=2, tensor_rank=0)
    with pytest.raises(RunFailed) as caught:
        sync_of(config(), twins, ModelSource(old), tmp_path).push()
    assert caught.value.component == "engine 1 worker 0"
    assert caught.value.message.startswith("received other weights than were sent: bucket 2 of stage 0 (model.embed_tokens.")
    assert caught.value.message.endswith("at engine 1 worker 0")
    assert twins.version == version
    with pytest.raises(ray_session.exceptions.RayTaskError, match="holds no complete weights"):
        generate(twins.engines[0], TASKS[:1], version)
    hook(twins.engines[1], "damage", bucket_index=-1, tensor_rank=0)


def test_a_dead_actor_is_named_by_the_push(twins, old, tmp_path):
    """The last test of this pool."""
    sync = sync_of(config(), twins, ModelSource(old), tmp_path)
    sync.push()
    os.kill(twins.engines[1].processes["actor"], signal.SIGKILL)
    with pytest.raises(ActorDied, match=r"engine 1 \(pid \d+\): receiving weights of version \d+ failed: its process died"):
        sync.push()


# ---------------------------------------------------------------------------------------------------------------------- bf16
def test_a_push_in_bf16(ray_session, old, new, tmp_path):
    """TP 1 and TP 2 take the same push. What is left is what two bf16 implementations differ by; the probe lets it pass."""
    pool = start_engines([(config(dtype="bf16", tensor_parallel=ranks), old) for ranks in (1, 2)])
    try:
        source = ModelSource(new, torch.bfloat16)
        expected = torch.tensor(logprobs(source.model, TEXT))
        before = (torch.tensor(score(pool, 0)) - expected).abs()  # [engine, token]
        sync_of(config(dtype="bf16"), pool, source, tmp_path, probed=True).push()
        gathered = score(pool)
        sync_of(config(dtype="bf16"), pool, ModelSource(old, torch.bfloat16), tmp_path).push()
        sync_of(config("direct", dtype="bf16"), pool, source, tmp_path, probed=True).push()
        assert score(pool) == gathered
        after = (torch.tensor(gathered) - expected).abs()
    finally:
        pool.stop()
    assert before.mean(1).min() > 0.3
    assert after.mean(1).max() <= 0.08 and after.quantile(0.99, 1).max() <= 0.35
    assert after.mean(1).min() > 1e-4  # both sides have rounded


# ---------------------------------------------------------------------------------------------------------------------- TP 2
@pytest.mark.parametrize("family, tied", [("llama", True), ("qwen2", False)])
def test_two_tensor_ranks_take_a_push(ray_session, tmp_path, family, tied):
    """Qwen2 has biases as well. At the end a worker is killed in the middle of a push."""
    pool = start_pool(config(tensor_parallel=2), tiny(tmp_path / "old", 0, tied, family))
    try:
        before = score(pool, 0)[0]
        source = ModelSource(tiny(tmp_path / "new", 1, tied, family))
        old, gather = ModelSource(tmp_path / "old"), config(tensor_parallel=2)
        assert sync_of(gather, pool, source, tmp_path, probed=True).push() == 1
        after = score(pool)[0]
        assert largest_difference(after, logprobs(source.model, TEXT)) < 2e-4 < 0.1 < largest_difference(after, before)
        for mode, weights, expected in (("direct", old, before), ("direct", source, after), ("gather", old, before)):
            sync_of(config(mode, tensor_parallel=2), pool, weights, tmp_path).push()
            assert score(pool)[0] == expected  # to the last bit
        sync = sync_of(gather, pool, source, tmp_path)
        sync.push()
        assert score(pool)[0] == after
        hook(pool.engines[0], "damage", bucket_index=1, tensor_rank=1)
        with pytest.raises(RunFailed, match="bucket 1 of stage 0 .* at engine 0 worker 1"):
            sync.push()
        hook(pool.engines[0], "damage", bucket_index=-1, tensor_rank=0)
        sync = sync_of(gather, pool, source, tmp_path)  # a run ends with its first failure
        sync.push()
        name, pid = next((name, pid) for name, pid in pool.engines[0].processes.items() if "Worker" in name and "1" in name)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(EngineDied) as caught:
            sync.push()
        assert str(caught.value) == f"{pool.engines[0].peer}: its process {name} (pid {pid}) ended"
    finally:
        pool.stop()
