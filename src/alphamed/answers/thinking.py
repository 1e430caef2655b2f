r"""Which part of a response holds its answer: for a model that thinks first, what follows the end of its thinking.

A box inside `<think> ... </think>` is a draft and decides nothing. Pure: imports neither torch nor a tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from alphamed.records import Question

AUTO = "auto"
"""`reward.answer_after` that is derived from the model's folder."""
THINK_END = "</think>"
SAMPLE = Question("sample", "Which organ makes bile?", {"A": "Liver", "B": "Spleen"}, "A")
"""A made-up question, for trials before there is a real one."""


class Tokens(Protocol):
    """What is needed of a tokenizer (`data.tokenizer.Tokenizer`)."""

    def writes(self, text: str) -> bool: ...


class PromptRenderer(Protocol):
    """What is needed of a prompt builder (`data.prompts.PromptBuilder`)."""

    def text(self, question: Question) -> str: ...


@dataclass(frozen=True, slots=True)
class Thinking:
    """`end` is the text that ends the thinking; "": the model does not think, the whole response decides. `opened`: the
    prompt ends inside the thinking, so that responses begin there."""

    end: str = ""
    opened: bool = False

    @classmethod
    def of(cls, setting: str | None, tokenizer: Tokens, prompts: PromptRenderer) -> Thinking:
        """What `reward.answer_after` means for a model and its prompts."""
        end = end_of_thinking(setting, tokenizer)
        begin = begin_of(end)
        return cls(end, bool(begin) and prompts.text(SAMPLE).rstrip().endswith(begin))

    @classmethod
    def of_texts(cls, setting: str | None, texts: list[str]) -> Thinking:
        """The same from recorded responses, where the model's folder is not at hand: a marker that some of them hold, opened
        by the prompt where none of them opens it."""
        end = THINK_END if setting == AUTO else setting or ""
        begin, closed = begin_of(end), any(end in text for text in texts)
        opened = closed and bool(begin) and not any(begin in text for text in texts)
        return cls(end if closed or setting != AUTO else "", opened)

    def answer(self, text: str) -> str | None:
        """The part of a response that states its answer: what follows the last `end`. None where thinking began and did not
        end; the whole text where it never began."""
        if not self.end:
            return text
        begin, (_, ended, rest) = begin_of(self.end), text.rpartition(self.end)
        if begin and begin in rest or not ended and (self.opened or not begin):
            return None
        return rest

    def example(self, answer: str) -> str:
        """A response with this answer as the model would write it."""
        begin = "" if self.opened else begin_of(self.end)
        return f"{begin}\nThe liver makes bile.\n{self.end}\n\n{answer}" if self.end else answer


def end_of_thinking(setting: str | None, tokenizer: Tokens) -> str:
    """The text of `reward.answer_after`; "" where the whole response is the answer."""
    if setting == AUTO:
        return THINK_END if tokenizer.writes(THINK_END) else ""
    return setting or ""


def begin_of(end: str) -> str:
    """The tag that `end` closes: `<think>` for `</think>`, `[THINK]` for `[/THINK]`. "" for a marker that is no closing
    tag: a response without such a marker has no answer."""
    return end.replace("/", "", 1) if "/" in end else ""
