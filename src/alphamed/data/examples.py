"""Examples of supervised training: a prompt and the responses to imitate, read from files in any container of tables.py.

A row gives its prompt in one of three forms: `question` (with `options` and `context`, asked as reinforcement learning asks
it), `prompt` (a text) or `messages` (a conversation); its responses as `response`, `responses`, `completion` or the last
assistant turn. Rows of public distilled sets are put into this form first (distilled.py).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alphamed.config.choices import BadRows
from alphamed.data.chat_template import Message
from alphamed.data.distilled import adapt
from alphamed.data.mcq import QuestionError, RawRow, RowProblem, parse_question, short
from alphamed.data.tables import rows
from alphamed.data.text import counted
from alphamed.errors import DataError
from alphamed.hashing import draw
from alphamed.records import Question

PROMPT_FIELDS = ("question", "prompt", "messages")
RESPONSE_FIELDS = ("response", "responses", "completion")
ROLES = ("system", "user", "assistant")
UNREAD = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""Parts of a turn that would change its text: refused, for without them another text would be trained on."""
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
Prompt = Question | str | tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and one or more responses to it. Of a conversation, `prompt` holds all turns before the last assistant's.
    `place` is the file and line it was read from."""

    id: str
    prompt: Prompt
    responses: tuple[str, ...]
    place: tuple[str, int] = ("", 0)

    def question(self) -> Question:
        """What is asked, to be compared with questions of evaluations: the question itself, or the last user's text."""
        prompt = self.prompt if isinstance(self.prompt, Question | str) else self.prompt[-1]["content"]
        question = prompt if isinstance(prompt, Question) else Question("", prompt, {}, "")
        return replace(question, id=self.id)


@dataclass(frozen=True, slots=True)
class LoadedExamples:
    """The examples of some files in file order, and the bad rows that were left out."""

    examples: tuple[Example, ...]
    skipped: tuple[RowProblem, ...] = ()


def load_examples(
    paths: Iterable[Path], bad_rows: BadRows = BadRows.REFUSE, response_format: str = "{response}"
) -> LoadedExamples:
    """Read all files; ids must be unique across them. `response_format` joins a row's reasoning and response
    (sft.response_format).

    Raises DataError where a file cannot be read, holds no example, or, with BadRows.REFUSE, has any bad row.
    """
    examples: dict[str, Example] = {}
    alike: Counter[str] = Counter()
    problems: list[RowProblem] = []
    for row in (row for path in paths for row in rows(Path(path))):
        try:
            if row.problem is not None:
                raise ValueError(row.problem)
            example = _parse(row, response_format, alike)
            if example.id in examples:
                first = examples[example.id].place
                raise ValueError(f"duplicate id {short(example.id)}, first at {first[0]}:{first[1]}")
            examples[example.id] = example
        except QuestionError as error:
            problems.append(RowProblem(row.file, row.line, error.problem))
        except ValueError as error:
            problems.append(RowProblem(row.file, row.line, str(error)))
    return usable(examples.values(), problems, bad_rows)


def usable(examples: Iterable[Example], problems: Sequence[RowProblem], bad_rows: BadRows) -> LoadedExamples:
    """What is left with these problems. Raises DataError where nothing is, or problems are refused."""
    if problems and bad_rows == BadRows.REFUSE:
        others = f"; {counted(len(problems) - 1, 'more bad row')}" if len(problems) > 1 else ""
        raise DataError(f"{problems[0]}{others}; fix the data, or leave bad rows out with data.bad_rows=skip", problems)
    loaded = LoadedExamples(tuple(examples), tuple(problems))
    if not loaded.examples:
        first = f", all {len(problems)} rows are bad (the first: {problems[0]})" if problems else ""
        raise DataError(f"data.train: no usable example{first}; fix the data", problems)
    return loaded


# ------------------------------------------------------------------------------------------------------------- one row
def _parse(row: RawRow, response_format: str, alike: Counter[str]) -> Example:
    """`alike`: how many rows there were of each content. Raises ValueError with the first problem, as a short phrase."""
    if not isinstance(row.value, Mapping):
        raise ValueError("not an object of keys and values")
    value = adapt(row.value)
    responses, last = _responses(value)
    prompt = _prompt(value, row.where, last)
    if "reasoning" in value or "{letter}" in response_format:
        responses = _formatted(value, prompt, responses, response_format)
    name = value.get("id")
    if name is not None and not isinstance(name, str | int):
        raise ValueError(f"id {short(name)} is neither text nor a whole number")
    return Example(str(name) if name else _made_id(prompt, responses, alike), prompt, tuple(responses), (row.file, row.line))


def _formatted(value: Mapping[str, Any], prompt: Prompt, responses: Sequence[str], response_format: str) -> list[str]:
    """Reasoning, response and the letter of the answer, where the format asks for it, as one text each."""
    reasoning = _texts(value, "reasoning") if "reasoning" in value else [""] * len(responses)
    if len(reasoning) != len(responses):
        raise ValueError(f"{len(reasoning)} texts of reasoning for {counted(len(responses), 'response')}")
    letter = value.get("answer", "")
    if "{letter}" in response_format and letter not in tuple(string.ascii_uppercase):
        raise ValueError("no answer as a letter, which sft.response_format puts into the response")
    if "{letter}" in response_format and isinstance(prompt, Question) and prompt.options and letter not in prompt.options:
        raise ValueError(f"answer {short(letter)} is none of the options {', '.join(prompt.options)}")
    pattern = re.compile(r"\{(reasoning|response|letter)\}")
    texts = []
    for thought, said in zip(reasoning, responses):
        parts = {"reasoning": thought, "response": said, "letter": letter}
        text = pattern.sub(lambda match: parts[match[1]], response_format)  # noqa: B023  used at once
        texts.append(text if thought else text.lstrip("\n"))
    return texts


def _responses(value: Mapping[str, Any]) -> tuple[list[str], int]:
    """The responses, and how many of the row's last messages are among them (0 or 1)."""
    fields = [name for name in RESPONSE_FIELDS if name in value]
    if len(fields) > 1:
        raise ValueError(f"has both {fields[0]} and {fields[1]}; keep one")
    if fields and _is_conversation(value[fields[0]]):  # a completion as a list of messages
        turns = _messages(value[fields[0]], fields[0], ("assistant",))
        if len(turns) != 1:
            raise ValueError(f"{fields[0]} is a conversation of {len(turns)} turns, not one assistant turn; give messages")
        return [_text(turns[0]["content"], fields[0])], 0
    if fields:
        return _texts(value, fields[0]), 0
    if "messages" not in value:
        raise ValueError(f"no response; give one of {', '.join(RESPONSE_FIELDS)}")
    turns = _messages(value["messages"], "messages")
    if turns[-1]["role"] != "assistant":
        raise ValueError("messages end with the user's turn and no response is given")
    return [_text(turns[-1]["content"], "messages")], 1


def _prompt(value: Mapping[str, Any], where: str, last: int) -> Prompt:
    """`last`: how many of the last messages are no part of the prompt."""
    fields = [name for name in PROMPT_FIELDS if name in value]
    if len(fields) != 1:
        raise ValueError(
            f"has both {fields[0]} and {fields[1]}; keep one"
            if fields
            else f"no {', '.join(PROMPT_FIELDS[:-1])} or messages"
        )
    field = fields[0]
    if field == "question":
        return _question(value, where)
    if not _is_conversation(value[field]):
        return _text(value[field], field)
    turns = _messages(value[field], field)
    turns = turns[: len(turns) - last]
    if not turns or turns[-1]["role"] != "user":
        raise ValueError(f"{field}: the turn before the response is not the user's")
    return turns


def _question(value: Mapping[str, Any], where: str) -> Question:
    """A question as a prompt: its key, level and bin are of no use here."""
    options = value.get("options")
    if isinstance(options, list):
        options = dict(zip(string.ascii_uppercase, options))
    if not options:
        context = _text(value["context"], "context").strip() if value.get("context") else None
        return Question("", _text(value["question"], "question").strip(), {}, "", context)
    plain = {"id": "-", "question": value["question"], "options": options, "context": value.get("context")}
    return parse_question(plain | {"answer": next(iter(options))}, where)


def _is_conversation(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _messages(value: object, field: str, first: tuple[str, ...] = ("system", "user")) -> tuple[Message, ...]:
    """A conversation: roles known, turns of user and assistant taking turns, a system prompt first if at all."""
    if not _is_conversation(value):
        raise ValueError(f"{field} is not a list of messages with role and content")
    turns: list[Message] = []
    for turn in value:  # pyright: ignore[reportGeneralTypeIssues]  # a list, as was just checked
        role = turn.get("role") if isinstance(turn, Mapping) else None
        if role not in ROLES:
            raise ValueError(f"{field}: role {short(role)} is none of {', '.join(ROLES)}")
        expected = first if not turns else ("assistant",) if turns[-1]["role"] == "user" else ("user",)
        if role not in expected:
            raise ValueError(f"{field}: turn {len(turns) + 1} is the {role}'s, not the {expected[-1]}'s")
        if unread := next((name for name in UNREAD if turn.get(name)), None):
            raise ValueError(f"{field}: turn {len(turns) + 1} has {unread}, which is not read; write it into the content")
        content = turn.get("content")
        turns.append(Message(role=role, content=_text(content, f"{field}: turn {len(turns) + 1}")))
    return tuple(turns)


def _texts(value: Mapping[str, Any], field: str) -> list[str]:
    """A text or a list of texts."""
    texts = value[field] if isinstance(value[field], list) else [value[field]]
    if not texts:
        raise ValueError(f"{field} is an empty list")
    return [_text(text, field) for text in texts]


def _text(text: object, field: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{field} is not text but {short(text)}")
    if not text.strip():
        raise ValueError(f"{field} is empty")
    if _LONE_SURROGATE.search(text):
        raise ValueError(f"{field} holds half a surrogate pair, which is not valid Unicode")
    return text


def _made_id(prompt: Prompt, responses: Sequence[str], alike: Counter[str]) -> str:
    """An id from the content; rows of the same content get numbers."""
    base = draw(prompt, *responses)[:16]
    alike[base] += 1
    return base if alike[base] == 1 else f"{base}-{alike[base]}"
