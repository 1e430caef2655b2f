"""The stream of answers: how many tasks are out at a time, and that every group comes once."""

from dataclasses import dataclass

import pytest

from alphamed.config.loading import build_config
from alphamed.errors import RunFailed
from alphamed.evaluation.answers import engine_tree, stream


@dataclass
class Arrived:
    groups: tuple


class Engines:
    """Answers the task given last first, up to `most` at a time; notes how many it held."""

    def __init__(self, most):
        self.most, self.held, self.peak = most, [], 0

    def feed(self, key, tasks):
        self.held += tasks
        self.peak = max(self.peak, len(self.held))

    def deliver(self, key, left_s, wait):
        assert wait and left_s > 0
        done, self.held = self.held[-self.most :], self.held[: -self.most]
        return Arrived(tuple(reversed(done)))


@pytest.mark.parametrize("most", [1, 3, 50])
def test_every_task_is_answered_once_and_few_are_out_at_a_time(most):
    engines = Engines(most)
    assert sorted(stream(engines, iter(range(100)), 8, 60.0)) == list(range(100))
    assert engines.peak == 8 and engines.held == []


def test_tasks_are_made_when_they_are_needed():
    made = []
    groups = stream(Engines(1), (made.append(i) or i for i in range(100)), 8, 60.0)
    next(groups)
    assert len(made) == 8


def test_nothing_to_ask_asks_nothing():
    assert list(stream(Engines(1), (), 8, 60.0)) == []


def test_time_without_an_answer_runs_out():
    class Silent(Engines):
        def deliver(self, key, left_s, wait):
            if left_s <= 0:
                raise RunFailed("engine 0", "nothing came")
            return Arrived(())

    with pytest.raises(RunFailed, match="nothing came"):
        list(stream(Silent(1), range(3), 8, 0.05))


def test_engines_are_built_for_the_evaluation_and_not_for_training(tmp_path):
    config = build_config(
        {
            "model": {"path": "m"},
            "data": {"train": ["d"]},
            "evaluation": {"files": ["e"], "before": True},
            "reward": {"name": "mine:function", "overlong_buffer_tokens": 500},
            "rollout": {"samples_per_question": 4, "max_staleness": 2},
        }
    )
    found = engine_tree(config, tmp_path, samples=16, max_tokens=20_000)
    assert found.run_dir == tmp_path / "engines" and found.rollout.samples_per_question == 16
    assert found.max_model_tokens == 1024 + 20_000 and found.reward.name == "correct" and found.rollout.max_staleness == 0
    assert found.prompt == config.prompt and found.model == config.model
