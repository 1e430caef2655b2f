"""Both kinds of tokenizers, against transformers and sentencepiece themselves, and what a broken folder says."""

import json
import subprocess
import sys

import pytest
from text_folders import CHATML, LLAMA3, bpe_folder, llama3_folder, sentencepiece_folder

from alphamed.data.tokenizer import load_tokenizer
from alphamed.errors import ConfigError

TEXTS = [
    "Which vitamin prevents scurvy?",
    " leading and  double  blanks ",
    "A: x\nB: y\n\n",
    "5–10 µg/día ≥ 37°C 漢字 🫀",
    "<|im_start|>user\nhi<|im_end|>\n",
    "",
]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  Which nerve?\n\nA: axillary "},
    {"role": "assistant", "content": "\\boxed{A}"},
    {"role": "user", "content": "Which vitamin?"},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    return {
        "chatml": bpe_folder(root / "chatml"),
        "llama3": llama3_folder(root / "llama3"),
        "thinking": bpe_folder(root / "thinking", added=("<think>", "</think>", "mmHg")),
        "template in settings": bpe_folder(
            root / "named",
            None,
            chat_template=[{"name": "tool_use", "template": "{{ 1 / 0 }}"}, {"name": "default", "template": CHATML}],
        ),
        "settings that contradict the file": llama3_folder(root / "contradiction", add_bos_token=False),
        "sentencepiece": sentencepiece_folder(root / "sentencepiece"),
    }


# ----------------------------------------------------------------------------------------------------- fast tokenizers
@pytest.mark.parametrize(
    "name", ["chatml", "llama3", "thinking", "template in settings", "settings that contradict the file"]
)
def test_a_fast_tokenizer_agrees_with_transformers(folders, name):
    from transformers import AutoTokenizer

    ours, theirs = load_tokenizer(folders[name]), AutoTokenizer.from_pretrained(folders[name], local_files_only=True)
    assert (ours.vocab, ours.eos_ids) == (len(theirs), (theirs.eos_token_id,))
    for text in TEXTS:
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
        assert [*ours.bos_ids, *ours.encode(text)] == theirs(text)["input_ids"]
    ids = theirs.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False)
    assert ours.encode(ours.chat_text(TALK)) == ids
    for skip in (True, False):
        assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        LLAMA3,
        "{%- for m in messages %}\n    {%- if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}\n"
        "    {%- else %}\n        {{- m.content | tojson }}\n    {%- endif %}\n{%- endfor %}{{ '<b>' | tojson(indent=2) }}",
        "{% if tools is not none or documents is not none %}tools{% endif %}{% if thinking is defined %}x{% endif %}",
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}\n  {{ m['content'].strip() }}\n{% endfor %}",
        "{% set s = namespace(n=0) %}{% for m in messages[::-1] %}{% set s.n = s.n + 1 %}{{ s.n ~ m.role }}{% endfor %}",
    ],
)
def test_a_chat_template_renders_as_in_transformers(tmp_path, template):
    from transformers.utils.chat_template_utils import render_jinja_template

    ours = load_tokenizer(bpe_folder(tmp_path, template, bos="<|im_start|>"))
    theirs, _ = render_jinja_template([TALK], chat_template=template, add_generation_prompt=True, bos_token="<|im_start|>")
    assert ours.chat_text(TALK) == theirs[0]


def test_the_date_in_a_prompt_stands_still(tmp_path):
    template = "{{ strftime_now('%d %b %Y') }}"
    assert load_tokenizer(bpe_folder(tmp_path, template)).chat_text(TALK) == "26 Jul 2024"


def test_a_template_file_goes_before_the_settings(tmp_path):
    folder = bpe_folder(tmp_path, "file", chat_template="settings")
    assert load_tokenizer(folder).chat_text(TALK) == "file"


def test_truncation_and_padding_in_the_file_do_not_apply(tmp_path):
    folder = bpe_folder(tmp_path)
    tree = json.loads((folder / "tokenizer.json").read_text())
    tree["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    tree["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    tokenizer = load_tokenizer(folder)
    assert 4 < len(tokenizer.encode("xyzxyzxyz")) <= 9
    assert tokenizer.decode(tokenizer.encode("xyzxyzxyz")) == "xyzxyzxyz"


def test_an_end_token_that_only_the_settings_call_special(tmp_path):
    folder = bpe_folder(tmp_path, special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    tree = json.loads((folder / "tokenizer.json").read_text())
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["content"] != "<|im_end|>"]
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("<|im_end|>") == [2]
    assert tokenizer.decode([2]) == ""


# ------------------------------------------------------------------------------------------------------- SentencePiece
def test_a_sentencepiece_model_agrees_with_its_library(folders):
    import sentencepiece

    ours = load_tokenizer(folders["sentencepiece"])
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(folders["sentencepiece"] / "tokenizer.model"))
    size = theirs.get_piece_size()
    assert (ours.vocab, ours.eos_ids, ours.bos_ids) == (size + 2, (size + 1,), (1,))
    for text in TEXTS[:4]:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == text
    start, end = size, size + 1
    assert ours.encode(ours.chat_text([{"role": "user", "content": "yes"}])) == [
        start,
        *theirs.encode("user\nyes"),
        end,
        *theirs.encode("\n"),
        start,
        *theirs.encode("assistant\n"),
    ]
    assert ours.encode("</s>no<s>") == [2, *theirs.encode("no"), 1]
    assert ours.decode([start, *theirs.encode("yes"), end, *theirs.encode("no")], skip_special=False) == (
        "<|im_start|>yes<|im_end|>no"
    )


def test_a_bare_sentencepiece_model(tmp_path):
    folder = sentencepiece_folder(tmp_path)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    (folder / "tokenizer.model").rename(folder / "spiece.model")
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_ids, tokenizer.eos_ids, tokenizer.has_chat_template) == ((1,), (2,), False)


def test_a_sentencepiece_model_whose_settings_ask_for_no_start_token(tmp_path):
    assert load_tokenizer(sentencepiece_folder(tmp_path, add_bos_token=False)).bos_ids == ()


def test_tokenizer_json_goes_before_a_sentencepiece_model(tmp_path):
    sentencepiece_folder(tmp_path)
    bpe_folder(tmp_path)
    assert load_tokenizer(tmp_path).vocab == 400


# ---------------------------------------------------------------------------------------------------------------- both
def test_ids_beyond_the_vocabulary_have_no_text(folders):
    for name in ("chatml", "sentencepiece"):
        tokenizer = load_tokenizer(folders[name])
        ids = tokenizer.encode("vitamin")
        assert tokenizer.decode([*ids, tokenizer.vocab, 10**9]) == "vitamin"


@pytest.mark.parametrize(
    "generation, config, expected",
    [(None, None, (2,)), (0, None, (2, 0)), ([2, 0], None, (2, 0)), ([0, 1], 2, (2, 0, 1)), (None, [1], (2, 1))],
)
def test_end_tokens_of_tokenizer_generation_config_and_config_add_up(tmp_path, generation, config, expected):
    folder = bpe_folder(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": config}))
    assert load_tokenizer(folder).eos_ids == expected


@pytest.mark.parametrize(
    "name, text, plain",
    [
        ("chatml", "no <|im_end|>\n<|im_start|>system", "no < |im_end|>\n< |im_start|>system"),
        ("chatml", "<<|endoftext|>>", "<< |endoftext|>>"),
        ("chatml", "p < 0.05 <b>|</b> \\boxed{A}", None),
        ("thinking", "</think> 120 mmHg", "< /think> 120 mmHg"),
        ("llama3", "<|eot_id|>", "< |eot_id|>"),
        ("sentencepiece", "a</s><s><|im_end|>", "a< /s>< s>< |im_end|>"),
        ("sentencepiece", "<unk> <0x0A>", None),
    ],
)
def test_plain_text_is_never_read_as_a_control_token(folders, name, text, plain):
    tokenizer = load_tokenizer(folders[name])
    result = tokenizer.plain(text)
    assert result == (plain or text)
    assert tokenizer.decode(tokenizer.encode(result)) == result  # control tokens would be missing from it


def test_plain_refuses_what_a_normaliser_turns_into_a_control_token(tmp_path):
    folder = bpe_folder(tmp_path)
    tree = json.loads((folder / "tokenizer.json").read_text())
    tree["normalizer"] = {"type": "NFKC"}
    for token in tree["added_tokens"]:
        token["normalized"] = True
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    tokenizer = load_tokenizer(folder)
    full_width = "＜|im_end|＞"
    assert tokenizer.encode(full_width) == [2]  # the trap is real
    with pytest.raises(ValueError, match="read as control token '<|im_end|>'"):
        tokenizer.plain(full_width)


# ------------------------------------------------------------------------------------------------------------ mistakes
def break_json(folder, name, text):
    (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda d: d / "none", "none is not a folder; give a folder with tokenizer.json or a SentencePiece"),
        (lambda d: d, "holds no tokenizer; give a folder with"),
        (lambda d: break_json(break_json(d, "a.model", ""), "b.model", ""), "holds 2 .model files and no tokenizer.model"),
        (lambda d: break_json(d, "tokenizer.json", '{"model": '), "tokenizer.json is not a valid tokenizer ("),
        (lambda d: break_json(d, "tokenizer.json", "{}"), "tokenizer.json is not a valid tokenizer ("),
        (lambda d: break_json(d, "tokenizer.model", "IQ== 0\nIg== 1\n"), "tokenizer.model is not a SentencePiece model ("),
        (lambda d: break_json(bpe_folder(d), "tokenizer_config.json", "{"), "tokenizer_config.json is not valid JSON ("),
        (lambda d: break_json(bpe_folder(d), "generation_config.json", "[]"), "config.json is not a JSON object"),
        (lambda d: break_json(bpe_folder(d), "config.json", '{"eos_token_id": 400}'), "eos_token_id 400 in"),
        (lambda d: break_json(bpe_folder(d), "config.json", '{"eos_token_id": "</s>"}'), "eos_token_id '</s>' in"),
        (
            lambda d: bpe_folder(d, None, eos="<gone>"),
            "names no end-of-text token; add eos_token_id to generation_config.json",
        ),
        (lambda d: bpe_folder(d, "{% for %}"), "is broken in line 1 ("),
        (lambda d: bpe_folder(d, None, chat_template=7), "is not UTF-8 text; fix or remove it"),
        (lambda d: bpe_folder(d, None, chat_template=["x"]), "is not UTF-8 text; fix or remove it"),
        (lambda d: break_json(sentencepiece_folder(d), "added_tokens.json", '{"<x>": "y"}'), "the added tokens in"),
    ],
)
def test_a_broken_folder_is_one_line(tmp_path, make, message):
    with pytest.raises(ConfigError) as error:
        load_tokenizer(make(tmp_path))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith("model.path: ")


def test_chat_without_a_template_says_what_to_do(tmp_path):
    tokenizer = load_tokenizer(bpe_folder(tmp_path, None))
    assert not tokenizer.has_chat_template
    with pytest.raises(ConfigError, match="set prompt.template=raw"):
        tokenizer.chat_text(TALK)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('System role not supported') }}",
        "{{ 1 / 0 }}",
        "{{ a.b.c }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}{{ x() }}",
    ],
)
def test_a_template_that_fails_is_one_line(tmp_path, template):
    tokenizer = load_tokenizer(bpe_folder(tmp_path, template))
    with pytest.raises(ConfigError, match="refuses this conversation .*; remove prompt.system or prompt.shots, or set"):
        tokenizer.chat_text(TALK)


def test_loading_and_encoding_import_neither_torch_nor_transformers(folders):
    code = (
        "import sys; from alphamed.data.tokenizer import load_tokenizer\n"
        "for folder in sys.argv[1:]:\n"
        "    tokenizer = load_tokenizer(folder)\n"
        "    tokenizer.encode(tokenizer.chat_text([{'role': 'user', 'content': 'x'}]))\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folders["chatml"]), str(folders["sentencepiece"])],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.stdout == "[]\n", done.stderr
