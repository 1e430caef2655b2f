"""The card of an exported model (README.md in its folder): training data, evaluation, and what it must not be used for.

Everything in it comes from the run directory: configuration, provenance.json, evaluations and recorded responses.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alphamed.config.schema import Config
from alphamed.data.attributes import ATTRIBUTES, Attribute
from alphamed.data.prompts import user_turn
from alphamed.evaluation.score import Score
from alphamed.files import replace_text
from alphamed.lab.reports.report import SHARES, collapse_warning, evaluations, read_set_items, training_sentences
from alphamed.lab.reports.rollout_report import run_stats
from alphamed.lab.reports.watch import response_warnings
from alphamed.records import Question
from alphamed.rundir import provenance
from alphamed.rundir.metrics import last_step, read_rows, step_of

NOT_CLINICAL = (
    "**Not for clinical use.** This model answers examination questions for research on training. It has not "
    "been validated for diagnosis, treatment or advice, its reasoning can be wrong where its answer is right, "
    "and no clinician has reviewed it."
)


def write_card(run_dir: Path, config: Config, folder: Path, step: int | None = None) -> None:
    """Write README.md into `folder`, a model of the run after `step` (None: its last recorded one)."""
    rows = read_rows(run_dir / "metrics.jsonl")
    steps = last_step(rows) if step is None else step
    replace_text(
        folder / "README.md",
        card(
            name=run_dir.resolve().name,
            base=_base(config),
            config=config,
            steps=steps,
            record=provenance.read(run_dir) or {},
            scores=_scores_until(run_dir, steps),
            sentences=training_sentences([row for row in rows if step_of(row) <= steps]),
            warnings=_warnings(run_dir, steps),
        ),
    )


def card(
    *,
    name: str,
    base: str,
    config: Config,
    steps: int,
    record: Mapping[str, Any],
    scores: Mapping[int, Mapping[str, Score]],
    sentences: Sequence[str],
    warnings: Sequence[str],
) -> str:
    """The card as Markdown. `scores` maps each step to the scores by evaluation set."""
    method = "sft" if config.sft else "grpo"
    lines = [
        "---",
        f"base_model: {_quoted(base)}",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        f"tags: [alphamed, {method}, medical-question-answering, not-for-clinical-use]",
        "---",
        "",
        f"# {name}",
        "",
        NOT_CLINICAL,
        "",
        f"{base}, {_training(config, steps)}, learning rate {config.optimizer.lr:g}. The licence of the base model applies; "
        f"the licences of the {'examples' if config.sft else 'questions'} are in the cards of their data sets.",
        "",
        "## Training data",
        "",
        *_data(record),
        "",
        "## Evaluation",
        "",
        *_evaluation(scores),
        "",
        "## Training results",
        "",
        *(f"- {text}" for text in sentences),
        *(f"- Warning. {text}" for text in warnings),
        "",
        "## Prompt",
        "",
        "Questions have this form, and the letter in the last `\\boxed{}` is graded:",
        "",
        "```",
        user_turn(config.prompt, Question("", "...", {"A": "...", "B": "..."}, "A")),
        "```",
        "",
        f"Template: {config.prompt.template}{_shots(config)}{_variables(config)}; "
        f"at most {config.rollout.max_response_tokens} tokens per response.",
        "",
        *_provenance(record),
    ]
    return "\n".join(lines) + "\n"


def _training(config: Config, steps: int) -> str:
    """How the model was trained, in a phrase."""
    if config.sft is not None:
        return f"fine-tuned on given responses (cross entropy): {steps} steps of {config.sft.prompts_per_step} prompts"
    rollout, algorithm = config.rollout, config.algorithm
    return (
        f"trained with rule-based reinforcement learning on multiple-choice questions: {steps} steps of "
        f"{rollout.questions_per_step} questions x {rollout.samples_per_question} responses, reward "
        f"`{config.reward.name}`, advantage `{algorithm.advantage}`, loss `{algorithm.loss}`, KL coefficient "
        f"{algorithm.kl_coefficient:g}"
    )


def _data(record: Mapping[str, Any]) -> list[str]:
    train, files = record.get("train"), record.get("data", [])
    lines = []
    if train:
        lines += [
            f"{train['questions']:,} questions; SHA-256 of the questions in their order: `{train['content_sha256']}`.",
            "",
            "| source | questions |",
            "|---|---|",
            *(f"| {source} | {count:,} |" for source, count in train["sources"].items()),
            "",
            *(
                line
                for attribute in ATTRIBUTES
                if set(train.get(attribute.axis, ())) - {"none"}
                for line in _attribute_table(attribute, train[attribute.axis])
            ),
        ]
    else:
        lines += ["Number and sources of the training rows were not recorded.", ""]
    if not files:
        return [*lines, "No training file is recorded."]
    return [
        *lines,
        "| file | bytes | SHA-256 |",
        "|---|---|---|",
        *(
            f"| {Path(file['path']).name} | {file['bytes']:,} | `{file['sha256']}`"
            f"{' (of samples)' * (file['hashed'] != 'all')} |"
            for file in files
        ),
    ]


def _attribute_table(attribute: Attribute, counts: Mapping[str, int]) -> list[str]:
    return [
        f"| {attribute.field} ({attribute.scale}) | questions |",
        "|---|---|",
        *(f"| {value} | {count:,} |" for value, count in counts.items()),
        "",
    ]


def _evaluation(scores: Mapping[int, Mapping[str, Score]]) -> list[str]:
    """First and last scores of each set with 95% Wilson intervals, and how often it was evaluated."""
    names = list(dict.fromkeys(name for scores_of_step in scores.values() for name in scores_of_step))
    if not names:
        return ["Not evaluated by this run; its accuracy is not known."]
    lines = []
    for name in names:
        steps = [step for step, scores_of_step in scores.items() if name in scores_of_step]
        ends = list(dict.fromkeys((steps[0], steps[-1])))
        last = scores[ends[-1]][name]
        lines += [
            f"### {name}",
            "",
            f"n = {last.n:,}, greedy answers, 95% Wilson intervals; picking letters at random gives "
            f"{last.chance:.1%}. The set was evaluated {len(steps)} time{'s' * (len(steps) != 1)} during the run.",
            "",
            "| | " + " | ".join(f"step {step}" for step in ends) + " |",
            "|---" * (len(ends) + 1) + "|",
            *(
                f"| {label} | " + " | ".join(str(getattr(scores[step][name], key)) for step in ends) + " |"
                for label, key in SHARES.items()
            ),
            "",
        ]
    return lines[:-1]


def _scores_until(run_dir: Path, step: int) -> dict[int, dict[str, Score]]:
    return {at: scores for at, scores in evaluations(run_dir).items() if at <= step}


def _warnings(run_dir: Path, step: int) -> list[str]:
    """The warnings of a report on the run up to `step`."""
    warnings = response_warnings([stats for stats in run_stats(run_dir).steps if stats.step <= step])
    scores = _scores_until(run_dir, step)
    if not scores:
        return warnings
    last = max(scores)
    items = read_set_items(run_dir, last)
    collapses = [collapse_warning(items, name, f"on {name} after step {last}") for name in scores[last]]
    return [*warnings, *filter(None, collapses)]


def _base(config: Config) -> str:
    """The model that training started from: a hub or package name, or the name of a local folder without its path."""
    path = config.model.path
    name = Path(path).name if Path(path).is_dir() or Path(path).is_absolute() else path
    return f"{name}@{config.model.revision}" if config.model.revision else name


def _shots(config: Config) -> str:
    count = len(config.prompt.shots)
    return f", {count} worked example{'s' * (count != 1)} before the question" if count else ""


def _variables(config: Config) -> str:
    """The template's variables and further stop strings, which users of the model have to set too."""
    variables = [f"`{name}: {_quoted(value)}`" for name, value in config.prompt.template_variables.items()]
    stops = [f"`{text}`" for text in config.rollout.stop]
    return (f" with {', '.join(variables)}" if variables else "") + (
        f", responses also stop at {', '.join(stops)}" if stops else ""
    )


def _provenance(record: Mapping[str, Any]) -> list[str]:
    starts = record.get("starts", [])
    if not starts:
        return []
    last = starts[-1]
    git, version = last.get("git") or {}, last.get("packages", {}).get("alphamed", "unknown")
    commit = f", commit {git['commit'][:12]}" if git.get("commit") else ""
    return [
        "## Provenance",
        "",
        f"alphamed {version}{commit}, {last['time']}. The run directory has every setting, hash and "
        f"response (config.yaml, provenance.json, rollouts/).",
    ]


def _quoted(text: Any) -> str:
    return json.dumps(text)
