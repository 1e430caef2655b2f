"""Examples of supervised training: the forms of rows, public layouts, what is refused, and their token ids."""

import json
import re
from pathlib import Path

import pytest
from tiny import tiny_tokenizer

from alphamed.config.loading import build_config
from alphamed.data.example_supply import ExampleSupply, flatten, unflatten, with_length
from alphamed.data.example_tokens import ExampleEncoder, load_usable
from alphamed.data.examples import load_examples
from alphamed.data.prompts import PromptBuilder
from alphamed.data.tokenizer import load_tokenizer
from alphamed.errors import DataError
from alphamed.records import Question

END = "<|im_end|>"


def write(tmp_path, *rows, name="train.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def only(tmp_path, row, response_format="{reasoning}|{response}"):
    (example,) = load_examples([write(tmp_path, row)], response_format=response_format).examples
    return example


# ------------------------------------------------------------------------------------------------------- the forms of rows
def test_a_question_with_several_responses(tmp_path):
    found = only(
        tmp_path, {"id": "q1", "question": "Which? ", "options": {"A": "this", "B": "that"}, "responses": ["A", " B"]}
    )
    assert (found.id, found.responses) == ("q1", ("A", " B"))  # a response is kept to the letter, its blanks are tokens
    assert isinstance(found.prompt, Question)
    assert (found.prompt.question, dict(found.prompt.options)) == ("Which?", {"A": "this", "B": "that"})


def test_options_as_a_list_get_letters(tmp_path):
    found = only(tmp_path, {"question": "Which?", "options": ["this", "that"], "response": "A"})
    assert dict(found.prompt.options) == {"A": "this", "B": "that"}


def test_a_prompt_and_its_completion(tmp_path):
    assert only(tmp_path, {"prompt": "Say hello.", "response": "Hello."}).prompt == "Say hello."
    said = only(
        tmp_path, {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Yo"}]}
    )
    assert (said.prompt, said.responses) == (({"role": "user", "content": "Hi"},), ("Yo",))


def test_of_a_conversation_the_last_turn_is_the_response(tmp_path):
    turns = [("system", "Be brief."), ("user", "1?"), ("assistant", "2."), ("user", "3?"), ("assistant", "4.")]
    found = only(tmp_path, {"messages": [{"role": role, "content": content} for role, content in turns]})
    assert [turn["content"] for turn in found.prompt] == ["Be brief.", "1?", "2.", "3?"]
    assert found.responses == ("4.",)
    asked = [{"role": "user", "content": "1?"}]
    assert only(tmp_path, {"messages": asked, "responses": ["2.", "two"]}).responses == ("2.", "two")


def test_reasoning_is_put_where_the_format_says(tmp_path):
    row = {"prompt": "1 + 1?", "reasoning": ["one and one", "count"], "responses": ["2", "two"]}
    assert only(tmp_path, row, "<think>{reasoning}</think>{response}").responses == (
        "<think>one and one</think>2",
        "<think>count</think>two",
    )
    assert only(tmp_path, {"prompt": "1 + 1?", "response": "2"}).responses == ("2",)


def test_the_letter_of_the_answer_can_be_boxed(tmp_path):
    boxed = "{reasoning}\n\n{response} \\boxed{{letter}}"
    row = {"question": "Which?", "options": {"A": "this", "B": "that"}, "answer": "B", "responses": ["That.", "B"]}
    assert only(tmp_path, row, boxed).responses == (r"That. \boxed{B}", r"B \boxed{B}")
    m1k = {"prompt": "Which?", "reasoning": "{response}", "distilled_answer_string": "That", "answer_letter": "B"}
    assert only(tmp_path, m1k, boxed).responses == ("{response}\n\nThat \\boxed{B}",)  # what rows hold is no format
    reason = {
        "dataset_name": "d",
        "question": "?",
        "options": "A. Type I\nB. Type II",
        "reasoning": "r",
        "answer": "Type II. So",
    }
    assert only(tmp_path, reason, "{letter}").responses == ("B",)
    with pytest.raises(DataError, match="no answer as a letter, which sft.response_format puts into the response"):
        only(tmp_path, {"prompt": "?", "response": "!"}, boxed)


def test_the_letter_is_that_of_an_option(tmp_path):
    row = {"question": "Which?", "options": ["this", "that"], "answer": "E", "response": "That."}
    with pytest.raises(DataError, match="answer 'E' is none of the options A, B"):
        only(tmp_path, row, "{response} {letter}")
    row |= {"prompt": "Which?", "question": None, "options": None}  # its options are not known
    assert only(tmp_path, row, "{response} {letter}").responses == ("That. E",)


def test_a_table_of_texts_holds_lists_of_responses_and_messages(tmp_path):
    """Else the list would be trained on as it is written."""
    path = tmp_path / "train.csv"
    path.write_text('prompt,responses\n1?,"[""2."", ""two""]"\n', encoding="utf-8-sig")
    (example,) = load_examples([path]).examples
    assert (example.prompt, example.responses) == ("1?", ("2.", "two"))
    turns = json.dumps([{"role": "user", "content": "1?"}, {"role": "assistant", "content": "2."}]).replace('"', '""')
    path.write_text(f'messages\n"{turns}"\n')
    (example,) = load_examples([path]).examples
    assert example.responses == ("2.",)


def test_parquet_holds_the_same(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"id": "a", "messages": [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "2."}]},
        {"id": "b", "messages": [{"role": "user", "content": "3?"}, {"role": "assistant", "content": "4."}]},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    found = load_examples([tmp_path / "train.parquet"]).examples
    assert [(e.id, e.prompt[0]["content"], e.responses) for e in found] == [("a", "1?", ("2.",)), ("b", "3?", ("4.",))]


# ---------------------------------------------------------------------------------------------------------- public layouts
def test_medical_o1(tmp_path):
    row = {"Question": "Why cough?", "Complex_CoT": "Lungs.", "Response": "Asthma."}
    found = only(tmp_path, row, "## Thinking\n\n{reasoning}\n\n## Final Response\n\n{response}")
    assert (found.prompt.question, dict(found.prompt.options)) == ("Why cough?", {})
    assert found.responses == ("## Thinking\n\nLungs.\n\n## Final Response\n\nAsthma.",)


def test_medical_r1(tmp_path):
    row = {"question": "Why?", "reasoning (reasoning_content)": "Because.", "response (content)": "So."}
    found = only(tmp_path, row)
    assert (found.prompt.question, found.responses) == ("Why?", ("Because.|So.",))


def test_m1k(tmp_path):
    row = {
        "prompt": "Which?\nA. this\nB. that",
        "reasoning": "Hm.",
        "distilled_answer_string": "Answer: A",
        "answer_letter": "A",
    }
    found = only(tmp_path, row | {"answer_idx": 0, "source": "medqa"})
    assert (found.prompt, found.responses) == (row["prompt"], ("Hm.|Answer: A",))


def test_medreason(tmp_path):
    row = {
        "dataset_name": "medmcqa",
        "id_in_dataset": 7,
        "question": "Which nerve?",
        "options": "Answer Choices:\nA. Radial\nB. Ulnar (deep)\nC. Median",
        "reasoning": "Finding reasoning paths: ...",
        "answer": "Ulnar (deep). Explanation: it is.",
    }
    found = only(tmp_path, row)
    assert dict(found.prompt.options) == {"A": "Radial", "B": "Ulnar (deep)", "C": "Median"}
    assert found.responses == ("Finding reasoning paths: ...|Ulnar (deep). Explanation: it is.",)
    assert dict(only(tmp_path, row | {"options": ""}).prompt.options) == {}


def test_an_option_begins_an_answer_as_whole_words(tmp_path):
    row = {"dataset_name": "x", "question": "When?", "options": "A. No\nB. Vitamin B1\nC. +", "reasoning": "so"}
    for answer, letter in (("No, never.", "A"), ("Vitamin B1: beri-beri", "B"), ("+1 so", "C")):
        assert only(tmp_path, row | {"answer": answer}, "{letter}").responses == (letter,)
    for answer in ("Nocturnal", "Vitamin B12"):
        with pytest.raises(DataError, match="no answer as a letter"):
            only(tmp_path, row | {"answer": answer}, "{letter}")


def test_sharegpt(tmp_path):
    turns = [{"from": "human", "value": "1?"}, {"from": "gpt", "value": "2."}]
    found = only(tmp_path, {"id": "s", "system": "Be brief.", "conversations": turns})
    assert ([turn["role"] for turn in found.prompt], found.responses, found.id) == (["system", "user"], ("2.",), "s")


def test_the_documented_rows_are_read(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "sft.md").read_text()
    blocks = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    (tmp_path / "docs.jsonl").write_text("".join(blocks))
    found = load_examples([tmp_path / "docs.jsonl"]).examples
    assert [len(example.responses) for example in found] == [2, 1, 1, 1, 2, 1]


# ------------------------------------------------------------------------------------------------------------ what is refused
USER, ASSISTANT = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}


@pytest.mark.parametrize(
    "row, problem",
    [
        ({"response": "!"}, "no question, prompt or messages"),
        ({"prompt": "?"}, "no response; give one of response, responses, completion"),
        ({"prompt": "?", "question": "?", "response": "!"}, "has both question and prompt; keep one"),
        ({"prompt": "?", "response": "!", "responses": ["!"]}, "has both response and responses; keep one"),
        ({"prompt": "?", "response": "  "}, "response is empty"),
        ({"prompt": "?", "responses": []}, "responses is an empty list"),
        ({"prompt": "?", "responses": ["!", 3]}, "responses is not text but 3"),
        ({"prompt": 3, "response": "!"}, "prompt is not text but 3"),
        ({"messages": [USER]}, "messages end with the user's turn and no response is given"),
        ({"messages": [ASSISTANT]}, "messages: turn 1 is the assistant's, not the user's"),
        ({"messages": [USER, USER, ASSISTANT]}, "messages: turn 2 is the user's, not the assistant's"),
        ({"messages": [USER, {"role": "tool", "content": ""}]}, "messages: role 'tool' is none of system, user, assistant"),
        ({"messages": [USER, ASSISTANT], "response": "!"}, "messages: the turn before the response is not the user's"),
        ({"messages": "?"}, "messages is not a list of messages with role and content"),
        ({"prompt": "?", "reasoning": ["a", "b"], "response": "!"}, "2 texts of reasoning for 1 response"),
        ({"question": "?", "options": {"B": "x", "C": "y"}, "response": "!"}, "option letters are B, C, not A, B, C ... in order"),
        ({"Question": "?", "Complex_CoT": None, "Response": "!"}, "Complex_CoT is empty"),
        ({"conversations": [{"from": "human"}]}, "not in the layout of sharegpt (KeyError: 'value')"),
        ({"messages": [USER, ASSISTANT | {"reasoning_content": "so"}]}, "messages: turn 2 has reasoning_content, which is not read; "
         "write it into the content"),
        ({"messages": [USER, ASSISTANT | {"tool_calls": [{"id": "1"}]}]}, "messages: turn 2 has tool_calls, which is not read; "
         "write it into the content"),
        ([1], "not an object of keys and values"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_or_skipped(tmp_path, row, problem):
    path = write(tmp_path, {"prompt": "?", "response": "!"}, row)
    with pytest.raises(DataError) as caught:
        load_examples([path])
    assert str(caught.value).startswith(f"{path}:2: {problem}; fix the data, or leave bad rows out with data.bad_rows=skip")
    found = load_examples([path], "skip")
    assert (len(found.examples), [str(p) for p in found.skipped]) == (1, [f"{path}:2: {problem}"])


def test_ids(tmp_path):
    same = {"prompt": "?", "response": "!"}
    names = [e.id for e in load_examples([write(tmp_path, same, same, same | {"response": "."})]).examples]
    assert len(set(names)) == 3 and names[1] == f"{names[0]}-2"  # of the same content, and none is lost
    twice = write(tmp_path, same | {"id": "x"}, same | {"id": "x"})
    with pytest.raises(DataError, match="duplicate id 'x', first at .*:1"):
        load_examples([twice])


# ----------------------------------------------------------------------------------------------------------------- token ids
def setting(tmp_path, *rows, **sections):
    """(configuration, encoder, tokenizer) of rows and a byte-level tokenizer with a ChatML template."""
    folder = tiny_tokenizer(tmp_path)
    tree = {
        "model": {"path": str(tmp_path)},
        "data": {"train": [str(write(tmp_path, *rows))]},
        "sft": {},
        "prompt": {"max_tokens": 200},
        "rollout": {"max_response_tokens": 100},
    }
    config = build_config(tree | {name: tree.get(name, {}) | own for name, own in sections.items()})
    tokenizer = load_tokenizer(folder)
    return config, ExampleEncoder(tokenizer, PromptBuilder(tokenizer, config.prompt), config), tokenizer


def encoded(tmp_path, row, **sections):
    """Prompt, responses and which parts have a loss, as texts."""
    config, encoder, tokenizer = setting(tmp_path, row, **sections)
    found = encoder.encode(load_usable(config, encoder).examples[0])
    text = lambda ids: tokenizer.decode(ids, skip_special=False)
    trained = [
        "".join(text([i]) if mark else "~" for i, mark in zip(ids, marks))
        for ids, marks in zip(found.responses, found.trained)
    ]
    return text(found.prompt), [text(ids) for ids in found.responses], trained


def test_a_question_is_asked_as_in_reinforcement_learning(tmp_path):
    row = {"question": "Which?", "options": {"A": "this", "B": "that"}, "responses": ["A", " B"]}
    prompt, responses, trained = encoded(tmp_path, row)
    config, _, tokenizer = setting(tmp_path, row)
    asked = Question("q", "Which?", {"A": "this", "B": "that"}, "A")
    assert prompt == PromptBuilder(tokenizer, config.prompt).text(asked)
    assert responses == trained == [f"A{END}", f" B{END}"]


def test_a_prompt_is_the_users_turn_or_raw_text(tmp_path):
    row = {"prompt": "Say hello.", "response": "Hello."}
    prompt, responses, _ = encoded(tmp_path, row, prompt={"system": "Be brief."})
    assert prompt == f"<|im_start|>system\nBe brief.{END}\n<|im_start|>user\nSay hello.{END}\n<|im_start|>assistant\n"
    assert responses == [f"Hello.{END}"]
    raw, responses, _ = encoded(tmp_path, row, prompt={"template": "raw"})
    assert raw == "Say hello."
    assert responses[0].startswith("Hello.") and len(responses[0]) > len("Hello.")  # and the tokenizer's own end token


TURNS = [("user", "1?"), ("assistant", "2."), ("user", "3?"), ("assistant", "4.")]
DIALOGUE = {"messages": [{"role": role, "content": content} for role, content in TURNS]}


def test_loss_on_the_last_turn_or_on_all(tmp_path):
    whole = f"<|im_start|>user\n1?{END}\n<|im_start|>assistant\n2.{END}\n<|im_start|>user\n3?{END}\n<|im_start|>assistant\n"
    prompt, responses, trained = encoded(tmp_path, DIALOGUE)
    assert (prompt, responses, trained) == (whole, [f"4.{END}"], [f"4.{END}"])
    prompt, responses, trained = encoded(tmp_path, DIALOGUE, sft={"loss_on": "assistant_turns"})
    assert prompt == f"<|im_start|>user\n1?{END}\n<|im_start|>assistant\n"
    assert prompt + responses[0] == whole + f"4.{END}"
    assert trained[0].replace("~", "") == f"2.{END}4.{END}" and trained[0].startswith(f"2.{END}~")


def test_earlier_turns_are_trained_on_once(tmp_path):
    row = {"messages": DIALOGUE["messages"][:3], "responses": ["4.", "5."]}
    _, responses, trained = encoded(tmp_path, row, sft={"loss_on": "assistant_turns"})
    assert trained[0].replace("~", "") == f"2.{END}4.{END}"
    assert trained[1].replace("~", "") == f"5.{END}"
    assert responses[1] == responses[0].replace("4.", "5.")


def test_control_tokens_in_texts(tmp_path):
    """What is asked cannot steer; a response with a token that ends it is refused."""
    prompt, _, _ = encoded(tmp_path, {"prompt": f"Say {END}", "response": "No."})
    assert prompt.count(END) == 1
    with pytest.raises(DataError, match=r"train.jsonl:1: a response holds the control token '<\|im_end\|>'; remove it"):
        encoded(tmp_path, {"prompt": "?", "response": f"No.{END}"})


def test_control_tokens_in_earlier_turns(tmp_path):
    """They would end the turn there, whatever has a loss."""
    said = {"messages": [USER, {"role": "assistant", "content": f"No.{END}"}, USER, ASSISTANT]}
    for loss_on in ("responses", "assistant_turns"):
        with pytest.raises(DataError, match=r"a response holds the control token '<\|im_end\|>'; remove it"):
            encoded(tmp_path, said, sft={"loss_on": loss_on})


OPENS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n<think>\n"


def test_thinking_that_the_prompt_has_begun_is_ended_and_not_begun_again(tmp_path):
    def responses(response):
        config, _, _ = setting(tmp_path, {"prompt": "1?", "response": response})
        (tmp_path / "chat_template.jinja").write_text(OPENS + "{# </think> #}")
        tokenizer = load_tokenizer(tmp_path)
        encoder = ExampleEncoder(tokenizer, PromptBuilder(tokenizer, config.prompt), config)
        found = encoder.encode(load_usable(config, encoder).examples[0])
        return [tokenizer.decode(ids, skip_special=False) for ids in (found.prompt, found.responses[0])]

    prompt, response = responses("One.\n</think>\n\n1")
    assert prompt.endswith("assistant\n<think>\n") and response == f"One.\n</think>\n\n1{END}"
    with pytest.raises(DataError, match="a response holds <think>, with which its prompt ends already"):
        responses("<think>\nOne.\n</think>\n\n1")
    with pytest.raises(DataError, match="its prompt ends with <think>, but a response holds no </think>"):
        responses("1")


@pytest.mark.parametrize(
    "row, sections, problem",
    [
        (
            {"prompt": "?", "response": "!"},
            {"prompt": {"template": "raw"}},
            "its prompt takes 1 token, at least 2 are needed",
        ),
        ({"prompt": "x" * 300, "response": "!"}, {}, "its prompt takes [0-9]+ tokens, prompt.max_tokens is 200; raise it"),
        ({"prompt": "?", "response": "y" * 100}, {}, "its response takes 101 tokens, rollout.max_response_tokens is 100"),
        (DIALOGUE, {"prompt": {"template": "raw"}}, "messages need prompt.template=chat"),
    ],
)
def test_what_does_not_fit_is_refused_or_skipped(tmp_path, row, sections, problem):
    good = {"id": "good", "prompt": "why?", "response": "!"}
    config, encoder, _ = setting(tmp_path, good, row, **sections)
    with pytest.raises(DataError, match=f"train.jsonl:2: {problem}"):
        load_usable(config, encoder)
    config, encoder, _ = setting(tmp_path, good, row, **{**sections, "data": {"bad_rows": "skip"}})
    for check in (True, False):
        found = load_usable(config, encoder, check)
        assert [e.id for e in found.examples] == ["good"] and len(found.skipped) == 1


# ---------------------------------------------------------------------------------------------------------------- the supply
class Alone:
    """The control of one rank."""

    def on_rank0(self, what, function):
        return function()

    def share_tensors(self, tensors):
        return tensors


def test_the_supply_gives_every_example_once_an_epoch_and_resumes(tmp_path):
    rows = [{"id": f"e{i}", "prompt": f"{i}?", "responses": [f"{i}", f"{i}."][: 1 + i % 2]} for i in range(5)]
    config, encoder, tokenizer = setting(tmp_path, *rows, sft={"prompts_per_step": 2})
    supply = ExampleSupply(config, encoder, Alone())
    said = lambda step: [[tokenizer.decode(r.tolist()) for r in group.responses] for group in step.groups]
    steps = [supply.next(n) for n in range(1, 6)]
    taken = [tuple(group) for step in steps for group in said(step)]
    assert sorted(taken[:5]) == sorted(taken[5:]) == sorted([("0",), ("1", "1."), ("2",), ("3", "3."), ("4",)])
    assert taken[:5] != taken[5:]
    assert [step.metrics["data/epochs"] for step in steps] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    again = ExampleSupply(config, encoder, Alone())
    for n in (1, 2):
        again.next(n)
    resumed = ExampleSupply(config, encoder, Alone())
    resumed.load_state(json.loads(json.dumps(again.state())))
    assert [said(resumed.next(n)) for n in (3, 4, 5)] == [said(step) for step in steps[2:]]


def test_groups_hold_what_was_encoded(tmp_path):
    config, encoder, _ = setting(
        tmp_path, {"prompt": "a?", "responses": ["b", "cc"]}, DIALOGUE, sft={"loss_on": "assistant_turns"}
    )
    examples = [encoder.encode(example) for example in load_usable(config, encoder).examples]
    groups = unflatten(flatten(examples))
    assert [tuple(g.prompt.tolist()) for g in groups] == [e.prompt for e in examples]
    assert [tuple(tuple(r.tolist()) for r in g.responses) for g in groups] == [e.responses for e in examples]
    assert [tuple(tuple(t.tolist()) for t in g.trained) for g in groups] == [e.trained for e in examples]


@pytest.mark.parametrize("epochs, steps", [(1, 3), (2, 5), (0.5, 2)])
def test_epochs_become_steps(tmp_path, epochs, steps):
    rows = [{"id": f"e{i}", "prompt": f"{i}?", "response": "!"} for i in range(5)]
    config, _, _ = setting(tmp_path, *rows, sft={"prompts_per_step": 2, "epochs": epochs})
    found = with_length(config, tmp_path)
    assert (found.run.steps, found.sft.epochs) == (steps, None)
    plain, _, _ = setting(tmp_path, *rows, sft={"prompts_per_step": 2})
    assert with_length(plain, tmp_path) is plain
