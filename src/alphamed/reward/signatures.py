"""How a user's reward function is called: the arguments by name, of this project and of reward functions of verl and TRL.

Shared by the trainer, which fills in the arguments, and the process that calls the function. It imports neither pydantic nor
the rest of the package, so that a grader starts at once.
"""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alphamed.data.chat_template import Message

Arguments = dict[str, Any]
"""Name -> value, JSON-able."""


@dataclass(frozen=True, slots=True)
class Call:
    """One response to be graded. `question` holds the fields of `records.Question`; `answer_text` is the part of `text` that
    decides, "" where thinking never ended; `prompt` is the conversation (a list of messages) or the prompt's text."""

    question: Mapping[str, Any]
    text: str
    letter: str | None
    answer_text: str
    prompt: Sequence[Message] | str


@dataclass(frozen=True, slots=True)
class Signature:
    """`meanings`: every argument that a function may take, in words. `arguments` makes them of a call, `number` takes the
    reward out of what the function returned (TypeError where it holds none)."""

    meanings: Mapping[str, str]
    arguments: Callable[[Call], Arguments]
    number: Callable[[Any], Any]


# ------------------------------------------------------------------------------------------------------------ this project
def _alphamed(call: Call) -> Arguments:
    return {"question": dict(call.question), "text": call.text, "letter": call.letter, "answer_text": call.answer_text}


def _as_it_is(value: Any) -> Any:
    return value


# -------------------------------------------------------------------------------------------------------------------- verl
def _verl(call: Call) -> Arguments:
    question = call.question
    return {
        "data_source": question["source"] or "",
        "solution_str": call.text,
        "ground_truth": question["answer"],
        "extra_info": {
            "index": question["id"],
            "question": question["question"],
            "options": dict(question["options"]),
            "context": question["context"],
            "level": question["level"],
        },
    }


def _score(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    if "score" not in value:
        raise TypeError(f"the reward function returned {value!r:.200}, a dict without 'score'")
    return value["score"]


# --------------------------------------------------------------------------------------------------------------------- TRL
def _trl(call: Call) -> Arguments:
    if isinstance(call.prompt, str):
        prompt, completion = call.prompt, call.text
    else:
        prompt = [dict(message) for message in call.prompt]
        completion = [{"role": "assistant", "content": call.text}]
    return {"prompts": [prompt], "completions": [completion]} | {
        name: [dict(value) if isinstance(value, Mapping) else value] for name, value in call.question.items()
    }


def _only(value: Any) -> Any:
    if isinstance(value, str | Mapping) or not hasattr(value, "__len__") or len(value) != 1:
        raise TypeError(f"the reward function returned {value!r:.200}, not a list of one number for one completion")
    return value[0]


SIGNATURES: dict[str, Signature] = {
    "alphamed": Signature(
        {
            "question": "the question as a dict: id, question, options, answer (the right letter), context, source, level",
            "text": "the response",
            "letter": "the letter that its last box states, or None",
            "answer_text": "the part of the response that decides, what follows the thinking",
        },
        _alphamed,
        _as_it_is,
    ),
    "verl": Signature(
        {
            "data_source": "the question's source",
            "solution_str": "the response",
            "ground_truth": "the right letter",
            "extra_info": "a dict: index, question, options, context, level",
        },
        _verl,
        _score,
    ),
    "trl": Signature(
        {
            "prompts": "a list of one prompt",
            "completions": "a list of one response",
            "id": "column",
            "question": "column",
            "options": "column",
            "answer": "column: the right letter",
            "context": "column",
            "source": "column",
            "level": "column, each a list of one value",
        },
        _trl,
        _only,
    ),
}
"""The values of `reward.signature`."""


class Refused(Exception):
    """A function that cannot be called with the arguments there are; the message names what it takes and what there is."""


@dataclass(frozen=True, slots=True)
class Binding:
    """A function with the names of the arguments that it is given: some by position (`def f(text, /)`), the rest by name."""

    function: Callable[..., Any]
    positional: tuple[str, ...]
    named: tuple[str, ...]
    signature: Signature

    def reward(self, arguments: Arguments) -> float:
        """Call the function. Raises what it raises, and TypeError where it returns no finite number."""
        value = self.signature.number(
            self.function(*(arguments[name] for name in self.positional), **{name: arguments[name] for name in self.named})
        )
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise TypeError(f"the reward function returned {value!r:.200}, not a finite number")
        return float(value)


def bind(function: Callable[..., Any], signature: str) -> Binding:
    """Find out which of a signature's arguments the function takes. Raises Refused."""
    chosen = SIGNATURES[signature]
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        raise Refused("does not say which arguments it takes; call it from a function of your own (def ...)") from None
    positional, named, unknown = _sorted_out(parameters, chosen.meanings)
    if not unknown and (positional or named):
        return Binding(function, tuple(positional), tuple(named), chosen)
    other = next((name for name in SIGNATURES if name != signature and _looks_like(parameters, name)), None)
    hint = (
        (
            f"these are the arguments of a reward function of {'this project' if other == 'alphamed' else other}: set "
            f"reward.signature={other}"
        )
        if other
        else "rename its parameters, or give those without a value here a default"
    )
    problem = f"there is no {', '.join(unknown)}" if unknown else "it takes none of the arguments"
    there = "; ".join(f"{name} ({meaning})" for name, meaning in chosen.meanings.items())
    raise Refused(
        f"takes {inspect.signature(function)}, but {problem}: arguments go by name, and with reward.signature "
        f"{signature} there are {there}; {hint}"
    )


def _sorted_out(parameters: Collection[inspect.Parameter], known: Collection[str]) -> tuple[list[str], list[str], list[str]]:
    """Names of arguments passed by position, of those passed by name, and of parameters that would get no value."""
    positional: list[str] = []
    named: list[str] = []
    unknown: list[str] = []
    rest = False
    for parameter in parameters:
        if parameter.kind == parameter.VAR_KEYWORD:
            rest = True
        elif parameter.kind == parameter.VAR_POSITIONAL:
            continue
        elif parameter.name not in known:
            if parameter.default is parameter.empty:
                unknown.append(parameter.name)
        elif parameter.kind == parameter.POSITIONAL_ONLY:
            positional.append(parameter.name)
        else:
            named.append(parameter.name)
    return positional, [name for name in known if name not in positional] if rest else named, unknown


def _looks_like(parameters: Collection[inspect.Parameter], signature: str) -> bool:
    """Whether the parameters are named as those of another signature: all that need a value, and one at least."""
    positional, named, unknown = _sorted_out(
        [parameter for parameter in parameters if parameter.kind != parameter.VAR_KEYWORD], SIGNATURES[signature].meanings
    )
    return not unknown and bool(positional or named)
