"""Configuration: files and overrides in, one object out, mistakes as one line. (The table of mistakes: test_bad_input.py.)"""

import re
from pathlib import Path

import pytest

from alphamed.config.choices import Dtype, WandbMode
from alphamed.config.loading import build_config, changed_config, dump_config, load_config, validated
from alphamed.config.sections import ParallelConfig
from alphamed.errors import ConfigError

SMALL = {"model": {"path": "m"}, "data": {"train": ["a.jsonl"]}}

SMALLEST = {"model": {"path": "m"}, "data": {"train": ["t.jsonl"]}}


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_file_and_overrides(tmp_path):
    path = write(tmp_path, "model: {path: m, dtype: fp32}\ndata: {train: [a.jsonl]}\noptimizer: {lr: 1e-6}\n")
    config = load_config(path, ["optimizer.lr=3e-5", "parallel.tensor=2", "rollout.dtype=fp32", "run.name=second"])
    assert (config.optimizer.lr, config.parallel.tensor, config.rollout.dtype) == (3e-5, 2, Dtype.FP32)
    assert config.run_dir == Path("runs/second")


def test_words_are_read_as_yaml_1_2_reads_them(tmp_path):
    """YAML 1.1 takes `off` and `no` for false, 1e-6 for text."""
    path = write(
        tmp_path,
        "model: {path: no}\ndata: {train: [a.jsonl], shuffle_options: false}\n"
        "logging: {wandb: off}\noptimizer: {lr: 1e-6}\n",
    )
    config = load_config(path)
    assert (config.model.path, config.logging.wandb, config.optimizer.lr) == ("no", WandbMode.OFF, 1e-6)
    assert config.data.shuffle_options is False


def test_names_and_numbers_are_what_they_look_like(tmp_path):
    """YAML 1.1 reads 010 as 8, 1:30 as 90, 1_0 as 10 and 2025-01-01 as a date."""
    path = write(tmp_path, "model: {path: m}\ndata: {train: [a.jsonl]}\n")
    for name in ("010", "2025-01-01", "1_0"):
        assert load_config(path, [f"run.name={name}"]).run.name == name
    assert load_config(path, ["run.seed=010", "optimizer.lr=1E-4", "optimizer.eps=.5"]).run.seed == 10
    with pytest.raises(ConfigError, match="run.seed: '1:30'"):
        load_config(path, ["run.seed=1:30"])
    with pytest.raises(ConfigError, match="data.train: 'a.jsonl' is not valid; it takes a list"):
        load_config(path, ["data.train=a.jsonl"])


def test_the_written_configuration_reads_back_equal(tmp_path):
    config = build_config(
        SMALL
        | {
            "logging": {"wandb": "off"},
            "optimizer": {"lr": 1e-7},
            "prompt": {
                "shots": [
                    {
                        "question": "q: no",
                        "options": {"A": "yes", "B": "1e3", "C": "010", "D": "1:30", "E": "2025-01-01"},
                        "response": "so \\boxed{A}",
                    }
                ]
            },
        }
    )
    assert load_config(write(tmp_path, dump_config(config))) == config


@pytest.mark.parametrize(
    "text, problem",
    [
        ("model: {path: m}\nmodel: {path: n}\n", "is given twice"),
        ("- a\n- b\n", "not a mapping of sections"),
        ("model: {path: m\n", "not valid YAML"),
        ("1: a\n", "is not text"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path, text, problem):
    with pytest.raises(ConfigError, match=problem):
        load_config(write(tmp_path, text))


@pytest.mark.parametrize(
    "override, problem",
    [
        ("parallel.tensr=2", "did you mean 'tensor'"),
        ("nonsense", "not of the form"),
        ("model.path.x=1", "is text, not a section"),
        ("optimizer.lr=[1", "not valid YAML"),
    ],
)
def test_an_override_that_is_none(tmp_path, override, problem):
    path = write(tmp_path, "model: {path: m}\ndata: {train: [a.jsonl]}\n")
    with pytest.raises(ConfigError, match=problem):
        load_config(path, [override])


def test_values_that_follow_from_others():
    config = build_config(SMALL)
    assert config.resolved.max_logprob_diff == 0.15  # bf16 on both sides
    assert (
        build_config(
            SMALL | {"model": {"path": "m", "dtype": "fp32"}, "rollout": {"dtype": "fp32"}}
        ).resolved.max_logprob_diff
        == 1e-3
    )
    assert config.max_model_tokens == 1024 + 2048 and config.resolved.constant_tokens == 2048
    assert not config.resolved.recompute_old_logprobs
    assert build_config(SMALL | {"algorithm": {"mini_batches": 2}}).resolved.recompute_old_logprobs
    assert build_config(SMALL | {"run": {"steps": 10, "stop_after": 4}}).run.last_step == 4


def test_importance_correction_is_on_where_samples_may_be_stale():
    def correction(staleness, **algorithm):
        return build_config(SMALL | {"rollout": {"max_staleness": staleness}, "algorithm": algorithm}).resolved.correction

    assert (correction(0), correction(1), correction(3)) == ("none", "tis", "tis")
    assert (correction(1, correction="none"), correction(0, correction="mis")) == ("none", "mis")


def test_where_samples_may_be_stale_the_policys_own_movement_does_not_stop_the_run():
    exact = {"model": {"path": "m", "dtype": "fp32"}, "rollout": {"dtype": "fp32", "max_staleness": 1}}
    assert build_config(SMALL | exact).resolved.max_logprob_diff == 1.0
    assert build_config(SMALL | exact | {"sync": {"max_logprob_diff": 0.2}}).resolved.max_logprob_diff == 0.2


@pytest.mark.parametrize(
    "tree, problem",
    [
        (
            {"rollout": {"max_staleness": 1, "deterministic": True}},
            "rollout.max_staleness: 1 makes samples depend on when weights arrive",
        ),
        (
            {"algorithm": {"correction": "mis", "correction_floor": 2.0}},
            "algorithm.correction_floor: 2.0 is not below algorithm.correction_cap (2.0); lower it",
        ),
        ({"rollout": {"max_staleness": -1}}, "rollout.max_staleness: -1 is not valid"),
    ],
)
def test_settings_of_rollouts_that_do_not_go_together(tree, problem):
    with pytest.raises(ConfigError) as caught:
        build_config(SMALL | tree)
    assert str(caught.value).startswith(problem)


@pytest.mark.parametrize(
    "vocab, parallel, chunk",
    [
        (128256, {"micro_batch_tokens": 16384}, 2048),  # 16,384 x 128,256 x 4 bytes = 8.4 GB
        (128256, {"micro_batch_tokens": 16384, "tensor": 8}, 0),  # 1.05 GB, just below 1 GiB
        (128256, {"micro_batch_tokens": 16896, "tensor": 8}, 2048),  # 1.08 GB, just above
        (49152, {"micro_batch_tokens": 2048}, 0),  # 0.4 GB
        (152064, {"micro_batch_tokens": 2048}, 0),  # a chunk of 2,048 would be the whole row
        (128256, {"micro_batch_tokens": 16384, "logprob_chunk_tokens": 0}, 0),  # as asked for
        (49152, {"micro_batch_tokens": 2048, "logprob_chunk_tokens": 100}, 100),
    ],
)
def test_log_probs_are_cut_where_logits_would_take_a_gibibyte(vocab, parallel, chunk):
    assert ParallelConfig(**parallel).logprob_chunk(vocab) == chunk


def test_a_small_file_that_stands_for_billions_of_values_is_refused(tmp_path):
    """Written out in a message it would fill memory: ten names of ten of ten ..."""
    lines = ["x0: &x0 [a, a, a, a, a, a, a, a, a, a]"]
    lines += [f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 10)}]" for i in range(1, 9)]
    for text in ("\n".join([*lines, "model: {path: *x8}"]), "model: &m {path: *m}"):
        with pytest.raises(ConfigError, match="aliases"):
            load_config(write(tmp_path, text))
    with pytest.raises(ConfigError, match="nested too deep"):
        load_config(write(tmp_path, "model: " + "[" * 5000 + "]" * 5000))
    shared = "model: {path: m}\ndata: {train: &files [a.jsonl]}\nevaluation: {files: *files, allow_overlap: true}\n"
    assert load_config(write(tmp_path, shared)).evaluation.files == (Path("a.jsonl"),)


@pytest.mark.parametrize(
    "axes, told",
    [
        ({"informativeness": [1]}, "informativeness.0: 1 is not valid; it takes a list, written [a, b], or 'all'"),
        ({"informativeness": [[]]}, "informativeness.0: [] is not valid; it takes a list of at least 1, or 'all'"),
        ({"levels": [[9]]}, "levels.0.0: 9 is not valid; it takes a number of at most 6"),
        ({"sizes": [0]}, "sizes.0: 0 is not valid; it takes a number greater than 0, or 'all'"),
        ({"sizes": ["x"]}, "sizes.0: 'x' is not valid; it takes a whole number, or 'all'"),
        ({"sizse": [1]}, "sizse: unknown key; did you mean 'sizes'?"),
    ],
)
def test_where_several_kinds_of_value_may_stand_the_line_names_no_types(axes, told):
    from alphamed.lab.study.spec import Study

    with pytest.raises(ConfigError) as error:
        validated(Study, {"name": "s", "base": "b", "grids": [{"name": "g", "axes": axes}]})
    assert str(error.value) == f"grids.0.axes.{told}"


@pytest.mark.parametrize(
    "override, told",
    [
        ("data.train=[]", "data.train: [] is not valid; it takes a list of at least 1"),
        ("run.seed=a", "run.seed: 'a' is not valid; it takes a whole number"),
        ("parallel.sequence=maybe", "parallel.sequence: 'maybe' is not valid; it takes true or false"),
        ("optimizer.betas=[0.9]", "optimizer.betas.1: missing; give a value"),
        *(
            (
                f"prompt.option_format='{pattern}'",
                f"prompt.option_format: {pattern!r} is not valid; it takes text with {{letter}} and {{text}}, once each and no "
                f"other braces, as '{{letter}}: {{text}}' or '{{text}} ({{letter}})'",
            )
            for pattern in (
                "{letter}",
                "{text}",
                "",
                "{letter} {text} {letter}",
                "{letter}: {text} {x}",
                "{letter}: {text",
                "{}: {text}",
            )
            + ("{letter!r}: {text}", "{letter:>3} {text}", "{letter.x}: {text}", "{letter} {text} {{}")
        ),
    ],
)
def test_what_is_wanted_is_said_in_plain_words(override, told):
    with pytest.raises(ConfigError) as error:
        changed_config(build_config(SMALL), [override])
    assert str(error.value) == told


@pytest.mark.parametrize(
    ("settings", "seconds"), [({}, 1800), ({"start_deadline_s": 5000}, 5000), ({"step_deadline_s": 7200}, 7200)]
)
def test_other_ranks_wait_longer_than_rank_0_may_take(settings, seconds):
    assert build_config(SMALLEST | {"rollout": settings}).longest_wait_s == seconds


def test_storage_has_deadlines_of_its_own_from_bytes_and_a_speed():
    settings = build_config(SMALLEST | {"rollout": {"engines": 4}})
    # 70B: 980 GB of weights and optimizer state at 200 MB/s, 4 engines that read 140 GB each
    assert settings.storage_deadline_s(980 * 10**9) == 600 + 4900
    assert settings.start_deadline_s(140 * 10**9) == 600 + 2800
    faster = build_config(
        SMALLEST | {"checkpoint": {"storage_bytes_per_s": 1e9}, "cluster": {"rank_timeout_s": 60}, "rollout": {"engines": 4}}
    )
    assert faster.storage_deadline_s(980 * 10**9) == 60 + 980
    assert faster.start_deadline_s(140 * 10**9) == 600 + 560
    assert build_config(SMALLEST | {"rollout": {"start_deadline_s": 50}}).start_deadline_s(140 * 10**9) == 50


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ({"steps": [101]}, "profile.steps: step 101 is never reached, run.steps is 100"),
        ({"steps": [1], "ranks": [0, 1]}, "profile.ranks: 1 is no trainer rank, the layout has 1; give 0 to 0"),
        ({"steps": [1], "kind": "nsys"}, "profile.kind: nsys records what GPUs do"),
        ({"steps": [0]}, "profile.steps.0"),
    ],
)
def test_profiles_that_would_stay_empty_are_refused(profile, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        build_config(SMALLEST | {"cluster": {"device": "cpu"}, "profile": profile})


def test_a_run_by_epochs_may_be_longer_than_the_default():
    assert build_config(SMALLEST | {"sft": {"epochs": 3}, "profile": {"steps": [150]}}).profile.steps == (150,)


def test_rounds_and_evaluation_sets_each_have_a_deadline():
    assert build_config(SMALLEST | {"dynamic_sampling": {"refills": 9}}).longest_wait_s == 10 * 1800
    sets = {"files": ["a.jsonl", "b.jsonl", "c.jsonl"], "after": True}
    assert build_config(SMALLEST | {"evaluation": sets}).longest_wait_s == 3 * 1800


def test_an_option_format_is_taken_as_it_stands():
    for pattern in (
        "{letter}: {text}",
        "{text} ({letter})",
        "({letter}) {text}",
        "{letter}. {text}",
        "- {letter}\n  {text}",
    ):
        config = build_config(SMALL | {"prompt": {"option_format": pattern}})
        assert config.prompt.option_format == pattern
