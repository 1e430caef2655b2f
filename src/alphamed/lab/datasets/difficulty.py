"""`alphamed data difficulty`: how hard each question is for a model, from k sampled answers; written as columns of the
questions.

Liu et al. (arXiv 2505.17952) take five samples: level 1 where all are right, level 6 where none is. Answers are kept in
OUT.work, one JSONL file a shard and one line a question as soon as it is done, so that a start after a kill repeats none.
Shards can run on several machines at once; whichever start finds all questions answered writes OUT.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from alphamed.config.choices import BadRows
from alphamed.config.schema import Config
from alphamed.data.mcq import LEVELS
from alphamed.data.output import check_places, check_suffix, question_writer, write_all
from alphamed.data.sources import load_questions
from alphamed.errors import ConfigError
from alphamed.files import append_json, read_json_lines
from alphamed.hashing import draw
from alphamed.records import GenerationTask, Outcome, Question, Sampling, ScoredGroup
from alphamed.response_stats import ResponseStats

SETTINGS_WAIT_S = 60.0
"""Other shards hold the lock on the common settings for milliseconds; the lock of a dead machine on a network disk may
last."""
LENGTH_EDGES = (50, 100, 200)
"""Tokens of the stem at which a longer bin begins: the paper's sets lie mostly below 50 (PubMedQA), up to 270 (MedMCQA) and
between 30 and 400 (MedQA). Fixed, so that bins mean the same in every set."""


def by_length(question: Question, tokens: int) -> int:
    """1 (short) .. 4 (long): the paper takes the length of a question for its informativeness."""
    return 1 + sum(tokens >= edge for edge in LENGTH_EDGES)


INFORMATIVENESS: dict[str, Callable[[Question, int], int]] = {"length": by_length}
"""Name -> (question, tokens of its stem) -> bin, from 1. Another measure is a function and a line here; it is applied when
OUT is written, so that a further start with it generates nothing."""


def level_of(right: int, samples: int) -> int:
    """Level of a question with `right` of `samples` answers right: 1 for all, 6 for none. Between them the level whose pass
    rate (2: 0.8, 3: 0.6, 4: 0.4, 5: 0.2) is nearest, the harder of two as near: with five samples one level each."""
    if not 0 <= right <= samples or samples < 1:
        raise ValueError(f"{right} of {samples} samples cannot be right")
    if right in (0, samples):
        return LEVELS[0] if right else LEVELS[-1]
    fifths = -(-(10 * right - samples) // (2 * samples))  # ceil(5 p - 1/2), in whole numbers
    return 6 - min(max(fifths, 1), 4)


@dataclass(frozen=True, slots=True)
class Annotated:
    """The graded answers to one question. `content` identifies its exact text: another text is another question."""

    id: str
    content: str
    outcomes: tuple[Outcome, ...]
    letters: tuple[str | None, ...]
    tokens: tuple[int, ...]
    question_tokens: int
    cut: tuple[bool, ...]  # at the token limit, whatever the outcome

    def columns(self, model: str) -> dict[str, Any]:
        """What is written next to the question, but for level and informativeness. Lengths are tokens."""
        stats = self.stats
        return {
            "pass_rate": stats.accuracy,
            "samples": stats.responses,
            "unparsed": stats.share(stats.unparseable),
            "truncated": stats.share(stats.truncated),
            "response_tokens_mean": stats.tokens_mean,
            "question_tokens": self.question_tokens,
            "annotated_by": model,
        }

    @property
    def stats(self) -> ResponseStats:
        return ResponseStats.of(zip(self.outcomes, self.tokens, self.cut))

    @property
    def level(self) -> int:
        return level_of(self.stats.correct, self.stats.responses)


def annotated(scored: ScoredGroup, question_tokens: int) -> Annotated:
    question = scored.group.question
    return Annotated(
        question.id,
        content_of(question),
        scored.outcomes,
        scored.letters,
        tuple(len(rollout.response_token_ids) for rollout in scored.group.rollouts),
        question_tokens,
        tuple(rollout.finish_reason.truncated for rollout in scored.group.rollouts),
    )


def content_of(question: Question) -> str:
    content = [question.question, question.context, list(question.options.items()), question.answer]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()[:16]


def shard_of(question: Question, shards: int) -> int:
    """1..shards, by the id alone: independent of file order and other questions."""
    return 1 + int(draw("shard", question.id)[:15], 16) % shards


# --------------------------------------------------------------------------------------------------------------- files
def work_folder(out: Path) -> Path:
    return out.with_name(out.name + ".work")


def read_work(work: Path, questions: Sequence[Question], samples: int) -> dict[str, Annotated]:
    """Question id -> its annotation, from the shards of any number there are. Lines of other questions are skipped."""
    contents = {question.id: content_of(question) for question in questions}
    annotations = {}
    for file in sorted(work.glob("shard-*.jsonl")):
        for number, row in enumerate(read_json_lines(file), start=1):
            try:
                annotation = Annotated(
                    row["id"],
                    row["content"],
                    tuple(map(Outcome, row["outcomes"])),
                    tuple(row["letters"]),
                    tuple(row["tokens"]),
                    row["question_tokens"],
                    tuple(
                        row["cut"]
                        if "cut" in row
                        # older files have outcomes alone
                        else (outcome == Outcome.TRUNCATED for outcome in row["outcomes"])
                    ),
                )
            except (KeyError, TypeError, ValueError) as error:
                raise ConfigError(
                    f"{file}: line {number} is no annotation ({type(error).__name__}: {error}); remove it, "
                    f"then its question is asked again"
                ) from None
            if contents.get(annotation.id) == annotation.content and len(annotation.outcomes) == samples:
                annotations[annotation.id] = annotation
    return annotations


def write_set(
    out: Path, questions: Sequence[Question], annotations: Mapping[str, Annotated], model: str, measure: str
) -> None:
    """The questions in their order with level, informativeness and columns of their annotations. Whole or not at all."""
    bins = INFORMATIVENESS[measure]
    with_levels = [
        replace(q, level=annotations[q.id].level, informativeness=bins(q, annotations[q.id].question_tokens))
        for q in questions
    ]
    write_all({out: question_writer(out, with_levels, [annotations[q.id].columns(model) for q in questions])})


# ------------------------------------------------------------------------------------------------------------- command
def add_arguments(parser: argparse.ArgumentParser) -> None:
    from alphamed.evaluation.command import add_model_arguments

    add = parser.add_argument
    add(
        "--questions",
        type=Path,
        action="append",
        required=True,
        metavar="FILE",
        help="questions to annotate. May be repeated",
    )
    add(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="annotated set, .parquet or .jsonl; answers are stored in FILE.work",
    )
    add("--samples", type=int, default=5, metavar="K", help="answers per question (default: 5, as in the paper)")
    add("--temperature", type=float, default=1.0, metavar="T", help="sampling temperature (default: 1)")
    add("--top-p", type=float, default=1.0, metavar="P", help="nucleus sampling (default: 1)")
    add("--shard", default="1/1", metavar="I/N", help="process only part I of N, to use several machines")
    add(
        "--informativeness",
        choices=list(INFORMATIVENESS),
        default="length",
        help="measure of informativeness (default: length of the stem)",
    )
    add_model_arguments(parser)


def main(options: argparse.Namespace) -> int:
    """Returns the exit code. Raises ConfigError or DataError for a mistake in the input, before anything is started."""
    from alphamed.evaluation import settings
    from alphamed.evaluation.answers import Prompted, engine_tree
    from alphamed.evaluation.command import check_sampling, config_of
    from alphamed.evaluation.place import held

    check_places(
        {"--out": options.out},
        {"--questions": options.questions, "--config": [options.config], "--shots": [options.shots]},
        options.overwrite,
    )
    check_suffix(options.out)
    shard, shards = _shard(options.shard)
    if options.temperature == 0:
        raise ConfigError("--temperature: 0 makes all answers the same, which measures no difficulty; give one above 0")
    check_sampling(options)
    questions = load_questions(options.questions, BadRows(options.bad_rows)).questions
    config, work = config_of(options, options.overrides), work_folder(options.out)
    limit, place = options.max_tokens or config.rollout.max_response_tokens, work / f"shard-{shard}-of-{shards}"
    config = engine_tree(config, place, options.samples, limit)
    model = Prompted(config, questions)
    how = settings.asked(config, model.folder, options.samples, options.temperature, options.top_p, limit)
    mine = [question for question in questions if shard_of(question, shards) == shard]
    with held(place):
        with held(work, wait_s=SETTINGS_WAIT_S):  # other shards may start at the same time; none is refused for that
            settings.require_same(work, how)
            settings.write(work, str(model.folder), how, {}, {}, options.command)
        return _carry_out(options, questions, mine, config, model, work / f"{place.name}.jsonl")


def _carry_out(
    options: argparse.Namespace,
    questions: Sequence[Question],
    mine: Sequence[Question],
    config: Config,
    model: Any,
    file: Path,
) -> int:
    """Annotate the questions of this shard, `mine`; write the set where all of them are done. Returns the exit code."""
    from alphamed.errors import RunFailed

    try:
        _annotate(mine, config, options, model, file)
    except RunFailed as error:
        print(f"{'error' if error.user_error else 'difficulty failed'}: {error}", file=sys.stderr)
        return 2 if error.user_error else 1
    annotations = read_work(file.parent, questions, options.samples)
    if len(annotations) < len(questions):
        print(
            f"{file.parent}: {len(annotations):,} of {len(questions):,} questions are annotated; {options.out} is written by the "
            f"start that finds all of them done"
        )
        return 0
    write_set(options.out, questions, annotations, model.folder.resolve().name, options.informativeness)
    _print_summary(options.out, annotations)
    return 0


def _shard(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not slash or not index.isdecimal() or not count.isdecimal() or not 1 <= int(index) <= int(count):
        raise ConfigError(f"--shard: {text!r} is not I/N with I from 1 to N; write it like 2/8")
    return int(index), int(count)


def _annotate(mine: Sequence[Question], config: Config, options: argparse.Namespace, model: Any, file: Path) -> None:
    """Ask the questions that no shard has answered, and add each one's line to `file` as it is done."""
    from alphamed.evaluation import answers
    from alphamed.hashing import stable_hash

    done = read_work(file.parent, mine, options.samples)
    todo = [question for question in mine if question.id not in done]
    if done:
        print(f"{file.parent}: {len(done):,} of {len(mine):,} questions are annotated already", file=sys.stderr)
    if not todo:
        return
    limit, progress = config.rollout.max_response_tokens, answers.ProgressReporter("difficulty", len(mine), len(done))

    def task(question: Question) -> GenerationTask:
        name = f"difficulty/{question.id}"
        seed = stable_hash(config.run.seed, name) % 2**31 if config.rollout.deterministic else None
        return GenerationTask(
            name,
            question,
            tuple(model.prompts.render(question)),
            Sampling(options.samples, options.temperature, options.top_p, -1, limit, seed),
        )

    with answers.answering(config, model) as answer:
        for scored in answer(task(question) for question in todo):
            tokens = len(model.tokenizer.encode(model.tokenizer.plain(scored.group.question.question)))
            annotation = annotated(scored, tokens)
            append_json(file, asdict(annotation))
            progress.advance()


def _print_summary(out: Path, annotations: Mapping[str, Annotated]) -> None:
    levels = Counter(annotation.level for annotation in annotations.values())
    rate = sum(annotation.columns("")["pass_rate"] for annotation in annotations.values()) / len(annotations)
    print(
        f"{out}: {len(annotations):,} questions, pass rate {rate:.1%}; "
        + ", ".join(f"L{level} {levels[level]:,}" for level in LEVELS)
    )
