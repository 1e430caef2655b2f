"""What a chat template adds, changes or leaves out, found by rendering it, and the token with which it ends a turn."""

import pytest
from text_folders import CHATML, LLAMA3, bpe_folder, llama3_folder, sentencepiece_folder

from alphamed.config.sections import PromptConfig, Shot
from alphamed.data.prompts import PromptBuilder
from alphamed.data.template_notes import template_remarks
from alphamed.data.tokenizer import load_tokenizer
from alphamed.errors import ConfigError

SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Tiny, made by nobody.<|im_end|>\n{% endif %}"
THINKING = CHATML + ("{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}")
OPENED = CHATML + "<think>\n"
DATED = (
    "{% set day = strftime_now('%d %b %Y') %}<|im_start|>system\nToday is {{ day }}."
    "{% if messages[0].role == 'system' %}\n{{ messages[0].content }}{% set messages = messages[1:] %}{% endif %}"
    "<|im_end|>\n{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
NO_SYSTEM = (
    "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
ANSWERS_ONLY = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and '</think>' in m.content %}"
    "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
LAST_ONLY = "<|im_start|>user\n{{ messages[-1].content }}<|im_end|>\n<|im_start|>assistant\n"
PLAIN = (
    "A chat between a student and a teacher.\n\n{% for m in messages %}{{ {'user': 'USER', 'assistant': 'TEACHER', "
    "'system': 'SYSTEM'}[m.role] }}: {{ m.content }}\n{% endfor %}TEACHER:"
)
SHOT = Shot(question="Is water wet?", options={"A": "yes", "B": "no"}, response="<think>It wets.</think>\n\n\\boxed{A}")


def tokenizer_of(tmp_path, template, **settings):
    settings = {"added": ("<think>", "</think>")} | settings
    return load_tokenizer(bpe_folder(tmp_path, template, **settings))


def remarks(tmp_path, template, **prompt):
    return template_remarks(tokenizer_of(tmp_path, template), PromptConfig(**prompt))


# -------------------------------------------------------------------------------------------------------- the end of a turn
@pytest.mark.parametrize(
    "template, eos, expected",
    (
        (CHATML, "<|im_end|>", (2,)),
        (CHATML, "<|endoftext|>", (0, 2)),
        (CHATML.replace("<|im_end|>", ""), "<|endoftext|>", (0, 1)),  # the next turn's start is where a turn ends
        (CHATML.replace("'<|im_end|>'", "eos_token"), "<|endoftext|>", (0,)),
        (PLAIN, "<|endoftext|>", (0,)),
        (None, "<|endoftext|>", (0,)),
        ("{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}" + CHATML, "<|endoftext|>", (0,)),
    ),
)
def test_what_follows_an_assistants_content_ends_a_response(tmp_path, template, eos, expected):
    tokenizer = tokenizer_of(tmp_path, template, eos=eos)
    assert tokenizer.eos_ids == expected and tokenizer.stop_ids() == expected


def test_ends_of_turns_in_other_tokenizers(tmp_path):
    """Llama 3 trims contents; a SentencePiece model's added tokens come after its own."""
    assert load_tokenizer(llama3_folder(tmp_path / "a")).turn_end == 4
    pieces = load_tokenizer(sentencepiece_folder(tmp_path / "b", eos_token="</s>"))
    assert pieces.eos_ids == (2, pieces.vocab - 1) and pieces.decode([pieces.vocab - 1], skip_special=False) == "<|im_end|>"


def test_further_tokens_that_end_a_response(tmp_path):
    tokenizer = tokenizer_of(tmp_path, CHATML, added=("</answer>",))
    (answer,) = tokenizer.encode("</answer>")
    (vitamin,) = tokenizer.encode("Vitamin")
    assert tokenizer.stop_ids(["</answer>", "<|endoftext|>", "<|im_end|>", "Vitamin"]) == (2, answer, 0, vitamin)
    for text, tokens in (("</answer>\n</answer>", 3), ("\u00b5\u00b5", 4)):
        with pytest.raises(ConfigError) as error:
            tokenizer.stop_ids([text])
        assert str(error.value).startswith(f"rollout.stop: {text!r} takes {tokens} tokens of the tokenizer of {tmp_path}")


def test_a_turn_that_ends_with_no_token_is_warned_about(tmp_path):
    result = remarks(tmp_path, PLAIN)
    (warning,) = result.warnings
    assert "ends an assistant's turn with '\\nUSER: '" in warning and "only '<|im_end|>' ends a response" in warning
    assert result.notes == (
        "the chat template writes text before the first message: 'A chat between a student and a teacher.'",
    )


# ----------------------------------------------------------------------------------------------- what it adds, changes
@pytest.mark.parametrize(
    "template, prompt, expected",
    (
        (CHATML, {}, []),
        (CHATML, {"system": "Be brief."}, []),
        (CHATML, {"shots": (SHOT,)}, []),
        (SYSTEM + CHATML, {}, ["before the first message: 'You are Tiny, made by nobody.'"]),
        (SYSTEM + CHATML, {"system": "Be brief."}, []),
        (OPENED, {}, ["begins every response with '<think>'"]),
        (THINKING, {}, []),
        (
            THINKING,
            {"template_variables": {"enable_thinking": "false"}},
            ["prompt.template_variables: enable_thinking: 'false' changes nothing in a prompt"],
        ),
        (
            THINKING,
            {"template_variables": {"enable_thinking": False}},
            ["begins every response with '<think>\\n\\n</think>'"],
        ),
        (DATED, {}, ["before the first message: 'Today is 26 Jul 2024.'", "it is always given 2024-07-26"]),
        (DATED, {"system": "Be brief."}, ["first message: 'Today is 26 Jul 2024.'", "it is always given 2024-07-26"]),
    ),
)
def test_what_a_template_adds_is_noted(tmp_path, template, prompt, expected):
    result = remarks(tmp_path, template, **prompt)
    assert result.warnings == () and len(result.notes) == len(expected), result
    assert all(part in note for part, note in zip(expected, result.notes))


@pytest.mark.parametrize(
    "change, words",
    (
        ("| trim", ["leading white space", "trailing white space"]),
        ("| e", ["the characters < > &"]),
        ("| upper", ["drops or changes capital letters, characters beyond ASCII of"]),
        ("| replace('\\n\\n', '\\n')", ["empty lines"]),
        ("| tojson", ["backslashes"]),
        ("", []),
    ),
)
def test_what_a_template_changes_is_warned_about(tmp_path, change, words):
    template = CHATML.replace("message['content']", f"(message['content'] {change})")
    result = remarks(tmp_path, template)
    assert bool(result.warnings) == bool(words)
    for word in words:
        assert word in result.warnings[0]


def test_a_template_of_llama_3_trims(tmp_path):
    result = template_remarks(load_tokenizer(llama3_folder(tmp_path)), PromptConfig())
    assert result.warnings == ("the chat template drops or changes leading white space, trailing white space of a message",)
    assert result.notes == () and "trim" in LLAMA3


# ------------------------------------------------------------------------------------------------------- what it leaves out
@pytest.mark.parametrize(
    "template, prompt, field",
    (
        (NO_SYSTEM, {"system": "Be brief."}, "prompt.system"),
        (ANSWERS_ONLY, {"shots": (SHOT,)}, "prompt.shots.0.response"),
        (LAST_ONLY, {"shots": (SHOT,)}, "prompt.shots.0.question"),
        ("<|im_start|>assistant\n", {}, "the question"),
        (CHATML.replace("message['content']", "message['content'][:40]"), {"system": "Be brief." * 9}, "prompt.system"),
    ),
)
def test_what_a_template_leaves_out_is_refused(tmp_path, template, prompt, field):
    tokenizer = tokenizer_of(tmp_path, template)
    with pytest.raises(ConfigError) as error:
        PromptBuilder(tokenizer, PromptConfig(**prompt))
    assert str(error.value).startswith(f"{field}: the chat template of {tmp_path} leaves it out")
    if prompt:
        PromptBuilder(tokenizer, PromptConfig(template="raw", **prompt))


def test_a_template_without_a_system_role_serves_where_none_is_asked_for(tmp_path):
    PromptBuilder(tokenizer_of(tmp_path, NO_SYSTEM), PromptConfig())


# ------------------------------------------------------------------------------------------------------------ its variables
def test_variables_reach_the_template_as_in_transformers(tmp_path):
    from transformers import AutoTokenizer

    folder = bpe_folder(tmp_path, THINKING, added=("<think>", "</think>"))
    theirs, talk = AutoTokenizer.from_pretrained(folder), [{"role": "user", "content": "Why?"}]
    for variables in ({}, {"enable_thinking": False}, {"enable_thinking": True}):
        assert load_tokenizer(folder).chat_text(talk, variables) == theirs.apply_chat_template(
            talk, tokenize=False, add_generation_prompt=True, **variables
        )


@pytest.mark.parametrize(
    "template, variables, words",
    (
        (THINKING, {"enable_thinkin": False}, ("'enable_thinkin' is not a variable", "it has: enable_thinking")),
        (CHATML, {"enable_thinking": False}, ("'enable_thinking' is not a variable", "it has: none")),
        (DATED, {"day": "1"}, ("'day' is not a variable",)),
        (CHATML, {"messages": "x"}, ("'messages' is not a variable",)),
        (DATED, {"strftime_now": "x"}, ("'strftime_now' is not a variable",)),
        (THINKING, {"range": 1}, ("'range'",)),
    ),
)
def test_names_that_a_template_does_not_use_are_refused(tmp_path, template, variables, words):
    with pytest.raises(ConfigError) as error:
        PromptBuilder(tokenizer_of(tmp_path, template), PromptConfig(template_variables=variables))
    assert all(word in str(error.value) for word in ("prompt.template_variables: ", *words))


def test_raw_prompts_have_no_variables(tmp_path):
    with pytest.raises(ConfigError, match="no effect with prompt.template=raw"):
        PromptBuilder(
            tokenizer_of(tmp_path, THINKING), PromptConfig(template="raw", template_variables={"enable_thinking": False})
        )
