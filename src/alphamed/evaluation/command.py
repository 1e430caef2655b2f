"""`alphamed eval`: its arguments, and the way from them to items.jsonl and results.json."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alphamed.config.choices import BadRows, PromptTemplate
from alphamed.config.schema import Config
from alphamed.errors import ConfigError

if TYPE_CHECKING:
    from alphamed.evaluation.answers import Prompted
    from alphamed.evaluation.items import Asked, GradedAnswer, Key

NOT_GIVEN = {"samples": 1, "top_p": 1.0}
"""Defaults of options that have one."""
UNUSED = "unused.jsonl"
"""Takes the place of data.train where there is no configuration: an evaluation trains on nothing."""


@dataclass(frozen=True, slots=True)
class EvaluationRequest:
    """One start of `alphamed eval`, its input read and checked."""

    config: Config  # of the engines
    out: Path
    asked: tuple[Asked, ...]
    sets: Mapping[str, Mapping[str, Any]]
    trained_on: tuple[Path, ...]  # as far as it is known
    samples: int
    temperature: float
    top_p: float
    max_tokens: int
    command: str
    overwrite: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--benchmarks",
        nargs="+",
        default=[],
        metavar="BENCHMARK",
        help="NAME (listed by `alphamed data sources`), NAME=PATH for a local copy, or FILE (default: evaluation.files). "
        "PATH:index1 declares how keys are given (letter, index, index1, text)",
    )
    add(
        "--bad-rows",
        choices=[str(choice) for choice in BadRows],
        help="invalid rows: refuse, or skip and report their number with the result (default: data.bad_rows)",
    )
    add("--out", type=Path, metavar="DIR", help="output folder; an evaluation in it is continued (default: RUN/eval/MODEL)")
    add(
        "--overwrite",
        action="store_true",
        help="allow --out to contain other files, which are kept, or another evaluation, which is replaced",
    )
    add(
        "--samples",
        type=int,
        default=NOT_GIVEN["samples"],
        metavar="N",
        help="responses per question; more than 1 adds majority vote and pass@k (default: 1)",
    )
    add("--temperature", type=float, metavar="T", help="sampling temperature (default: 0, greedy; with several samples 1)")
    add("--top-p", type=float, default=NOT_GIVEN["top_p"], metavar="P", help="nucleus sampling (default: 1)")
    add(
        "--variants",
        nargs="+",
        default=[],
        metavar="VARIANT",
        help="also ask modified forms of every question: shuffled, none_of_the_others, one_removed, free",
    )
    add("--against", type=Path, metavar="DIR", help="compare with the evaluation in DIR: McNemar's test, flipped questions")
    add("--regrade", type=Path, metavar="DIR", help="grade the recorded answers in DIR again without generating")
    add_model_arguments(parser)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model is asked, and how: what `config_of` reads."""
    add = parser.add_argument
    add("--model", metavar="FOLDER", help="model folder, for example RUN/hf, or hub name (default: model.path)")
    add("--config", type=Path, metavar="FILE", help="YAML file of a run; gives prompt, engines and evaluation.files")
    add("--max-tokens", type=int, metavar="N", help="token limit of a response (default: that of the configuration)")
    add(
        "--template",
        choices=[str(template) for template in PromptTemplate],
        help="prompt template (default: prompt.template)",
    )
    add("--shots", type=Path, metavar="FILE", help="JSONL file of worked examples: question, options, response")
    add("overrides", nargs="*", metavar="key=value", help="settings that override the configuration; must come last")


def main(options: argparse.Namespace) -> int:
    """Returns the exit code. Raises ConfigError or DataError for a mistake in the input, before anything is started."""
    from alphamed.evaluation.place import held
    from alphamed.evaluation.regrade import regrade, report, require_evaluation

    if options.against:
        require_evaluation("--against", options.against)
    if options.regrade:
        _refuse_with_regrade(options)
        require_evaluation("--regrade", options.regrade)
        with held(options.regrade, "--regrade"):
            regrade(options.regrade)
            return report(options.regrade, options.against)
    return _evaluate(_request(options), options.against)


def _refuse_with_regrade(options: argparse.Namespace) -> None:
    for name in (
        "model",
        "benchmarks",
        "config",
        "variants",
        "out",
        "bad_rows",
        "overwrite",
        "shots",
        "template",
        "max_tokens",
        "overrides",
        "samples",
        "temperature",
        "top_p",
    ):
        if (value := getattr(options, name)) is not False and value not in (None, [], NOT_GIVEN.get(name)):
            shown = "key=value" if name == "overrides" else f"--{name.replace('_', '-')}"
            raise ConfigError(f"--regrade: grades what is there, {shown} has no part in it; leave it out")


# --------------------------------------------------------------------------------------------------------------- input
def _request(options: argparse.Namespace) -> EvaluationRequest:
    from alphamed.evaluation import ask
    from alphamed.evaluation.answers import engine_tree
    from alphamed.evaluation.place import check_free
    from alphamed.model.shape import local_folder, read_shape
    from alphamed.reward.rules import check_name

    (names, overrides), (variants, more) = _split(options.benchmarks), _split(options.variants)
    check_sampling(options)
    bad_rows = [f"data.bad_rows={options.bad_rows}"] if options.bad_rows else []
    config = config_of(options, [*overrides, *more, *options.overrides, *bad_rows])
    check_name(config.reward.name)  # a slip; answers are graded by their letters whatever it is
    if (folder := local_folder(config.model.path)) is not None:
        read_shape(folder)  # before a benchmark is fetched for a model that cannot be asked
    if not names and not config.evaluation.files:
        raise ConfigError(
            "evaluation.files: [] leaves nothing to evaluate; name at least one file of questions there, or "
            "give --benchmarks"
        )
    names = names or [str(file) for file in config.evaluation.files]
    asked, sets = ask.asked_sets(names, variants, config)
    trained_on = config.data.train if options.config else ask.trained_on(Path(config.model.path))
    limit = options.max_tokens or config.evaluation.max_response_tokens or config.rollout.max_response_tokens
    out = _out(options, config)
    check_free(out, options.overwrite)
    return EvaluationRequest(
        engine_tree(config, out, options.samples, limit),
        out,
        tuple(asked),
        sets,
        tuple(trained_on),
        options.samples,
        temperature_of(options),
        options.top_p,
        limit,
        options.command,
        options.overwrite,
    )


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names and overrides: `--benchmarks medqa=copy rollout.dtype=fp32` takes all that follows it."""

    def is_override(item: str) -> bool:
        section, dot, _ = item.partition("=")[0].partition(".")
        return "=" in item and bool(dot) and section in Config.model_fields

    return [item for item in arguments if not is_override(item)], [item for item in arguments if is_override(item)]


def config_of(options: argparse.Namespace, overrides: Sequence[str]) -> Config:
    """The configuration that `add_model_arguments` and overrides describe. Raises ConfigError."""
    from alphamed.config.loading import build_config, load_tree, override

    if options.max_tokens is not None and options.max_tokens < 1:
        raise ConfigError(f"--max-tokens: {options.max_tokens} leaves no room for an answer; give 1 or more")
    tree: dict[str, Any]
    if options.config:
        tree = load_tree(options.config)
    elif options.model is None:
        raise ConfigError("--model: no model is given; name a folder, or a --config that does")
    else:
        tree = {"data": {"train": [UNUSED]}}
    for section, key, value in (
        ("model", "path", options.model),
        ("prompt", "template", options.template),
        ("prompt", "shots", _shots(options.shots) if options.shots else None),
        ("evaluation", "max_response_tokens", options.max_tokens),
    ):
        if value is not None:
            tree[section] = (tree.get(section) or {}) | {key: value}
    for item in overrides:
        override(tree, item)
    return build_config(tree)


def _shots(file: Path) -> list[dict[str, Any]]:
    from alphamed.files import read_json_lines

    if not file.exists():
        raise ConfigError(f"--shots: {file}: no such file; give a JSONL file with question, options and response a line")
    shots = read_json_lines(file, by_hand=True)
    if not shots:
        raise ConfigError(f"--shots: {file} holds no example; give a JSONL file with question, options and response a line")
    return [{key: value for key, value in shot.items() if key in ("question", "options", "response")} for shot in shots]


def check_sampling(options: argparse.Namespace) -> None:
    """Raises ConfigError for a number of samples, a temperature or a top-p that cannot be."""
    if options.samples < 1:
        raise ConfigError(f"--samples: {options.samples} is no number of samples; give 1 or more")
    if options.temperature is not None and not 0 <= options.temperature <= 10:
        raise ConfigError(f"--temperature: {options.temperature} is not between 0 and 10; 0 is greedy")
    if options.samples > 1 and options.temperature == 0:
        raise ConfigError(
            f"--temperature: 0 gives the same response {options.samples} times; raise it or leave --samples out"
        )
    if not 0 < options.top_p <= 1:
        raise ConfigError(f"--top-p: {options.top_p} is not above 0 and at most 1; leave it out for 1")
    if options.top_p < 1 and temperature_of(options) == 0:
        raise ConfigError(
            f"--top-p: {options.top_p} has no effect at temperature 0, which takes the likeliest token; raise "
            f"--temperature or leave --top-p out"
        )


def temperature_of(options: argparse.Namespace) -> float:
    """--temperature or its default."""
    return options.temperature if options.temperature is not None else float(options.samples > 1)


def _out(options: argparse.Namespace, config: Config) -> Path:
    """--out, or a folder of the model's own in the run."""
    from alphamed.evaluation.settings import label

    if options.out:
        return options.out
    if options.config is None:
        raise ConfigError("--out: is needed where no --config names a run; give a folder")
    return config.run_dir / "eval" / label(Path(config.model.path))


# ---------------------------------------------------------------------------------------------------------- evaluation
def _evaluate(request: EvaluationRequest, against: Path | None) -> int:
    """Check the model, then answer, grade and report while no other start can change the folder; returns the exit code."""
    from alphamed.evaluation import ask, settings
    from alphamed.evaluation.answers import Prompted
    from alphamed.evaluation.place import held
    from alphamed.evaluation.regrade import report

    config = request.config
    model = Prompted(config, (asked.shown for asked in request.asked))
    if not config.evaluation.allow_overlap:
        ask.refuse_trained_on(request.asked, request.trained_on)
    asked_how = settings.asked(config, model.folder, request.samples, request.temperature, request.top_p, request.max_tokens)
    with held(request.out):
        return _answer(request, model, asked_how) or report(request.out, against)


def _answer(request: EvaluationRequest, model: Prompted, asked_how: Mapping[str, Any]) -> int:
    """Ask what has no answer yet; returns the exit code."""
    from alphamed.errors import RunFailed
    from alphamed.evaluation import settings
    from alphamed.evaluation.items import ITEMS, Grading, finished, read_items, regraded
    from alphamed.evaluation.regrade import remove

    grading = Grading(request.config.reward.truncated, model.thinking)
    if request.overwrite and settings.difference(request.out, asked_how) is not None:
        remove(request.out)
    settings.require_same(request.out, asked_how)
    answered = read_items(request.out / ITEMS)
    if answered and settings.read(request.out) is None:
        raise ConfigError(
            f"--out: {request.out} holds answers without their settings ({settings.SETTINGS}); choose another folder"
        )
    complete = finished(request.asked, answered, request.samples, grading)
    _require_same_sets(request, answered, complete)
    settings.write(request.out, str(model.folder), asked_how, grading.json(), request.sets, request.command)
    todo = [asked for asked in request.asked if asked.key not in complete]
    if complete:
        print(f"{request.out}: {len(complete):,} of {len(request.asked):,} questions are answered already", file=sys.stderr)
    others = {key: [regraded(answer, grading) for answer in answers] for key, answers in answered.items()}
    _write(request.out, others | complete, dropped={asked.key for asked in todo})
    try:
        _generate(request, model, todo)
    except RunFailed as error:
        print(f"{'error' if error.user_error else 'evaluation failed'}: {error}", file=sys.stderr)
        return 2 if error.user_error else 1
    return 0


def _require_same_sets(
    request: EvaluationRequest,
    answered: Mapping[Key, Sequence[GradedAnswer]],
    complete: Mapping[Key, Sequence[GradedAnswer]],
) -> None:
    """Raises ConfigError where a file of the same name would take the place of answered questions that it does not hold."""
    from alphamed.evaluation import settings

    before = (settings.read(request.out) or {"sets": {}})["sets"]
    sets_answered, sets_shared = {name for name, _ in answered}, {name for name, _ in complete}
    for name, origin in request.sets.items():
        place = before.get(name, {}).get("place")
        if name in sets_answered - sets_shared and place != origin["place"]:
            raise ConfigError(
                f"--out: {request.out} holds {name} of {place}, which shares no question with {origin['place']}; "
                f"choose another folder, or give the file another name"
            )


def _generate(request: EvaluationRequest, model: Any, todo: Sequence[Asked]) -> None:
    """Answer the questions and add the graded answers to each one to the file as soon as they are there."""
    from alphamed.evaluation.answers import ProgressReporter, answering
    from alphamed.evaluation.items import ITEMS, Grading, append_items, graded
    from alphamed.hashing import stable_hash
    from alphamed.records import GenerationTask, Sampling

    if not todo:
        return
    by_id = {f"evaluation/{asked.set}/{asked.question.id}": asked for asked in todo}
    config, grading = request.config, Grading(request.config.reward.truncated, model.thinking)
    progress = ProgressReporter("evaluation", len(request.asked), len(request.asked) - len(todo))

    def task(name: str, asked: Asked) -> GenerationTask:
        seed = stable_hash(config.run.seed, name) % 2**31 if config.rollout.deterministic and request.temperature else None
        sampling = Sampling(request.samples, request.temperature, request.top_p, -1, request.max_tokens, seed)
        return GenerationTask(name, asked.shown, tuple(model.prompts.render(asked.shown)), sampling)

    _log_evaluation(request, model.folder, todo)
    with answering(config, model) as answer:
        for scored in answer(task(name, asked) for name, asked in by_id.items()):
            group, asked = scored.group, by_id[scored.group.group_id]
            append_items(
                request.out / ITEMS,
                [
                    graded(asked, j, rollout.text, rollout.finish_reason, len(rollout.response_token_ids), grading)
                    for j, rollout in enumerate(group.rollouts)
                ],
            )
            progress.advance()


def _log_evaluation(request: EvaluationRequest, model: Path, todo: Sequence[Asked]) -> None:
    """Where the model is the export of a run, the run's evaluation log gets a line a set."""
    from alphamed.rundir import evaluation_log

    if model.name.startswith("hf") and (model.parent / "config.yaml").is_file():
        counts = Counter(asked.set for asked in todo)
        evaluation_log.record(
            model.parent, None, "alphamed eval", [(name, evaluation_log.TEST, n) for name, n in counts.items()]
        )


def _write(out: Path, answers: Mapping[Key, Sequence[GradedAnswer]], dropped: set[Key]) -> None:
    """The answers without those that are to be generated again, whole lines only."""
    from alphamed.evaluation.items import ITEMS, write_items

    remaining = [answer for key, of_question in answers.items() if key not in dropped for answer in of_question]
    if remaining or (out / ITEMS).exists():
        write_items(out / ITEMS, remaining)
