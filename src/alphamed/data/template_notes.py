"""What a chat template does to a conversation besides formatting it, detected by rendering probes and comparing.

Text that it adds becomes a note, a change to a message's text a warning. A template that drops a message of the
configuration is refused (`prompts.PromptBuilder`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from alphamed.config.sections import PromptConfig
from alphamed.data.chat_template import TEMPLATE_DATE, Message
from alphamed.data.tokenizer import CONTENT, Tokenizer
from alphamed.errors import ConfigError

CASE = "capital letters"
PROBES: Mapping[str, str] = {
    "leading white space": "\n   Which one",
    "trailing white space": "Which one   \n",
    "several spaces in a row": "Which   one",
    "empty lines": "Which\n\n\none",
    "the characters < > & \" '": "p < 0.05 & \"q\" > 'r'",
    CASE: "Which ONE",
    "characters beyond ASCII": "5 µg ≥ 3 µg",
    "backslashes and braces": "in\\boxed{A}",
    "text before </think>": "Which </think> one",
}
"""What a template may change -> a text that shows it. None has a control token."""
MAX_SHOWN = 200


@dataclass(frozen=True, slots=True)
class Remarks:
    """`notes`: what is worth knowing; `warnings`: what is likely to be a mistake."""

    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """One line each, as they are printed."""
        return [*(f"warning: {text}" for text in self.warnings), *(f"note: {text}" for text in self.notes)]


def template_remarks(tokenizer: Tokenizer, prompt: PromptConfig) -> Remarks:
    """What the chat template adds to the conversations of this configuration and changes in their questions."""
    notes, warnings = [], []
    changed = [name for name in PROBES if not _is_unchanged(tokenizer, prompt, name)]
    if changed:
        warnings.append(f"the chat template drops or changes {', '.join(changed)} of a message")
    if tokenizer.turn_end is None:
        end = _shown(tokenizer.after_content()) if tokenizer.after_content() else "nothing that could be detected"
        ends = ", ".join(repr(tokenizer.decode([i], skip_special=False)) for i in tokenizer.stop_ids())
        warnings.append(
            f"the chat template ends an assistant's turn with {end}, which is no control token: only {ends} "
            f"ends a response; name another token in rollout.stop if the model writes one"
        )
    before, opening = _added(tokenizer, prompt)
    if before:
        notes.append(f"the chat template writes text before the first message: {_shown(before)}")
    if opening:
        notes.append(f"the chat template begins every response with {_shown(opening)}, which belongs to the prompt")
    for name, value in prompt.template_variables.items():
        if _same_without(tokenizer, prompt, name):
            notes.append(f"prompt.template_variables: {name}: {value!r} changes nothing in a prompt")
    if tokenizer.template_writes_date:
        notes.append(
            f"the chat template asks for today's date; it is always given {TEMPLATE_DATE.isoformat()}, so that "
            f"prompts stay the same"
        )
    return Remarks(tuple(notes), tuple(warnings))


def _same_without(tokenizer: Tokenizer, prompt: PromptConfig, name: str) -> bool:
    """Whether prompts are the same without a template variable: it has its default, or a text where the template compares
    with true or false."""
    others = {key: value for key, value in prompt.template_variables.items() if key != name}
    talk = [CONTENT["user", 0], CONTENT["assistant", 0], CONTENT["user", 1]]
    plain = prompt.model_copy(update={"template_variables": others})
    return all(_render(tokenizer, prompt, part) == _render(tokenizer, plain, part) for part in (talk[:1], talk))


def _is_unchanged(tokenizer: Tokenizer, prompt: PromptConfig, name: str) -> bool:
    """Whether a message comes through as it is, as far as the probe of that name shows."""
    probe, text = _plain(tokenizer, PROBES[name]), _render(tokenizer, prompt, [PROBES[name]])
    return probe in text if name == CASE else probe.lower() in text.lower()


def _added(tokenizer: Tokenizer, prompt: PromptConfig) -> tuple[str, str]:
    """What the template itself writes before the first message, and at the beginning of a response; control tokens and the
    names of roles are its layout and do not count."""
    first, answer, last = CONTENT["user", 0], CONTENT["assistant", 0], CONTENT["user", 1]
    text = _render(tokenizer, prompt, [first, answer, last])
    if not 0 <= text.find(first) < text.find(answer) < text.find(last):
        return "", ""
    between, after = text.partition(first)[2].partition(answer)[0], text.partition(last)[2]
    start = tokenizer.without_control(text.partition(prompt.system or first)[0])
    wrap = tokenizer.without_control(text.partition(answer)[2].partition(last)[0])  # precedes every message of a user
    if not prompt.system:
        start = start[: len(start) - _common(start[::-1], wrap[::-1])]
    preamble = re.sub(r"^\s*(system|user|human)\b:?\s*", "", start)
    opening = after[_common(after, between) :]
    return preamble.strip(), opening.strip()


def _render(tokenizer: Tokenizer, prompt: PromptConfig, contents: Sequence[str]) -> str:
    """The conversation of the system prompt and these messages, of user and assistant in turns; empty where the template
    refuses it (which is reported where it matters)."""
    messages = [Message(role="system", content=prompt.system)] if prompt.system else []
    messages += [
        Message(role="assistant" if i % 2 else "user", content=_plain(tokenizer, content))
        for i, content in enumerate(contents)
    ]
    try:
        return tokenizer.chat_text(messages, prompt.template_variables)
    except ConfigError:
        return ""


def _plain(tokenizer: Tokenizer, text: str) -> str:
    """The text as the template gets it in a question."""
    return tokenizer.plain(text)


def _common(first: str, second: str) -> int:
    """Length of the common prefix."""
    return next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))


def _shown(text: str) -> str:
    return repr(text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "...")
