"""Turns a question into the token ids of its prompt: the one place that training and evaluation share.

The template is AlphaMed's (arXiv 2505.17952): question, lettered options (each written by `prompt.option_format`),
instruction. With `prompt.template: chat` it is the last user turn of a conversation in the model's own chat template, worked
examples are earlier turns. With `raw` (base models without a chat template) all of it is one text that ends with "Answer:".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from alphamed.config.choices import PromptTemplate
from alphamed.config.sections import PromptConfig
from alphamed.data.chat_template import Message
from alphamed.data.mcq import short
from alphamed.data.tokenizer import CONTENT, Tokenizer
from alphamed.errors import ConfigError, DataError
from alphamed.records import Question


@dataclass(frozen=True, slots=True)
class LongPrompt:
    """A question whose prompt takes more tokens than `prompt.max_tokens`."""

    question_id: str
    tokens: int
    limit: int


class PromptBuilder:
    """Renders questions for one tokenizer. Raises ConfigError at once where it cannot render this configuration."""

    def __init__(self, tokenizer: Tokenizer, config: PromptConfig):
        self._tokenizer = tokenizer
        self._config = config
        if config.template == PromptTemplate.CHAT and not tokenizer.has_chat_template:
            raise ConfigError(
                f"prompt.template: chat needs a chat template, which {tokenizer.folder} has not; set prompt.template=raw"
            )
        if config.template == PromptTemplate.RAW and config.template_variables:
            raise ConfigError(
                f"prompt.template_variables: {config.template_variables!r} has no effect with "
                f"prompt.template=raw; remove it or set prompt.template=chat"
            )
        if config.template == PromptTemplate.CHAT:
            self._require_kept()
        tokenizer.require_known(self._ids(self._assemble("Question")))  # those that the template itself writes

    def _require_kept(self) -> None:
        """Raises ConfigError where the chat template refuses a system prompt or an example, or leaves it out in silence."""
        text, shots = _squeezed(self._assemble(CONTENT["user", 0])), self._config.shots
        for field, content in (
            ("prompt.system", self._config.system or ""),
            ("the question", CONTENT["user", 0]),
            *((f"prompt.shots.{i}.question", shot.question) for i, shot in enumerate(shots)),
            *((f"prompt.shots.{i}.response", shot.response) for i, shot in enumerate(shots)),
        ):
            if _squeezed(content) not in text:
                raise ConfigError(
                    f"{field}: the chat template of {self._tokenizer.folder} leaves it out, or a part of it; "
                    f"{'' if field == 'the question' else 'remove it or '}set prompt.template=raw"
                )

    def text(self, question: Question) -> str:
        """The whole prompt as text, control tokens of the chat template included. Raises DataError (see `render`)."""
        block = _block(self._config, question.question, question.options, question.context)
        try:
            plain = self._tokenizer.plain(block)
        except ValueError as e:
            raise DataError(f"question {short(question.id)}: {e}") from None
        return self._assemble(plain)

    def render(self, question: Question) -> tuple[int, ...]:
        """Token ids of the prompt.

        Text of the question cannot become control tokens: where it spells one it is broken up (`Tokenizer.plain`);
        DataError in the odd case that this fails. Instruction and worked examples are the user's own and stay as
        they are. DataError, too, where the prompt holds an id that the model has not.
        """
        ids = self._ids(self.text(question))
        try:
            self._tokenizer.require_known(ids)
        except ConfigError as error:
            raise DataError(f"question {short(question.id)}: {error}") from None
        return ids

    def _ids(self, text: str) -> tuple[int, ...]:
        ids = self._tokenizer.encode(text)
        if self._config.template == PromptTemplate.RAW:  # a chat template writes its own start token
            return (*self._tokenizer.bos_ids, *ids)
        return tuple(ids)

    def check_lengths(self, questions: Iterable[Question]) -> list[LongPrompt]:
        """The questions whose prompts are longer than `prompt.max_tokens`, in whatever order their options stand."""
        limit = self._config.max_tokens
        sizes = ((question, self._longest(question)) for question in questions)
        return [LongPrompt(question.id, tokens, limit) for question, tokens in sizes if tokens > limit]

    def require_lengths(self, questions: Iterable[Question]) -> None:
        """Raises DataError naming the longest prompt where `check_lengths` finds any."""
        too_long = self.check_lengths(questions)
        if not too_long:
            return
        longest = max(too_long, key=lambda prompt: prompt.tokens)
        others = f" ({len(too_long)} prompts are too long)" if len(too_long) > 1 else ""
        raise DataError(
            f"question {short(longest.question_id)}: its prompt takes {longest.tokens} tokens, "
            f"prompt.max_tokens is {longest.limit}{others}; raise it or leave such questions out"
        )

    def _assemble(self, block: str) -> str:
        """The prompt around the block of one question."""
        asked = _assembled(self._config, block)
        if isinstance(asked, str):
            return asked
        return self._tokenizer.chat_text(asked, self._config.template_variables)

    def _longest(self, question: Question) -> int:
        """Tokens of the prompt. Close to the limit, the most that any turn of its options takes: another text before
        the line break can merge differently, by a token or so."""
        tokens, letters = len(self.render(question)), list(question.options)
        if abs(tokens - self._config.max_tokens) > len(letters):
            return tokens
        texts = list(question.options.values())
        turns = (dict(zip(letters, texts[i:] + texts[:i])) for i in range(1, len(texts)))
        return max([tokens, *(len(self.render(replace(question, options=options))) for options in turns)])


def _squeezed(text: str) -> str:
    """`text` without blanks and line breaks."""
    return "".join(text.split())


# --------------------------------------------------------------------------------------------------------- the template
def asked_of_model(config: PromptConfig, question: Question) -> list[Message] | str:
    """What a question is asked with: the conversation that a chat template renders, or the text of a raw prompt."""
    return _assembled(config, _block(config, question.question, question.options, question.context))


def user_turn(config: PromptConfig, question: Question) -> str:
    """A question as the user's turn asks it, without system prompt and worked examples."""
    return _ask(config, _block(config, question.question, question.options, question.context))


def _assembled(config: PromptConfig, block: str) -> list[Message] | str:
    """Everything around the block of one question."""
    shots = [(_ask(config, _block(config, shot.question, shot.options)), shot.response) for shot in config.shots]
    if config.template == PromptTemplate.CHAT:
        messages = [Message(role="system", content=config.system)] if config.system else []
        for user, assistant in shots:
            messages += [Message(role="user", content=user), Message(role="assistant", content=assistant)]
        return [*messages, Message(role="user", content=_ask(config, block))]
    parts = [config.system] if config.system else []
    parts += [f"{user}\n\nAnswer: {response}" for user, response in shots]
    return "\n\n".join([*parts, f"{_ask(config, block)}\n\nAnswer:"])


def _block(config: PromptConfig, question: str, options: Mapping[str, str], context: str | None = None) -> str:
    lines = "\n".join(config.option_format.format(letter=letter, text=text) for letter, text in options.items())
    front = f"Context: {context}\n\n" if context else ""
    return f"{front}Question: {question}\n\nOptions:\n{lines}" if options else f"{front}Question: {question}"


def _ask(config: PromptConfig, block: str) -> str:
    return f"{block}\n\n{config.instruction}" if config.instruction else block
