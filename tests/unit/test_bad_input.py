"""What a user can get wrong: every mistake is one line on stderr that names place, value and fix, and exit code 2.

One table. Each row starts from a good run, breaks one thing and states words that the line must hold. All rows go
through `alphamed.cli.main` in this process; one of each kind also as a user starts it, through `alphamed train` and a
launcher.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from tiny import edit_config, tiny_hf

from alphamed.cli import main

ROOT = Path(__file__).parents[2]
QUESTION = {
    "id": "q0",
    "question": "Which vitamin prevents scurvy?",
    "options": {"A": "A", "B": "C", "C": "D"},
    "answer": "B",
}


class Run:
    """A small run in order, to be broken."""

    def __init__(self, folder: Path, model: Path):
        self.folder = folder
        self.model = model
        self.tree = {
            "run": {"root": str(folder / "runs"), "steps": 2},
            "model": {"path": str(model), "dtype": "fp32"},
            "data": {"train": [str(folder / "train.jsonl")]},
            "prompt": {"max_tokens": 512},
            "rollout": {"questions_per_step": 2, "samples_per_question": 2, "max_response_tokens": 16, "dtype": "fp32"},
            "cluster": {"device": "cpu"},
        }
        self.rows([QUESTION | {"id": f"q{i}"} for i in range(4)])

    def set(self, name: str, value: object) -> None:
        *sections, last = name.split(".")
        at = self.tree
        for section in sections:
            at = at.setdefault(section, {})
        at[last] = value

    def rows(self, rows: list[dict], name: str = "train.jsonl") -> Path:
        path = self.folder / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def row(self, **changes: object) -> None:
        """Make the second row a bad one."""
        self.rows([QUESTION, {k: v for k, v in (QUESTION | {"id": "q1"} | changes).items() if v is not ...}])

    def own_model(self) -> Path:
        """A model folder of this test alone, to be broken."""
        copy = self.folder / "model"
        copy.mkdir()
        for file in self.model.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        self.set("model.path", str(copy))
        return copy

    def write(self) -> Path:
        path = self.folder / "run.yaml"
        path.write_text(yaml.safe_dump(self.tree))
        return path


@dataclass(frozen=True)
class Mistake:
    name: str
    break_it: Callable[[Run], object]
    words: tuple[str, ...]
    arguments: tuple[str, ...] = ()


def setting(name: str, value: object, *words: str) -> Mistake:
    """A bad value; the line names the field."""
    return elsewhere(name, value, name.split(".")[-1], *words)


def elsewhere(name: str, value: object, *words: str) -> Mistake:
    """A value that is bad because of another one, or of what it names."""
    return Mistake(f"{name}={value}", lambda run: run.set(name, value), words)


def override(text: str, *words: str) -> Mistake:
    return Mistake(f"override {text}", lambda run: None, words, (text,))


def row(name: str, *words: str, **changes: object) -> Mistake:
    return Mistake(f"row with {name}", lambda run: run.row(**changes), ("train.jsonl:2", *words))


def model(name: str, break_it: Callable[[Path], object], *words: str) -> Mistake:
    return Mistake(f"model with {name}", lambda run: break_it(run.own_model()), words)


def evaluated(run: Run, decisions: str) -> None:
    """The run with an evaluation of one question, and decisions on it."""
    run.set(
        "evaluation",
        {
            "files": [str(run.rows([QUESTION | {"id": "e", "question": "Which one?"}], "e.jsonl"))],
            "before": True,
            "decisions": [decisions],
        },
    )


def decisions(run: Run, verdict: str) -> str:
    from alphamed.data.sources import load_questions
    from alphamed.data.text import fingerprint

    rows = run.rows([QUESTION | {"id": "e", "question": "Which one?"}], "e.jsonl")
    (question,) = load_questions([rows], "refuse").questions
    path = run.folder / "decisions.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "version": 1,
                "decisions": [
                    {
                        "id": "e",
                        "fingerprint": fingerprint(question),
                        "decision": verdict,
                        "who": "w",
                        "when": "2026",
                        "why": "y",
                    }
                ],
            }
        )
    )
    return str(path)


def truncate(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def own_reward(run: Run, source: str) -> None:
    """A module of the user's own, in the folder where the command is given."""
    (run.folder / "own_rewards.py").write_text(source)
    run.set("reward.name", "own_rewards:f")


def recorded(run: Run, changes: dict) -> None:
    """Replay a run that was recorded with other settings."""
    old = run.folder / "old"
    (old / "rollouts").mkdir(parents=True)
    (old / "rollouts" / "step_000002.parquet").touch()
    (old / "config.yaml").write_text(
        yaml.safe_dump(run.tree | {name: run.tree.get(name, {}) | section for name, section in changes.items()})
    )
    run.set("rollout.replay", str(old))


CONFIGS = [
    Mistake("no such config", lambda run: None, ("absent.yaml", "no such file"), ("--config", "absent.yaml")),
    Mistake("config is a folder", lambda run: None, ("cannot be read",), ("--config", "{folder}")),
    override("rollout", "section.key=value"),
    override("rollout.egnines=2", "rollout.egnines", "unknown key", "did you mean 'engines'"),
    override("optimzer.lr=1", "optimzer", "did you mean 'optimizer'"),
    override("optimizer.lr=[1", "optimizer.lr", "not valid YAML"),
    override("run=5", "run", "5"),
    setting("run.steps", 0, "0", "greater than 0"),
    setting("run.steps", "many", "many"),
    setting("run.name", "../up", "../up"),
    setting("optimizer.lr", -1.0, "-1.0"),
    setting("optimizer.lr", float("nan"), "nan"),
    setting("optimizer.min_lr", 1.0, "1.0", "lower it"),
    setting("optimizer.warmup_steps", 2, "warmup_steps"),
    setting("optimizer.betas", [1.0, 0.9], "1.0", "less than 1"),
    setting("rollout.temperature", 0.0, "0.0"),
    setting("rollout.temperature", 0.001, "0.001", "0.01"),  # vLLM would sample at 0.01
    setting("rollout.top_p", 0.9, "0.9", "1.0"),
    setting("rollout.top_k", 50, "50", "-1"),
    setting("rollout.samples_per_question", 1, "1"),
    setting("rollout.dtype", "fp16", "fp16", "'bf16'"),
    setting("rollout.questions_per_step", 100, "100", "4 questions"),
    setting("rollout.tensor_parallel", 3, "3"),
    elsewhere("rollout.max_response_tokens", 100_000, "micro_batch_tokens"),
    setting("algorithm.loss", "ppo", "ppo", "'clip'"),
    setting("algorithm.mini_batches", 3, "3", "divisor"),
    setting("parallel.tensor", 3, "3", "heads"),
    setting("parallel.pipeline", 3, "3", "layers"),
    setting("parallel.sequence", True, "parallel.tensor"),
    setting("parallel.virtual_pipeline", 2, "parallel.pipeline"),
    Mistake(
        "a single virtual stage",
        lambda run: run.set("parallel", {"pipeline": 2, "virtual_pipeline": 1}),
        ("parallel.virtual_pipeline", "1", "2"),
    ),
    setting("parallel.data", 4, "questions_per_step"),
    setting("parallel.context", 3, "3", "4 attention heads", "choose one of [1, 2, 4]"),
    setting("parallel.reference", "away", "away", "resident", "offloaded"),
    setting("parallel.logprob_chunk_tokens", -1, "-1"),
    setting("parallel.micro_batch_tokens", 100, "100", "raise it"),
    Mistake(
        "no room to round a row up",
        lambda run: run.set("parallel", {"tensor": 4, "sequence": True, "micro_batch_tokens": 512 + 16 + 2}),
        ("micro_batch_tokens", "at least 531"),
    ),
    setting("prompt.max_tokens", 2040, "2056", "2048 positions"),
    setting("prompt.max_tokens", 20, "20", "tokens"),
    setting("prompt.shots", [{"question": "q", "options": {"A": "a", "B": "b"}, "response": "A"}], "boxed"),
    setting("prompt.shots", [{"question": "q", "options": {"A": "a", "B": "b"}, "response": "\\boxed{C}"}], "A, B"),
    setting("reward.name", "corect", "corect", "did you mean 'correct'"),
    setting("reward.name", "no_such_module:f", "no_such_module"),
    setting("reward.signature", "verl", "reward.name is 'correct'", "module:function"),
    setting("reward.signature", "veRL", "'alphamed', 'verl' or 'trl'"),
    setting("reward.answer_after", " ", "white space only"),
    setting("reward.answer_after", "x", "is a part of answers themselves"),
    setting("reward.answer_after", "}", "is a part of answers themselves"),
    Mistake(
        "a KL penalty without a gradient",
        lambda run: run.set("algorithm", {"kl_coefficient": 0.01, "kl_estimator": "k1"}),
        ("algorithm.kl_estimator: k1", "gradient of 0", "k2 or k3"),
    ),
    Mistake(
        "responses left out that have a gradient",
        lambda run: run.set("algorithm", {"kl_coefficient": 0.01, "skip_no_signal": True}),
        ("algorithm.skip_no_signal", "0.01", "leave it out, or set kl_coefficient to 0"),
    ),
    Mistake(
        "a reward of another trainer",
        lambda run: own_reward(run, "def f(data_source, solution_str, ground_truth, extra_info=None): return 1.0"),
        ("reward.name", "data_source", "question (", "set reward.signature=verl"),
    ),
    Mistake(
        "a reward that fails",
        lambda run: own_reward(run, "def f(text): return {}['key']"),
        ("reward.name", "a right answer to question 'q0'", "KeyError: 'key'", "own_rewards.py, line 1"),
    ),
    Mistake(
        "a reward that hangs",
        lambda run: (own_reward(run, "def f(text):\n    while True: pass"), run.set("reward.timeout_s", 0.5)),
        ("reward.name", "within 0.5 s"),
    ),
    setting(
        "prompt.shots",
        [{"question": "q", "options": {"A": "a", "B": "b"}, "response": "<think>\\boxed{A}</think> so it is"}],
        "boxed",
    ),
    setting("model.path", "/no/such/folder", "/no/such/folder"),
    setting("model.path", "", "model.path"),
    setting("data.train", [], "train"),
    setting("data.bad_rows", "ignore", "ignore", "'skip'"),
    elsewhere("evaluation.before", True, "evaluation.files"),
    elsewhere("evaluation.files", ["absent.jsonl"], "absent.jsonl", "no such file"),
    Mistake(
        "evaluation on training questions",
        lambda run: run.set(
            "evaluation.files",
            [str(run.rows([QUESTION | {"id": "e", "question": "which vitamin prevents SCURVY"}], "e.jsonl"))],
        ),
        ("evaluation.files: 1 of 1 questions are in data.train too (the first: e is", "evaluation.allow_overlap=true"),
    ),
    setting("rollout.replay", "absent", "absent", "rollouts"),
    Mistake(
        "a replay that is too short",
        lambda run: (
            (run.folder / "old" / "rollouts").mkdir(parents=True),
            (run.folder / "old" / "rollouts" / "step_000001.parquet").touch(),
            run.set("rollout.replay", str(run.folder / "old")),
        ),
        ("rollout.replay", "steps 1 to 1", "to step 2", "run.stop_after"),
    ),
    Mistake(
        "a replay at another temperature",
        lambda run: recorded(run, {"rollout": {"temperature": 0.5}}),
        ("rollout.temperature: 1.0", "were sampled with 0.5", "set it back"),
    ),
    Mistake(
        "a replay by another reward",
        lambda run: recorded(run, {"reward": {"name": "format_only"}}),
        ("reward.name: 'correct'", "were given with 'format_only'", "--only reward reward.name=correct"),
    ),
    Mistake(
        "decisions that are not there",
        lambda run: evaluated(run, "nope.yaml"),
        ("evaluation.decisions: decisions nope.yaml: no such file",),
    ),
    Mistake(
        "decisions that are something else",
        lambda run: evaluated(run, str(run.rows([QUESTION], "e2.jsonl"))),
        ("evaluation.decisions", "e2.jsonl", "version: missing"),
    ),
    Mistake(
        "decisions that leave nothing",
        lambda run: evaluated(run, decisions(run, "quarantine")),
        ("evaluation.decisions", "none of the 1 questions", "e.jsonl"),
    ),
    setting("run.seed", 2**63, "9223372036854775808", "less than 9223372036854775808"),
    override("run.seed=" + 5000 * "9", "run.seed", "not valid"),
    setting("run.name", 300 * "x", "at most 200 characters"),
    setting("run.root", "/proc", "/proc/run", "choose another"),
    setting("run.root", "/etc/passwd", "/etc/passwd/run", "choose another"),
    setting("run.root", 300 * "x", "File name too long", "choose another"),
    setting("rollout.gpu_memory_utilization", 0, "greater than 0"),
    setting("cluster.device", "cuda", "GPU"),
    setting("cluster.engine_cores", "0-999", "999"),
    setting("cluster.engine_cores", "first", "first"),
    setting("sync.transport", "nccl", "nccl", "gloo"),
    setting("model.fp8", True, "fp8", "CUDA"),
]
DATA = [
    elsewhere("data.train", ["absent.jsonl"], "absent.jsonl", "no such file"),
    Mistake(
        "data of another kind", lambda run: run.set("data.train", [str(run.rows([], "train.xlsx"))]), (".xlsx", ".jsonl")
    ),
    Mistake("empty data", lambda run: run.rows([]), ("train.jsonl", "empty")),
    Mistake("not JSON", lambda run: (run.folder / "train.jsonl").write_text('{"id": '), ("train.jsonl:1", "not JSON")),
    Mistake("Latin-1", lambda run: (run.folder / "train.jsonl").write_bytes(b'{"id": "\xe9"}'), ("encoding", "0xe9")),
    Mistake("not Parquet", lambda run: run.set("data.train", [str(run.rows([QUESTION], "train.parquet"))]), ("Parquet",)),
    Mistake("a file twice", lambda run: run.set("data.train", run.tree["data"]["train"] * 2), ("twice",)),
    row("the id of another", "duplicate", "q0", id="q0"),
    row("no answer", "answer", answer=...),
    row("an answer outside its options", "answer", "'E'", answer="E"),
    row("an empty option", "option", options={"A": "x", "B": " ", "C": "z"}),
    row("equal options", "option", options={"A": "x", "B": "x", "C": "z"}),
    row("one option", "option", options={"B": "x"}),
    row("options in a number", "options", options=4),
    row("one option in a list", "option", options=["x"]),
    row("no question", "question", question=...),
    row("a level of 9", "level", "9", level=9),
    Mistake("a row that is a number", lambda run: run.rows([QUESTION, 5]), ("train.jsonl:2",)),
]
MODELS = [
    model("no config.json", lambda folder: (folder / "config.json").unlink(), "config.json"),
    model("a broken config.json", lambda folder: (folder / "config.json").write_text("{"), "config.json", "cannot be read"),
    model("another family", lambda folder: edit_config(folder, model_type="gpt2"), "model_type", "gpt2", "llama"),
    model("no layers", lambda folder: edit_config(folder, num_hidden_layers=None), "num_hidden_layers", "missing"),
    model("another size in config.json", lambda folder: edit_config(folder, intermediate_size=256), "[128, 64]"),
    model(
        "heads that vLLM cannot compute on CPU",
        lambda folder: edit_config(folder, head_dim=48),
        "heads of 48",
        "cluster.device",
    ),
    model("quantised weights", lambda folder: edit_config(folder, quantization_config={"bits": 4}), "quantization_config"),
    model("no weights", lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    model("half its weights", lambda folder: truncate(folder / "model.safetensors", 0.5), "model.safetensors", "complete"),
    model(
        "a missing shard",
        lambda folder: (
            (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors"),
            (folder / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}})
            ),
        ),
        "model-00002-of-00002",
        "missing",
    ),
    model("no tokenizer", lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
    model("a broken tokenizer", lambda folder: truncate(folder / "tokenizer.json", 0.5), "tokenizer.json"),
    model(
        "no chat template", lambda folder: (folder / "chat_template.jinja").unlink(), "chat template", "prompt.template=raw"
    ),
    model("a broken chat template", lambda folder: (folder / "chat_template.jinja").write_text("{% for"), "template"),
]
MISTAKES = [*CONFIGS, *DATA, *MODELS]


@pytest.fixture(scope="module")
def good_model(tmp_path_factory) -> Path:
    return tiny_hf(tmp_path_factory.mktemp("model") / "tiny", head_dim=32)


@pytest.fixture
def run(tmp_path, good_model, monkeypatch) -> Run:
    monkeypatch.chdir(tmp_path)
    return Run(tmp_path, good_model)


def command(run: Run, mistake: Mistake) -> list[str]:
    mistake.break_it(run)
    arguments = [text.replace("{folder}", str(run.folder)) for text in mistake.arguments]
    if "--config" not in arguments:
        arguments = ["--config", str(run.write()), *arguments]
    return ["train", *arguments]


def one_line(text: str, mistake: Mistake) -> None:
    lines = text.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), text
    for word in mistake.words:
        assert word in lines[0], f"{word!r} is not in: {lines[0]}"


def test_the_run_that_the_table_breaks_is_in_order(run, capsys):
    assert main(["train", "--check", "--config", str(run.write())]) == 0
    printed = capsys.readouterr().out
    assert "in order; 4 questions" in printed
    assert "reward correct: 1 for a right answer, 0 for a wrong answer, 0 for an empty answer\n" in printed


def test_a_check_shows_what_a_reward_of_ones_own_gives(run, capsys):
    own_reward(
        run,
        "def f(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    return {'score': 0.5 if '{' + ground_truth + '}' in solution_str else -len(data_source + '12') / 4}",
    )
    run.set("reward.signature", "verl")
    assert main(["train", "--check", "--config", str(run.write())]) == 0
    assert "reward own_rewards:f: 0.5 for a right answer, -0.5 for a wrong answer, -0.5 for an" in capsys.readouterr().out


def test_a_check_counts_the_questions_that_an_evaluation_asks(run, capsys):
    """Three questions in each of two files: all, or at most two of each, or none where no evaluation is asked for."""
    rows = [QUESTION | {"id": f"e{i}", "question": f"Which is {i}?"} for i in range(3)]
    files = [str(run.rows(rows, "a.jsonl")), str(run.rows([row | {"id": "f" + row["id"]} for row in rows], "b.jsonl"))]
    for wanted, asked in (({"before": True}, 6), ({"after": True, "questions": 2}, 4), ({}, 0)):
        run.set("evaluation", {"files": files, "allow_overlap": True} | wanted)
        assert main(["train", "--check", "--config", str(run.write())]) == 0
        assert f" {asked} for evaluation, " in capsys.readouterr().out


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_is_one_line(run, capsys, mistake):
    assert main(command(run, mistake)) == 2
    captured = capsys.readouterr()
    one_line(captured.err, mistake)
    assert captured.out == ""
    assert not (run.folder / "runs").exists()  # nothing was begun


@pytest.mark.parametrize("mistake", [CONFIGS[3], DATA[9], MODELS[7]], ids=lambda mistake: mistake.name)
def test_a_mistake_is_one_line_as_a_user_starts_it(run, mistake):
    done = subprocess.run(
        [sys.executable, "-m", "alphamed.cli", *command(run, mistake)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 2
    one_line(done.stderr, mistake)
    assert done.stdout == ""


@pytest.mark.parametrize("mistake", [CONFIGS[3], DATA[9], MODELS[7]], ids=lambda mistake: mistake.name)
def test_a_mistake_is_one_line_from_a_launcher(run, mistake):
    """A launcher of the shipped form beside a configuration of its own name."""
    arguments = command(run, mistake)
    (run.folder / "examples").mkdir()
    launcher = run.folder / "examples" / "run.sh"
    launcher.write_text((ROOT / "examples" / "train_alphamed_8b.sh").read_text())
    Path(arguments[2]).rename(launcher.with_suffix(".yaml"))
    bin_folder = run.folder / ".venv" / "bin"
    bin_folder.mkdir(parents=True)
    (bin_folder / "python").symlink_to(sys.executable)
    (run.folder / ".venv" / "pyvenv.cfg").write_text((Path(sys.prefix) / "pyvenv.cfg").read_text())
    (run.folder / ".venv" / "lib").symlink_to(Path(sys.prefix) / "lib")
    done = subprocess.run(["bash", str(launcher), *arguments[3:]], capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    one_line(done.stderr, mistake)
    assert done.stdout == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, world, words",
    [
        (("rollout.egnines=2",), 2, ("did you mean 'engines'",)),
        (("data.train=[absent.jsonl]", "parallel.tensor=2"), 2, ("absent.jsonl", "no such file")),
        (("parallel.tensor=4",), 1, ("needs 4 ranks", "started 1;", "PET_NPROC_PER_NODE=4")),
    ],
)
def test_under_a_bare_torchrun_rank_0_says_the_line_once(run, arguments, world, words):
    """torchrun adds its own summary and exit code."""
    launcher = run.folder / "run.sh"
    launcher.write_text((ROOT / "examples" / "train_alphamed_8b.sh").read_text())
    run.write().rename(launcher.with_suffix(".yaml"))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={world}", str(launcher), *arguments],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and all(word in said[0] for word in words), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("late, setting", [(0, "rollout.egnines=2"), (1, "rollout.egnines=2")])
def test_the_line_under_a_bare_torchrun_does_not_depend_on_which_rank_is_first(run, late, setting):
    """torchrun ends all ranks with the first that ends; here one comes seconds after the other."""
    launcher = run.folder / "run.sh"
    launcher.write_text((ROOT / "examples" / "train_alphamed_8b.sh").read_text())
    run.write().rename(launcher.with_suffix(".yaml"))
    (run.folder / "sitecustomize.py").write_text(
        f"import os, time\nif os.environ.get('RANK') == '{late}':\n    time.sleep(8)\n"
    )
    path = os.pathsep.join([str(run.folder), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", str(launcher), setting],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == 1
    assert done.stderr.count("error: rollout.egnines: ") == 1, done.stderr
