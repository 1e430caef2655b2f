"""Real engines on a model folder: every stop token ends a response, and weights that are not finite are named."""

import pytest
from engines import EOS, config, generate, task, tiny
from safetensors.torch import load_file, save_file

from alphamed.data.tokenizer import load_tokenizer
from alphamed.errors import RunFailed
from alphamed.model.shape import read_shape
from alphamed.records import FinishReason
from alphamed.rollout.pool import EnginePool

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path):
    return tiny(tmp_path / "m", seed=0, tied=False)


def test_every_stop_token_ends_a_response_and_is_not_in_its_text(ray_session, folder):
    """Letters, as tokens of this vocabulary: about 70% of these responses hold one of them within 28 tokens."""
    chosen, tokenizer = config(stop=list("abcdefghijklmnopqrst")), load_tokenizer(folder)
    stops = tokenizer.stop_ids(chosen.rollout.stop)
    assert len(stops) == 21 and stops[0] == EOS
    pool = EnginePool.start(chosen, folder, read_shape(folder), stops)
    try:
        (group,) = generate(pool.engines[0], [task("t", n=64, temperature=2.0, max_tokens=28, seed=1)], 0)
    finally:
        pool.stop()
    stopped = [one for one in group.rollouts if one.finish_reason == FinishReason.STOP]
    assert 20 <= len(stopped) < 64 and len({one.response_token_ids[-1] for one in stopped}) > 5
    for one in group.rollouts:
        ids = one.response_token_ids
        assert len(one.logprobs) == len(ids)  # the stop token is trained on
        if one in stopped:
            assert [i for i in ids if i in stops] == [ids[-1]]
            assert one.text == tokenizer.decode(ids[:-1])
        else:
            assert len(ids) == 28 and not set(ids) & set(stops) and one.text == tokenizer.decode(ids)


def test_an_engine_names_the_folders_tensor_that_is_not_finite(ray_session, folder):
    """A norm, which vLLM holds as it is on CPU too. Smaller folders than SMALL_BYTES are refused before, where a command
    checks them; an engine does so whatever started it."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.post_attention_layernorm.weight"][5] = float("inf")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunFailed) as failed:
        EnginePool.start(config(), folder, read_shape(folder), (EOS,)).stop()
    assert failed.value.user_error
    assert f"{folder}: model.layers.1.post_attention_layernorm.weight holds values that are not finite" in str(failed.value)
