"""Where a step goes wrong, what went wrong is on the disk before the run ends, and no checkpoint holds it."""

import contextlib
from pathlib import Path
from types import SimpleNamespace

import pytest

from alphamed import train
from alphamed.config.loading import build_config
from alphamed.errors import RunFailed
from alphamed.session import Session

CONFIG = build_config({"model": {"path": "m"}, "data": {"train": ["t.jsonl"]}})


class Called:
    """Any part of a session: notes which of its methods are called, raises in those it was told to."""

    def __init__(self, calls: list[str], fails: tuple[str, ...] = (), **values):
        self._calls, self._fails = calls, fails
        self.__dict__ |= values

    def __getattr__(self, name):
        def method(*_args, **_named):
            self._calls.append(name)
            if name in self._fails:
                raise RuntimeError(name)
            return {}

        return method


@pytest.mark.parametrize("check", ["require_finite", "require_agreement"])
def test_a_bad_step_is_recorded_and_makes_no_checkpoint(monkeypatch, check):
    calls: list[str] = []
    run = Called(calls, steps=lambda: iter([1, 2]))
    rollouts = Called(calls, next=lambda step: SimpleNamespace(groups=()))
    session = Called(
        calls,
        (check,),
        run=run,
        rollouts=rollouts,
        policy=Called(calls, (check,), layout=None),
        reference=Called(calls),
        sync=Called(calls),
    )
    monkeypatch.setattr(train, "open_session", lambda *_: contextlib.nullcontext(session))
    monkeypatch.setattr(train, "pack", lambda *_args, **_named: None)
    with pytest.raises(RuntimeError, match=check):
        train.main(CONFIG)
    assert calls.index("update") < calls.index("record") < calls.index(check)
    assert "checkpoint" not in calls and calls.count("update") == 1


def test_a_run_that_is_asked_to_stop_writes_a_checkpoint_and_is_not_finished(monkeypatch):
    calls: list[str] = []
    run = Called(calls, steps=lambda: iter([1, 2]), stop_asked=lambda: True)
    session = Called(
        calls,
        run=run,
        rollouts=Called(calls, next=lambda step: None),
        policy=Called(calls, layout=None),
        reference=Called(calls),
        sync=Called(calls),
    )
    monkeypatch.setattr(train, "open_session", lambda *_: contextlib.nullcontext(session))
    train.main(CONFIG)
    assert calls == ["push", "evaluate", "checkpoint"]


@pytest.mark.parametrize(
    "found, component, words",
    [
        (0.2, "rollout engines", "the limit is 0.15"),
        (float("inf"), "rollout engines", "inf"),
        (float("nan"), "policy", "not finite"),  # which is no news of the engines
    ],
)
def test_log_probs_that_differ_stop_the_run(found, component, words):
    session = SimpleNamespace(config=CONFIG, run=SimpleNamespace(dir=Path("runs/r")))
    with pytest.raises(RunFailed, match=words) as stopped:
        Session.require_agreement(session, 3, {"policy/logprob_diff_mean": found})
    assert stopped.value.component == component
    Session.require_agreement(session, 3, {"policy/logprob_diff_mean": 0.15})
