r"""A lesson in form for `alphamed sft`: how an answer is written, and nothing that is answered.

Each row is a question with as many responses as it has options, ` TEXT (C) \boxed{C}` for every one of them, so that a model
that has learnt them all boxes always, binds a text to its letter, chooses every option equally often and knows no fact more
than before: the file holds no key. Options stand in a new order in every row. `alphamed sft` asks the questions with the
prompt of its configuration, as training and evaluation do.

    python -m alphamed.lab.datasets.form lesson.jsonl --questions .cache/medfacts/train.jsonl --rows 100
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from alphamed.answers.extraction import extract_answer
from alphamed.config.choices import BadRows
from alphamed.data.output import check_places
from alphamed.data.sources import load_questions
from alphamed.data.stream import refers_to_options, shuffle_options
from alphamed.errors import ConfigError, DataError
from alphamed.files import replace_json_lines
from alphamed.hashing import draw
from alphamed.records import Question

RESPONSE = r" {text} ({letter}) \boxed{{letter}}"
_FIELD = re.compile(r"\{(text|letter)\}")


def lesson(questions: Sequence[Question], rows: int, response: str, seed: int) -> Iterator[dict[str, Any]]:
    """`rows` rows of the questions in an order by seed, again from the start where there are fewer. Raises ConfigError where
    a response would not be graded as its letter."""
    order = sorted(questions, key=lambda question: draw(seed, "form", question.id))
    for number in range(rows):
        turn, place = divmod(number, len(order))
        question = shuffle_options(order[place], seed, turn)
        responses = [_filled(response, letter, text) for letter, text in question.options.items()]
        for letter, text in zip(question.options, responses, strict=True):
            if extract_answer(text, question.options) != letter:
                raise ConfigError(
                    f"--response: {text!r} does not box {letter}, the letter of its option; end with \\boxed{{{{letter}}}}"
                )
        yield {
            "id": f"form-{turn}-{question.id}",
            **({"context": question.context} if question.context else {}),
            "question": question.question,
            "options": dict(question.options),
            "responses": responses,
        }


def _filled(pattern: str, letter: str, text: str) -> str:
    values = {"letter": letter, "text": text}
    return _FIELD.sub(lambda field: values[field[1]], pattern)


def write(out: Path, files: Sequence[Path], rows: int | None, response: str, seed: int) -> int:
    """Write the lesson, whole or not at all; returns the number of rows. Questions that refer to options by their place are
    left out. Raises ConfigError and DataError."""
    check_places({"OUT": out}, {"--questions": files}, overwrite=True)
    if not {"text", "letter"} <= set(_FIELD.findall(response)):
        raise ConfigError(f"--response: {response!r} lacks {{text}} or {{letter}}; write for instance {RESPONSE!r}")
    questions = [q for q in load_questions(files, BadRows.REFUSE).questions if not refers_to_options(q)]
    if not questions:
        raise ConfigError("--questions: all of them refer to options by their place; give others")
    made = list(lesson(questions, rows or len(questions), response, seed))
    replace_json_lines(out, made)
    return len(made)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m alphamed.lab.datasets.form", description="Write a lesson in form for `alphamed sft`."
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="output file, .jsonl")
    parser.add_argument(
        "--questions", type=Path, action="append", required=True, metavar="FILE", help="questions. May be repeated"
    )
    parser.add_argument("--rows", type=int, metavar="N", help="number of rows (default: one per question)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--response",
        default=RESPONSE,
        metavar="TEXT",
        help="response format with {text} and {letter} (default: '%(default)s'; for chat templates without the leading space)",
    )
    options = parser.parse_args(arguments)
    try:
        if options.rows is not None and options.rows < 1:
            raise ConfigError(f"--rows: {options.rows} is no number of rows; give 1 or more")
        count = write(options.out, options.questions, options.rows, options.response, options.seed)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {count:,} rows, each with a response for every option")
    return 0


if __name__ == "__main__":
    sys.exit(main())
