"""Grading a recorded step again: equal where nothing changed, each difference told where the rules or the record did."""

from dataclasses import replace

import pytest

from alphamed.config.loading import build_config, dump_config
from alphamed.errors import ConfigError
from alphamed.files import replace_text
from alphamed.records import FinishReason, Outcome, Question, Rollout, RolloutGroup, ScoredGroup
from alphamed.replay.regrade import main, regrade
from alphamed.replay.update import replay_config
from alphamed.rundir.rollout_files import rollout_path, write_rollouts

C, W, U, T = Outcome.CORRECT, Outcome.WRONG, Outcome.UNPARSEABLE, Outcome.TRUNCATED


def run_of(tmp_path, reward="correct", truncated="nothing"):
    """A run of one step: a right, a wrong, an unparseable and a cut answer to one question whose answer is B."""
    config = build_config(
        {
            "model": {"path": "m"},
            "data": {"train": ["t.jsonl"]},
            "algorithm": {"advantage": "dr_grpo"},
            "reward": {"name": reward, "truncated": truncated},
        }
    )
    replace_text(tmp_path / "config.yaml", dump_config(config))
    texts = ["so \\boxed{B}", "so \\boxed{A}", "B it is", "\\boxed{B} and on"]
    ends = [FinishReason.STOP] * 3 + [FinishReason.LENGTH]
    rollouts = tuple(
        Rollout("1:0:q", "q", j, (1, 2), (-0.5, -0.5), text, end, 1) for j, (text, end) in enumerate(zip(texts, ends))
    )
    question = Question("q", "?", {"A": "a", "B": "b"}, "B")
    group = ScoredGroup(
        RolloutGroup("1:0:q", question, (5,), rollouts),
        (C, W, U, T),
        (1.0, 0.0, 0.0, 0.0),
        (0.75, -0.25, -0.25, -0.25),
        ("B", "A", None, "B"),
    )  # reward less the mean, 1/4
    write_rollouts(rollout_path(tmp_path, 3), 3, [group])
    return group


def test_a_step_graded_by_the_same_rules_comes_out_the_same(tmp_path, capsys):
    recorded = run_of(tmp_path)
    result = regrade(tmp_path, 3)
    assert result.recorded == (recorded,) and result.differences == ()
    assert result.now == (recorded,)
    assert main(tmp_path, 3) == 0
    assert "4 responses to 1 questions graded again, 0 come out differently" in capsys.readouterr().out


def test_another_rule_shows_in_rewards_and_advantages(tmp_path, capsys):
    run_of(tmp_path, reward="correct_and_format")  # rewards 1, .1, 0, 0; mean .275
    result = regrade(tmp_path, 3)
    assert result.now[0].rewards == (1.0, 0.1, 0.0, 0.0)
    assert result.now[0].advantages == pytest.approx((0.725, -0.175, -0.275, -0.275))
    assert [(d.sample_index, d.field) for d in result.differences] == [
        (0, "advantage"),
        (1, "reward"),
        (1, "advantage"),
        (2, "advantage"),
        (3, "advantage"),
    ]
    assert main(tmp_path, 3) == 1
    printed = capsys.readouterr().out
    assert "4 come out differently" in printed
    assert "question q, group 1:0:q, sample 1: reward was 0.0, is 0.1" in printed


def test_a_cut_answer_graded_like_others_changes_its_outcome(tmp_path):
    run_of(tmp_path, truncated="grade")
    changed = {d.field: (d.recorded, d.now) for d in regrade(tmp_path, 3).differences if d.sample_index == 3}
    assert changed["outcome"] == (T, C) and changed["reward"] == (0.0, 1.0)


def test_a_forged_record_is_found(tmp_path):
    group = run_of(tmp_path)
    write_rollouts(rollout_path(tmp_path, 3), 3, [replace(group, letters=("B", "B", None, "B"))])
    assert [str(d) for d in regrade(tmp_path, 3).differences] == ["question q, group 1:0:q, sample 1: letter was B, is A"]


def test_overrides_say_what_another_reward_gives(tmp_path, capsys):
    run_of(tmp_path)
    result = regrade(tmp_path, 3, ["reward.name=correct_and_format", "algorithm.advantage=rloo"])
    assert result.now[0].rewards == (1.0, 0.1, 0.0, 0.0)
    assert result.now[0].advantages == pytest.approx([4 / 3 * x for x in (0.725, -0.175, -0.275, -0.275)])
    assert main(tmp_path, 3, ["reward.name=correct_and_format"]) == 1
    with pytest.raises(ConfigError, match="^rollout.temperature: has no effect on --only reward"):
        regrade(tmp_path, 3, ["rollout.temperature=0.5"])
    with pytest.raises(ConfigError, match="'corect' is not a reward; did you mean 'correct'"):
        regrade(tmp_path, 3, ["reward.name=corect"])


def test_a_penalty_on_lengths_shows_in_advantages_alone(tmp_path):
    """A buffer as long as the limit, 2,048: 1,024 tokens cost a half, 2 tokens 1/1024."""
    group = run_of(tmp_path)
    long = replace(group.group.rollouts[0], response_token_ids=(1,) * 1024, logprobs=(-0.5,) * 1024)
    group = replace(group, group=replace(group.group, rollouts=(long, *group.group.rollouts[1:])))
    write_rollouts(rollout_path(tmp_path, 3), 3, [group])
    found = regrade(tmp_path, 3, ["reward.overlong_buffer_tokens=2048"])  # the first response is compared as 1 - 1/2
    assert found.now[0].rewards == group.rewards
    assert {difference.field for difference in found.differences} == {"advantage"}
    half, little = 0.5, 2 / 2048
    mean = (half - 3 * little) / 4
    assert found.now[0].advantages == pytest.approx((half - mean, *[-little - mean] * 3))


def test_a_function_of_another_trainer_is_refused_here_too(tmp_path, monkeypatch):
    run_of(tmp_path)
    (tmp_path / "ported.py").write_text("def score(solution_str, ground_truth): return float(ground_truth in solution_str)")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="set reward.signature=verl"):
        regrade(tmp_path, 3, ["reward.name=ported:score"])
    result = regrade(tmp_path, 3, ["reward.name=ported:score", "reward.signature=verl"])
    assert result.now[0].rewards == (1.0, 0.0, 1.0, 0.0)


def test_thinking_is_told_from_the_responses_where_the_model_is_elsewhere(tmp_path):
    group = run_of(tmp_path)
    texts = ["<think>\\boxed{A}</think>\\boxed{B}", "<think>\\boxed{B}</think>\\boxed{A}", "<think>\\boxed{B}", "<think>"]
    rollouts = tuple(replace(rollout, text=text) for rollout, text in zip(group.group.rollouts, texts))
    write_rollouts(
        rollout_path(tmp_path, 3),
        3,
        [replace(group, group=replace(group.group, rollouts=rollouts), letters=("B", "A", None, None))],
    )
    assert regrade(tmp_path, 3).differences == ()
    result = regrade(tmp_path, 3, ["reward.answer_after=null"])
    assert [(d.sample_index, d.field, d.now) for d in result.differences if d.field in ("outcome", "letter")] == [
        (2, "outcome", C),
        (2, "letter", "B"),
    ]


# ---------------------------------------------------------------------------------------- what a replay cannot change
@pytest.mark.parametrize(
    "setting, message",
    [
        (
            "reward.name=format_only",
            "reward.name: 'format_only', but the rewards recorded in .* were given with 'correct'"
            ".*set it back .*--only reward reward.name=format_only`",
        ),
        ("reward.truncated=grade", "reward.truncated: 'grade', .* given with 'nothing'"),
        ("reward.answer_after=null", "reward.answer_after: None, .* given with 'auto'"),
        ("data.answer_keys=shuffled", "data.answer_keys: 'shuffled', .* given with 'given'"),
        ("rollout.temperature=0.5", "rollout.temperature: 0.5, but the rollouts in .* were sampled with 1.0.*set it back"),
        ("rollout.samples_per_question=4", "rollout.samples_per_question: 4, .* sampled with 8"),
        ("rollout.max_staleness=1", "rollout.max_staleness: 1, .* sampled with 0"),
        ("prompt.instruction=Answer.", "prompt.instruction: 'Answer.', .* sampled with 'Please"),
        (
            "prompt.option_format='{text} ({letter})'",
            r"prompt.option_format: '{text} \({letter}\)', .* sampled with '{letter}: ",
        ),
        ("dynamic_sampling.refills=9", "dynamic_sampling.refills: 9, .* sampled with 0"),
        ("data.shuffle_options=false", "data.shuffle_options: False, .* sampled with True"),
        ("data.spread=answer", "data.spread: 'answer', .* sampled with 'nothing'"),
    ],
)
def test_a_replay_refuses_what_would_have_no_effect(tmp_path, setting, message):
    run_of(tmp_path)
    with pytest.raises(ConfigError, match=message):
        replay_config(tmp_path, 3, [setting])
    assert not (tmp_path / "replays").exists()


@pytest.mark.parametrize(
    "setting",
    [
        "algorithm.advantage=rloo",
        "reward.overlong_buffer_tokens=9",
        "algorithm.loss=gspo",
        "algorithm.kl_coefficient=0.1",
        "parallel.tensor=2",
        "optimizer.lr=1e-3",
        "prompt.max_tokens=512",
        "model.path=other",
        "reward.workers=1",
        "rollout.engines=2",
    ],
)
def test_a_replay_takes_what_has_an_effect(tmp_path, setting):
    run_of(tmp_path)
    assert replay_config(tmp_path, 3, [setting]).rollout.replay == tmp_path


def test_wrong_places_are_told(tmp_path):
    with pytest.raises(ConfigError, match="holds no config.yaml; give the directory of a run"):
        regrade(tmp_path, 3)
    run_of(tmp_path)
    with pytest.raises(ConfigError, match="--step: 9 is not among the rollouts of .*; it holds steps 3 to 3"):
        regrade(tmp_path, 9)
    rollout_path(tmp_path, 3).unlink()
    with pytest.raises(ConfigError, match="it recorded none"):
        regrade(tmp_path, 3)
