"""Examples -> token ids: the prompt as reinforcement learning renders it, each response with the token that ends it.

A response is tokenized by itself behind the prompt's tokens, as an engine would have generated it, so that what supervised
training teaches is what sampling meets.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from alphamed.answers.thinking import begin_of, end_of_thinking
from alphamed.config.choices import BadRows, LossOn, PromptTemplate
from alphamed.config.schema import Config
from alphamed.data.chat_template import Message
from alphamed.data.examples import Example, LoadedExamples, load_examples, usable
from alphamed.data.mcq import RowProblem
from alphamed.data.prompts import PromptBuilder
from alphamed.data.tokenizer import Tokenizer
from alphamed.errors import ConfigError, DataError
from alphamed.records import Question

FEWEST_PROMPT_TOKENS = 2
"""Of a prompt: its last token begins the responses, and a segment of a packed row holds one before it (batching.py)."""


@dataclass(frozen=True, slots=True)
class TokenExample:
    """An example as token ids. `trained` says for each token of each response whether it has a loss."""

    prompt: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]
    trained: tuple[tuple[bool, ...], ...]


class ExampleEncoder:
    """Tokenizes examples for one tokenizer and one configuration, within the limits of RL: prompt.max_tokens and
    rollout.max_response_tokens."""

    def __init__(self, tokenizer: Tokenizer, prompts: PromptBuilder, config: Config):
        assert config.sft is not None, "the configuration has no section sft"
        self._tokenizer, self._prompts, self._config = tokenizer, prompts, config
        self._every_turn = config.sft.loss_on == LossOn.ASSISTANT_TURNS
        self._chat = config.prompt.template == PromptTemplate.CHAT
        turn_end = tokenizer.turn_end if self._chat else None
        self._end = turn_end if turn_end is not None else tokenizer.eos_ids[0]
        self._think_end = end_of_thinking(config.reward.answer_after, tokenizer)

    def encode(self, example: Example) -> TokenExample:
        """Raises DataError where the example cannot be rendered or is too long."""
        try:
            tokens = self._encode(example)
            self._require_lengths(tokens)
        except (ConfigError, ValueError) as error:
            raise DataError(f"{example.place[0]}:{example.place[1]}: {_problem(error)}") from None
        return tokens

    def problems(self, examples: Iterable[Example]) -> dict[str, RowProblem]:
        """What is wrong with examples, by id: those that cannot be rendered, or are too long."""
        wrong = {}
        for example in examples:
            try:
                self._require_lengths(self._encode(example))
            except (ConfigError, ValueError) as error:
                wrong[example.id] = RowProblem(*example.place, _problem(error))
        return wrong

    def _encode(self, example: Example) -> TokenExample:
        prompt = example.prompt
        if isinstance(prompt, Question):
            return self._after(self._prompts.text(prompt), self._prompts.render(prompt), example.responses)
        if isinstance(prompt, str) and not self._chat:
            text = self._tokenizer.plain(prompt)
            return self._after(text, (*self._tokenizer.bos_ids, *self._tokenizer.encode(text)), example.responses)
        turns = (Message(role="user", content=prompt),) if isinstance(prompt, str) else prompt
        if not self._chat:
            raise ValueError("messages need prompt.template=chat")
        turns = self._with_system(turns)
        if self._every_turn and any(turn["role"] == "assistant" for turn in turns):
            return self._conversation(turns, example.responses)
        for turn in turns:
            if turn["role"] == "assistant":
                self._require_text(turn["content"])
        text = self._chat_text(turns)
        return self._after(text, self._tokenizer.encode(text), example.responses)

    def _with_system(self, turns: Sequence[Message]) -> list[Message]:
        """The conversation with prompt.system, where it has none of its own; what others wrote cannot hold control tokens."""
        system = self._config.prompt.system
        front = [Message(role="system", content=system)] if system and turns[0]["role"] != "system" else []
        return front + [
            turn
            if turn["role"] == "assistant"
            else Message(role=turn["role"], content=self._tokenizer.plain(turn["content"]))
            for turn in turns
        ]

    def _chat_text(self, turns: Sequence[Message]) -> str:
        return self._tokenizer.chat_text(turns, self._config.prompt.template_variables)

    def _after(self, text: str, prompt: Sequence[int], responses: Sequence[str]) -> TokenExample:
        """Responses behind a prompt, given as text and as ids."""
        self._tokenizer.require_known(prompt)
        self._require_thinking(text, responses)
        ids = [self._response(text) for text in responses]
        return TokenExample(tuple(prompt), tuple(ids), tuple((True,) * len(response) for response in ids))

    def _response(self, text: str) -> tuple[int, ...]:
        """A response's ids with the token that ends it."""
        self._require_text(text)
        ids = (*self._tokenizer.encode(text), self._end)
        self._tokenizer.require_known(ids)
        return ids

    def _require_text(self, text: str) -> None:
        """Raises ValueError where a text of the assistant's, earlier or to be trained on, would end its turn itself."""
        if hidden := self._tokenizer.hidden_in(text):
            raise ValueError(f"a response holds the control token {hidden!r}; remove it, the end of a turn is added here")

    def _require_thinking(self, prompt: str, responses: Iterable[str]) -> None:
        """Raises ValueError where a prompt has begun the thinking and a response begins it again, or does not end it: sampled
        like that no response would ever be graded."""
        begin = begin_of(self._think_end)
        if not begin or not prompt.rstrip().endswith(begin):
            return
        for response in responses:
            if begin in response:
                raise ValueError(
                    f"a response holds {begin}, with which its prompt ends already; leave it out of the response"
                )
            if self._think_end not in response:
                raise ValueError(
                    f"its prompt ends with {begin}, but a response holds no {self._think_end}; end the thinking there"
                )

    def _conversation(self, turns: Sequence[Message], responses: Sequence[str]) -> TokenExample:
        """A conversation in which every assistant turn has a loss: what comes before the first is the prompt, the rest
        belongs to each response. With several responses the earlier turns are trained on once, in the first."""
        end_text = self._tokenizer.decode([self._end], skip_special=False)
        places = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        text = self._chat_text(turns[: places[0]])
        prompt, history, trained = tuple(self._tokenizer.encode(text)), [], []
        for place, following in zip(places, [*places[1:], len(turns)]):
            content = turns[place]["content"]
            self._require_thinking(text, [content])
            longer = self._chat_text(turns[:following])
            written = text + content + end_text
            if not longer.startswith(written):
                raise ValueError(
                    "the chat template does not write earlier turns of the assistant as they are; set sft.loss_on=responses"
                )
            spoken, heard = self._response(content), self._tokenizer.encode(longer.removeprefix(written))
            history += [*spoken, *heard]
            trained += [True] * len(spoken) + [False] * len(heard)
            text = longer
        self._require_thinking(text, responses)
        ids = [self._response(response) for response in responses]
        marks = [trained if first else [False] * len(trained) for first in (True, *[False] * (len(ids) - 1))]
        return TokenExample(
            prompt,
            tuple((*history, *response) for response in ids),
            tuple((*mark, *(True,) * len(response)) for mark, response in zip(marks, ids)),
        )

    def _require_lengths(self, tokens: TokenExample) -> None:
        if len(tokens.prompt) < FEWEST_PROMPT_TOKENS:
            raise ValueError(f"its prompt takes {len(tokens.prompt)} token, at least {FEWEST_PROMPT_TOKENS} are needed")
        longest = max(map(len, tokens.responses))
        for setting, length, limit in (
            ("prompt.max_tokens", len(tokens.prompt), self._config.prompt.max_tokens),
            ("rollout.max_response_tokens", longest, self._config.rollout.max_response_tokens),
        ):
            if length > limit:
                part = setting.partition(".")[0].replace("rollout", "response")
                raise ValueError(f"its {part} takes {length} tokens, {setting} is {limit}; raise it or leave such rows out")


def _problem(error: Exception) -> str:
    """As a row's problem: what a question's own check has put in front says nothing here."""
    return " ".join(str(error).split())


def load_usable(config: Config, encoder: ExampleEncoder, check: bool = True) -> LoadedExamples:
    """The examples of data.train that can be trained on. With `check`, or where bad rows are skipped, each is tokenized to
    see that. Raises DataError."""
    assert config.sft is not None
    loaded = load_examples(config.data.train, config.data.bad_rows, config.sft.response_format)
    if not check and config.data.bad_rows == BadRows.REFUSE:
        return loaded
    wrong = encoder.problems(loaded.examples)
    left = (example for example in loaded.examples if example.id not in wrong)
    return usable(left, [*loaded.skipped, *wrong.values()], config.data.bad_rows)
