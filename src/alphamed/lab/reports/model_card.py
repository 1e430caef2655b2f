"""The card of an exported model (README.md in its folder): what it was trained on, how it was evaluated, what it is not for.

Everything in it comes from the run directory: configuration, provenance.json, evaluations and recorded responses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alphamed.config.schema import Config
from alphamed.data.attributes import ATTRIBUTES, Attribute
from alphamed.data.prompts import user_turn
from alphamed.evaluation.score import Score
from alphamed.files import replace_text
from alphamed.lab.reports.report import ROWS, evaluations, one_letter, read_set_items, training_sentences
from alphamed.lab.reports.rollout_report import run_stats
from alphamed.lab.reports.watch import warnings
from alphamed.records import Question
from alphamed.rundir import provenance
from alphamed.rundir.metrics import read_rows

NOT_CLINICAL = (
    "**Not for clinical use.** This model answers examination questions for research on training. It has not "
    "been validated for diagnosis, treatment or advice, its reasoning can be wrong where its answer is right, "
    "and no clinician has reviewed it."
)


def write_card(run_dir: Path, config: Config, folder: Path, step: int | None = None) -> None:
    """Write README.md into `folder`, a model of the run after `step` (None: its last recorded one)."""
    rows = read_rows(run_dir / "metrics.jsonl")
    steps = max((int(row["step"]) for row in rows), default=0) if step is None else step
    replace_text(
        folder / "README.md",
        card(
            name=run_dir.resolve().name,
            base=_base(config),
            config=config,
            steps=steps,
            record=provenance.read(run_dir) or {},
            scores={at: found for at, found in evaluations(run_dir).items() if at <= steps},
            sentences=training_sentences([row for row in rows if row["step"] <= steps]),
            warned=_warned(run_dir, steps),
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
    warned: Sequence[str],
) -> str:
    """The card as Markdown. `scores` maps steps to scores by evaluation set."""
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
        f"licences of the {'examples' if config.sft else 'questions'} are in the cards of their data sets.",
        "",
        "## Training data",
        "",
        *_data(record),
        "",
        "## Evaluation",
        "",
        *_evaluation(scores),
        "",
        "## What training did",
        "",
        *(f"- {text}" for text in sentences),
        *(f"- Warning. {text}" for text in warned),
        "",
        "## Prompt",
        "",
        "Questions were asked in this form, and the letter in the last `\\boxed{}` was graded:",
        "",
        "```",
        user_turn(config.prompt, Question("", "...", {"A": "...", "B": "..."}, "A")),
        "```",
        "",
        f"Template: {config.prompt.template}{_shots(config)}{_variables(config)}; at most "
        f"{config.rollout.max_response_tokens} tokens a response.",
        "",
        *_made(record),
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
                for one in ATTRIBUTES
                if set(train.get(one.axis, ())) - {"none"}
                for line in _counted(one, train[one.axis])
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
            f"| {Path(one['path']).name} | {one['bytes']:,} | `{one['sha256']}`"
            f"{' (of samples)' * (one['hashed'] != 'all')} |"
            for one in files
        ),
    ]


def _counted(attribute: Attribute, counts: Mapping[str, int]) -> list[str]:
    return [
        f"| {attribute.field} ({attribute.scale}) | questions |",
        "|---|---|",
        *(f"| {value} | {count:,} |" for value, count in counts.items()),
        "",
    ]


def _evaluation(scores: Mapping[int, Mapping[str, Score]]) -> list[str]:
    """Per set its first and last scores with 95% Wilson intervals, and how often it was looked at."""
    names = list(dict.fromkeys(name for found in scores.values() for name in found))
    if not names:
        return ["Not evaluated by this run; nothing is claimed of its accuracy."]
    lines = []
    for name in names:
        steps = [step for step, found in scores.items() if name in found]
        ends = list(dict.fromkeys((steps[0], steps[-1])))
        first = scores[ends[-1]][name]
        lines += [
            f"### {name}",
            "",
            f"n = {first.n:,}, greedy answers, 95% Wilson intervals; picking letters blindly gives "
            f"{first.chance:.1%}. The set was looked at {len(steps)} time{'s' * (len(steps) != 1)} during the run.",
            "",
            "| | " + " | ".join(f"step {step}" for step in ends) + " |",
            "|---" * (len(ends) + 1) + "|",
            *(
                f"| {label} | " + " | ".join(str(getattr(scores[step][name], key)) for step in ends) + " |"
                for label, key in ROWS.items()
            ),
            "",
        ]
    return lines[:-1]


def _warned(run_dir: Path, steps: int) -> list[str]:
    """What the report would warn of after that many steps."""
    found = warnings([one for one in run_stats(run_dir).steps if one.step <= steps])
    scores = {at: names for at, names in evaluations(run_dir).items() if at <= steps}
    if not scores:
        return found
    last = max(scores)
    letters = [one_letter(read_set_items(run_dir, last), name, f"on {name} after step {last}") for name in scores[last]]
    return [*found, *filter(None, letters)]


def _base(config: Config) -> str:
    """The model that training began with: a hub or package name, or the name of a local folder (not where it lies)."""
    path = config.model.path
    name = Path(path).name if Path(path).is_dir() or Path(path).is_absolute() else path
    return f"{name}@{config.model.revision}" if config.model.revision else name


def _shots(config: Config) -> str:
    count = len(config.prompt.shots)
    return f", {count} worked example{'s' * (count != 1)} before the question" if count else ""


def _variables(config: Config) -> str:
    """The template's variables and the further stop tokens, which whoever uses the model has to set as well."""
    given = [f"`{name}: {_quoted(value)}`" for name, value in config.prompt.template_variables.items()]
    stops = [f"`{text}`" for text in config.rollout.stop]
    return (f" with {', '.join(given)}" if given else "") + (f", responses also end at {', '.join(stops)}" if stops else "")


def _made(record: Mapping[str, Any]) -> list[str]:
    starts = record.get("starts", [])
    if not starts:
        return []
    last = starts[-1]
    git, version = last.get("git") or {}, last.get("packages", {}).get("alphamed", "unknown")
    commit = f", commit {git['commit'][:12]}" if git.get("commit") else ""
    return [
        "## Made by",
        "",
        f"alphamed {version}{commit}, {last['time']}. The run directory has every setting, hash and "
        f"response (config.yaml, provenance.json, rollouts/).",
    ]


def _quoted(text: Any) -> str:
    import json

    return json.dumps(text)
