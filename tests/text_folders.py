"""Small trained tokenizers as model folders, for the tests of everything that turns text into ids."""

from __future__ import annotations

import json
from pathlib import Path

CORPUS = [
    "Question: Which vitamin prevents scurvy? Options: A: Vitamin A B: Vitamin C C: Vitamin D D: Vitamin K",
    "Please reason step by step, and put the final answer in \\boxed{}. The answer is \\boxed{B}.",
    "Context: The user was given an antidote. Which nerve supplies the deltoid muscle? The axillary nerve.",
    "The assistant answers questions about hormones, pathogens, drugs, muscles, vessels and markers.",
    "None of the above. All of the above. Both A and B. yes no maybe",
] * 4

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Llama-3 style: the template writes the start token itself and trims contents
LLAMA3 = (
    "{{- bos_token }}{% for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def bpe_folder(
    folder: Path,
    template: str | None = CHATML,
    *,
    special: tuple[str, ...] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    added: tuple[str, ...] = (),
    bos: str | None = None,
    eos: str = "<|im_end|>",
    words: bool = True,
    **settings,
) -> Path:
    """A byte-level BPE of 400 ids. `special` come first (0, 1, ...), `added` (not special) last. With `bos` the
    tokenizer's own file puts that token in front of every text, as Llama 3's does. Without `words` tokens may reach
    over blanks and line ends."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=list(special),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    core.add_tokens([AddedToken(text, normalized=False) for text in added])
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
        )
    folder.mkdir(parents=True, exist_ok=True)
    core.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def llama3_folder(folder: Path, **settings) -> Path:
    """A folder that behaves like Llama 3: a start token from the tokenizer's file and one from the chat template."""
    special = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    return bpe_folder(folder, LLAMA3, special=special, bos="<|begin_of_text|>", eos="<|eot_id|>", **settings)


def sentencepiece_folder(folder: Path, template: str | None = CHATML, **settings) -> Path:
    """A SentencePiece unigram model with byte fallback: 0 <unk>, 1 <s>, 2 </s>, about 350 ids in all. The two ids after
    its own are ChatML's tokens, added in tokenizer_config.json."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(CORPUS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    size = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).get_piece_size()
    corpus.unlink()
    (folder / "tokenizer.vocab").unlink()
    added = {str(size): {"content": "<|im_start|>"}, str(size + 1): {"content": "<|im_end|>"}}
    settings = {"added_tokens_decoder": added, "eos_token": "<|im_end|>", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return folder
