"""What follows the end of thinking decides: cut by hand for each way of writing it, and told from real tokenizers."""

import json

import pytest
from text_folders import CHATML, bpe_folder, sentencepiece_folder

from alphamed.answers.thinking import Thinking, begin_of, end_of_thinking
from alphamed.config.sections import PromptConfig
from alphamed.data.prompts import PromptBuilder
from alphamed.data.tokenizer import load_tokenizer
from alphamed.records import FinishReason, Outcome, Question
from alphamed.reward.rules import correct, grade

QUESTION = Question("q1", "Which?", {"A": "this", "B": "that"}, "A")
END, INSIDE, NONE = Thinking("</think>"), Thinking("</think>", opened=True), Thinking()
OPENS = CHATML.replace("assistant\n", "assistant\n<think>\n")
CLOSED = CHATML.replace("assistant\n", "assistant\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    "text, whole, optional, inside",
    [
        # a response -> its answer where nothing is cut, where thinking is optional, where the prompt opens it
        ("plain", "plain", "plain", None),
        ("<think>a</think>b", "<think>a</think>b", "b", "b"),
        ("a</think>b", "a</think>b", "b", "b"),
        ("<think>a", "<think>a", None, None),
        ("b<think>a", "b<think>a", None, None),
        ("<think>a</think>b<think>c</think>d", "<think>a</think>b<think>c</think>d", "d", "d"),
        ("<think>a</think>b<think>c", "<think>a</think>b<think>c", None, None),
        ("<think>a</think>", "<think>a</think>", "", ""),
        ("", "", "", None),
    ],
)
def test_the_answer_of_a_response(text, whole, optional, inside):
    assert (NONE.answer(text), END.answer(text), INSIDE.answer(text)) == (whole, optional, inside)


def test_a_marker_that_closes_nothing_has_to_be_there():
    final = Thinking("## Answer")
    assert (begin_of("## Answer"), begin_of("</think>"), begin_of("[/THINK]")) == ("", "<think>", "[THINK]")
    assert final.answer("so\n## Answer\nA") == "\nA" and final.answer("so A") is None


@pytest.mark.parametrize(
    "text, finish, outcome, letter",
    [
        (r"<think>\boxed{A}</think> \boxed{B}", FinishReason.STOP, Outcome.WRONG, "B"),
        (r"<think>\boxed{A}</think> it is A", FinishReason.STOP, Outcome.UNPARSEABLE, None),
        (r"<think>\boxed{A}", FinishReason.STOP, Outcome.UNPARSEABLE, None),
        (r"<think>\boxed{A}", FinishReason.LENGTH, Outcome.TRUNCATED, None),
        (r"\boxed{A}", FinishReason.STOP, Outcome.CORRECT, "A"),
    ],
)
def test_a_draft_decides_nothing(text, finish, outcome, letter):
    graded = grade(QUESTION, text, finish, correct, thinking=END)
    assert (graded.outcome, graded.letter) == (outcome, letter)


# ------------------------------------------------------------------------------------------------------- of a model's folder
@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, tags = tmp_path_factory.mktemp("thinking"), ("<think>", "</think>")
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    return {
        "plain": bpe_folder(root / "plain"),
        "added": bpe_folder(root / "added", added=tags),
        "special": bpe_folder(root / "special", special=special + tags),
        "prompt opens": bpe_folder(root / "opens", OPENS, added=tags),
        "prompt closes": bpe_folder(root / "closes", CLOSED, added=tags),
        "template alone": bpe_folder(root / "template", "{% set end = '</think>' %}" + OPENS),
        "sentencepiece": with_tags(sentencepiece_folder(root / "sentencepiece"), tags),
    }


def with_tags(folder, tags):
    size = load_tokenizer(folder).vocab
    (folder / "added_tokens.json").write_text(json.dumps({tag: size + i for i, tag in enumerate(tags)}))
    return folder


@pytest.mark.parametrize(
    "name, setting, expected",
    [
        ("plain", "auto", NONE),
        ("added", "auto", END),
        ("special", "auto", END),
        ("prompt opens", "auto", INSIDE),
        ("prompt closes", "auto", END),
        ("template alone", "auto", INSIDE),
        ("sentencepiece", "auto", END),
        ("prompt opens", None, NONE),
        ("prompt opens", "", NONE),
        ("plain", "[/THINK]", Thinking("[/THINK]")),
    ],
)
def test_the_setting_and_the_folder_say_how_a_model_thinks(folders, name, setting, expected):
    tokenizer = load_tokenizer(folders[name])
    assert Thinking.of(setting, tokenizer, PromptBuilder(tokenizer, PromptConfig())) == expected


def test_a_raw_prompt_opens_no_thinking(folders):
    tokenizer = load_tokenizer(folders["prompt opens"])
    assert Thinking.of("auto", tokenizer, PromptBuilder(tokenizer, PromptConfig(template="raw"))) == END


@pytest.mark.parametrize("name", ["added", "special", "sentencepiece"])
def test_the_tags_of_thinking_reach_the_grader_and_other_control_tokens_do_not(folders, name):
    tokenizer = load_tokenizer(folders[name])
    ids = tokenizer.encode("<think>one</think>two<|im_end|>")
    end = end_of_thinking("auto", tokenizer)
    tokenizer.keep(end + begin_of(end))
    text = tokenizer.decode(ids)
    assert text.replace(" ", "") == "<think>one</think>two"
    assert END.answer(text).strip() == "two"


# --------------------------------------------------------------------------------------------------- of recorded responses
@pytest.mark.parametrize(
    "setting, texts, expected",
    [
        ("auto", ["a</think>b", "cut off"], INSIDE),
        ("auto", ["<think>a</think>b", "c"], END),
        ("auto", ["a", "b"], NONE),
        (None, ["a</think>b"], NONE),
        ("[/THINK]", ["a"], Thinking("[/THINK]")),
    ],
)
def test_recorded_responses_show_how_a_model_thinks(setting, texts, expected):
    assert Thinking.of_texts(setting, texts) == expected
