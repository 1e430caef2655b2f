"""A language model of 80,000 parameters that can read: what the learning test trains in place of a real model.

Random weights never box a letter, so GRPO would have nothing to reward. `tiny_reader` therefore gives a Llama of two
layers some seconds of supervised lessons, in plain torch, on an invented subject in which every ailment has one remedy.
It learns how to answer: name a remedy, then box the letter under which this remedy stands this time, then end
(`remedy03 \\boxed{B}`). And it learns the remedies of the KNOWN ailments. The UNKNOWN ones come with one of their options
drawn at random, so it knows their names and that any option may be right: on them it starts from chance, and only a
reward can tell it more.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

from alphamed.config.choices import PromptTemplate
from alphamed.config.sections import PromptConfig
from alphamed.data.prompts import PromptBuilder
from alphamed.data.tokenizer import load_tokenizer
from alphamed.records import Question

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlamaForCausalLM

LETTERS = "ABCD"
REMEDIES = tuple(f"remedy{i:02d}" for i in range(16))
KNOWN = {f"ailment{i:02d}": REMEDIES[i % len(REMEDIES)] for i in range(32)}
UNKNOWN = tuple(f"riddle{i:02d}" for i in range(24))
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
EOS = SPECIAL.index("<eos>")
PROMPT = PromptConfig(template=PromptTemplate.RAW, instruction="", max_tokens=16)
"""The prompt of a question takes 12 tokens. An answer takes 3: remedy, box, end."""

BATCH = 128
LR = 3e-3
STEPS = 400
"""The lessons take about 15 s of one core. The letter of a named remedy is found after 200 steps (loss below 0.01)."""


def unknown_questions(seed: int) -> list[Question]:
    """One question on every unknown ailment. What is right is drawn here; each letter is right equally often."""
    draw = random.Random(seed)
    letters = list(LETTERS) * (len(UNKNOWN) // len(LETTERS))
    draw.shuffle(letters)
    return [
        Question(ailment, ailment, dict(zip(LETTERS, draw.sample(REMEDIES, len(LETTERS)))), letter)
        for ailment, letter in zip(UNKNOWN, letters, strict=True)
    ]


def tiny_reader(folder: Path, seed: int) -> Path:
    """Write the model that has had its lessons, and its tokenizer, into `folder` as Hugging Face has them; returns it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    words = _write_tokenizer(folder)
    torch.manual_seed(seed)
    # a small RoPE base tells neighbours apart at once: finding the letter before a word takes 200 steps instead of 1,000
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=64,
            initializer_range=0.1,
            tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 10.0},
            bos_token_id=1,
            eos_token_id=EOS,
            pad_token_id=0,
        )
    )
    _teach(model, Lessons(folder, words, seed))
    model.save_pretrained(folder)
    return folder


def _write_tokenizer(folder: Path) -> dict[str, int]:
    """A tokenizer that knows the words of this subject and no others. Returns word -> id."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    texts = [
        *SPECIAL,
        "Question:",
        "Options:",
        "Answer:",
        *(f"{letter}:" for letter in LETTERS),
        *(_box(letter) for letter in LETTERS),
        *REMEDIES,
        *KNOWN,
        *UNKNOWN,
    ]
    words = {text: i for i, text in enumerate(texts)}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    return words


def _box(letter: str) -> str:
    return f"\\boxed{{{letter}}}"


class Lessons:
    """Questions with their answers, as token ids. The prompt is rendered once, as the trainer renders it; after that only
    the words in its slots change."""

    def __init__(self, folder: Path, words: dict[str, int], seed: int):
        self._words, self._draw = words, random.Random(seed)
        options = dict(zip(LETTERS, REMEDIES))
        self._prompt = PromptBuilder(load_tokenizer(folder), PROMPT).render(Question("q", UNKNOWN[0], options, "A"))
        self._slots = [self._prompt.index(words[word]) for word in (UNKNOWN[0], *options.values())]
        assert words["<unk>"] not in self._prompt, "the prompt's template has words that the tokenizer lacks"

    @property
    def prompt_tokens(self) -> int:
        return len(self._prompt)

    def batch(self) -> Tensor:
        """[BATCH, prompt + answer] int64 token ids; half the questions are on known ailments."""
        import torch

        return torch.tensor([self._row(known=bool(i % 2)) for i in range(BATCH)])

    def _row(self, known: bool) -> list[int]:
        options = self._draw.sample(REMEDIES, len(LETTERS))
        place = self._draw.randrange(len(LETTERS))
        ailment = self._draw.choice(list(KNOWN) if known else UNKNOWN)
        if known and KNOWN[ailment] in options:
            place = options.index(KNOWN[ailment])
        elif known:
            options[place] = KNOWN[ailment]
        row = list(self._prompt)
        for slot, word in zip(self._slots, (ailment, *options)):
            row[slot] = self._words[word]
        return [*row, self._words[options[place]], self._words[_box(LETTERS[place])], EOS]


def _teach(model: LlamaForCausalLM, lessons: Lessons) -> None:
    """Cross-entropy on the answers; Adam, linear warm-up and decay."""
    import torch
    from torch.nn.functional import cross_entropy

    optimizer = torch.optim.Adam(model.parameters(), LR, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 30) * (1 - step / STEPS))
    for _ in range(STEPS):
        tokens = lessons.batch()
        logits = model(input_ids=tokens[:, :-1]).logits[:, lessons.prompt_tokens - 1 :]
        loss = cross_entropy(logits.flatten(0, 1), tokens[:, lessons.prompt_tokens :].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
