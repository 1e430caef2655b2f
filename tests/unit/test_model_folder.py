"""The one check of a model folder, through every command that begins with it: what is refused, noted and recorded."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from tiny import edit_config, tiny_hf

from alphamed.cli import main
from alphamed.config.loading import build_config
from alphamed.errors import ConfigError
from alphamed.evaluation import settings
from alphamed.model_folder import check_model_folder, remarks_on
from alphamed.run import Run
from alphamed.rundir import provenance

QUESTION = {
    "id": "q0",
    "question": "Which vitamin prevents scurvy?",
    "options": {"A": "A", "B": "C", "C": "D"},
    "answer": "B",
}
OPENED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n<|go|>"
)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return tiny_hf(tmp_path_factory.mktemp("model") / "m", "qwen2", layers=2, hidden=128)


@pytest.fixture
def folder(good, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.jsonl").write_text(
        "".join(json.dumps(QUESTION | {"id": f"q{i}", "question": f"{i}?"}) + "\n" for i in range(4))
    )
    return shutil.copytree(good, tmp_path / "m")


class Alone:
    """The control of a world of one rank."""

    rank = 0

    def from_rank0(self, what, function):
        return function()

    everywhere = on_rank0 = from_rank0


def config(folder, **sections):
    tree = {
        "model": {"path": str(folder), "dtype": "fp32"},
        "data": {"train": ["q.jsonl"]},
        "prompt": {"max_tokens": 700},
        "run": {"name": "r"},
        "cluster": {"device": "cpu"},
        "rollout": {"questions_per_step": 4, "samples_per_question": 2, "max_response_tokens": 16, "dtype": "fp32"},
    }
    for name, section in sections.items():
        tree[name] = tree.get(name, {}) | section
    return tree


def commands(folder, **sections):
    """Every command that starts from a folder, as far as its checks (a plan does not look at prompts' texts)."""
    file = folder.parent / "run.yaml"
    file.write_text(json.dumps(config(folder, **sections)))
    given = ["--config", str(file)]
    return {
        "train": ["train", "--check", *given],
        "eval": ["eval", *given, "--benchmarks", "q.jsonl", "--out", "e"],
        "difficulty": ["data", "difficulty", *given, "--questions", "q.jsonl", "--out", "d.jsonl"],
        "plan": ["plan", *given],
        "model": ["model", str(folder)],
    }


def refused_everywhere(folder, capsys, *words, but=(), **sections):
    for name, command in commands(folder, **sections).items():
        if name in but:
            continue
        assert main(command) == 2, name
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1, f"{name}: {error}"
        assert all(word in error for word in words), f"{name}: {error}"
    assert not any((folder.parent / name).exists() for name in ("runs", "e", "d.jsonl"))


def add_token(folder, text):
    """One id more than the model has."""
    tree = json.loads((folder / "tokenizer.json").read_text())
    new = 1 + max(tree["model"]["vocab"].values())
    tree["added_tokens"].append(
        {
            "id": new,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
    )
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    return new


def end_with(folder, text, number):
    """Have the folder's files name another end token than the template writes."""
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token": text}))
    for name in ("config.json", "generation_config.json"):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | {"eos_token_id": number}))


# --------------------------------------------------------------------------------------------------------------- refused
def test_two_sets_of_weights(folder, capsys):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")})
    )
    refused_everywhere(folder, capsys, "model.safetensors", "model.safetensors.index.json", "two sets of weights")


def test_a_value_that_is_not_finite(folder, capsys):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][7, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused_everywhere(folder, capsys, "model.layers.1.mlp.down_proj.weight holds values that are not finite", but=("plan",))


def test_a_key_that_changes_the_computation(folder, capsys):
    edit_config(folder, dual_chunk_attention_config={"chunk_size": 64})
    refused_everywhere(folder, capsys, "dual_chunk_attention_config", "attention in chunks")


def test_a_template_that_writes_a_token_the_model_has_not(folder, capsys):
    assert add_token(folder, "<|go|>") == 509
    (folder / "chat_template.jinja").write_text(OPENED)
    refused_everywhere(folder, capsys, "'<|go|>', id 509", "vocab_size of 509")


def test_a_question_that_needs_a_token_the_model_has_not(folder, capsys):
    """Its text is a token of its own that is no control token; who does not read the questions cannot know."""
    tree = json.loads((folder / "tokenizer.json").read_text())
    tree["added_tokens"].append(
        {
            "id": 509,
            "content": "scurvy",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": False,
        }
    )
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    (folder.parent / "q.jsonl").write_text(
        "".join(json.dumps(QUESTION | {"id": f"q{i}", "context": f"{i}"}) + "\n" for i in range(4))
    )
    refused_everywhere(folder, capsys, "question 'q0': ", "'scurvy', id 509", but=("plan", "model"))


def test_an_end_token_that_the_model_has_not(folder, capsys):
    end_with(folder, "<|stop|>", add_token(folder, "<|stop|>"))
    refused_everywhere(folder, capsys, "'<|stop|>', id 509, ends an answer")


def test_settings_that_the_folder_can_not_serve(folder, capsys):
    refused_everywhere(
        folder, capsys, "rollout.stop: 'the end' takes 7 tokens", but=("model",), rollout={"stop": ["the end"]}
    )
    refused_everywhere(
        folder,
        capsys,
        "'enable_thinking' is not a variable",
        but=("model",),
        prompt={"template_variables": {"enable_thinking": False}},
    )


# ---------------------------------------------------------------------------------------------------------------- noted
def test_a_check_prints_what_there_is_to_say_and_a_run_records_it(folder, capsys):
    end_with(folder, "<|endoftext|>", 0)
    add_token(folder, "<|unused|>")
    edit_config(folder, z_loss=0.1)
    template = (folder / "chat_template.jinja").read_text().replace("message['content']", "message['content'] | trim")
    (folder / "chat_template.jinja").write_text("Hello.\n" + template)
    expected = [
        "warning: the chat template drops or changes leading white space, trailing white space of a message",
        "note: config.json holds keys of which it is not known here whether they change the model: z_loss",
        "note: the tokenizer has 510 ids, the model 509: prompts that would hold one of the last 1 are refused",
        "note: the chat template ends a turn with '<|im_end|>', which the folder's files do not name as an end token; "
        "it ends responses too",
        "note: the chat template writes text before the first message: 'Hello.'",
    ]
    for name, command in commands(folder).items():
        if name in ("train", "model"):
            assert main(command) == 0
            assert capsys.readouterr().err.splitlines() == expected
    chosen = build_config(config(folder))
    assert remarks_on(folder, chosen).lines() == expected
    assert check_model_folder(folder, chosen).stop_ids == (0, 2)
    run = Run.open(chosen, Alone())
    run.begin(None, folder)
    run.close()
    assert [start["model_remarks"] for start in provenance.read(chosen.run_dir)["starts"]] == [expected]


def test_nothing_is_said_of_an_ordinary_folder(folder, capsys):
    assert main(commands(folder)["train"]) == 0
    assert capsys.readouterr().err == ""


def test_a_plan_needs_a_config_alone_and_checks_what_else_is_there(folder, capsys):
    plan = commands(folder)["plan"]
    for name in ("model.safetensors", "tokenizer.json", "chat_template.jinja"):
        (folder / name).unlink()
        assert main(plan) == 0, capsys.readouterr().err
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    assert main(plan) == 2
    assert "model-00001-of-00002.safetensors" in capsys.readouterr().err


def test_raw_prompts_do_not_look_at_the_template(folder):
    (folder / "chat_template.jinja").unlink()
    assert check_model_folder(folder, build_config(config(folder, prompt={"template": "raw"}))).remarks.lines() == []
    with pytest.raises(ConfigError, match="set prompt.template=raw"):
        check_model_folder(folder, build_config(config(folder)))
    assert check_model_folder(folder).remarks.lines() == []


def test_an_evaluation_records_variables_and_stop_tokens(folder):
    """In evaluation.json, as parts of what was asked: answers of other settings cannot stand beside these."""
    (folder / "chat_template.jinja").write_text(OPENED.replace("<|go|>", "{{ '' if enable_thinking else 'no ' }}"))
    plain = settings.asked(build_config(config(folder)), folder, 1, 0.0, 1.0, 16)
    chosen = build_config(config(folder, prompt={"template_variables": {"enable_thinking": True}}, rollout={"stop": ["Z"]}))
    now = settings.asked(chosen, folder, 1, 0.0, 1.0, 16)
    assert now["prompt"]["template_variables"] == {"enable_thinking": True} and now["sampling"]["stop"] == ["Z"]
    settings.write(folder, str(folder), plain, {"truncated": "nothing"}, {}, "")
    with pytest.raises(ConfigError, match="prompt.template_variables.enable_thinking None, now it is True"):
        settings.require_same(folder, now)
    assert "stop" not in plain["sampling"]  # evaluations of before rollout.stop can be continued
