"""A tiny model learns from the reward: `alphamed train` with real parts (Megatron policy, vLLM under Ray, reward process,
weights pushed after every step) on 24 questions, and a control in which the reward knows nothing.

The model (`tiny_reader`) answers in the right form and says of four options which letter has the remedy it named, but does
not know which remedy is right: it starts from chance, 1/4. Every step asks all 24 questions (one epoch), the options in a
new order: neither a letter nor a place can be learnt, only the remedy of each ailment. Shares are counted here, from the
recorded responses and the true key, over the last five steps: 5 x 24 questions x 8 samples.

Learning. Right answers must exceed 0.8 (seed 1 went from 0.24 to 0.96).
Control. The same run with `data.answer_keys: shuffled`: it learns keys that say nothing about the truth. A key agrees with
the true one with a probability of 1/4, for 24 questions 12 times or more with one of 0.7%; so right answers must stay below
0.5, while the reward, which such keys can give as well as true ones, rises.
"""

import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from tiny_reader import PROMPT, UNKNOWN, tiny_reader, unknown_questions

from alphamed.answers.extraction import extract_answer
from alphamed.files import read_json_lines
from alphamed.records import Question
from alphamed.rundir.rollout_files import question_json, read_rollouts, rollout_path

pytestmark = pytest.mark.slow

SEED = 1
STEPS = 40
SAMPLES = 8
CONFIG = """
model: {{path: model, dtype: fp32}}
data: {{train: [questions.jsonl], answer_keys: {keys}}}
run: {{name: {name}, seed: {seed}, steps: {steps}}}
prompt: {{template: {prompt.template}, instruction: "{prompt.instruction}", max_tokens: {prompt.max_tokens}}}
rollout: {{questions_per_step: {questions}, samples_per_question: {samples}, max_response_tokens: 4, dtype: fp32,
          deterministic: true}}
optimizer: {{lr: 5e-4, weight_decay: 0.0}}
checkpoint: {{every: 0}}
logging: {{wandb: off, report: false, export_hf: false}}
cluster: {{device: cpu}}
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with the model and its questions."""
    folder = tmp_path_factory.mktemp("learning")
    tiny_reader(folder / "model", SEED)
    (folder / "questions.jsonl").write_text("".join(question_json(q) + "\n" for q in unknown_questions(SEED)))
    return folder


def train(workplace: Path, name: str, keys: str) -> Path:
    """A run of all steps; returns its directory."""
    (workplace / f"{name}.yaml").write_text(
        CONFIG.format(name=name, seed=SEED, steps=STEPS, prompt=PROMPT, questions=len(UNKNOWN), samples=SAMPLES, keys=keys)
    )
    done = subprocess.run(
        [sys.executable, "-m", "alphamed.cli", "train", "--config", f"{name}.yaml"],
        cwd=workplace,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return workplace / "runs" / name


def said(run: Path, steps: Sequence[int]) -> list[tuple[Question, str | None]]:
    """Every question of these steps, as it was asked, with the letter that a response boxed."""
    return [
        (scored.group.question, extract_answer(rollout.text, scored.group.question.options))
        for step in steps
        for scored in read_rollouts(rollout_path(run, step))
        for rollout in scored.group.rollouts
    ]


def share_right(answers: list[tuple[Question, str | None]]) -> float:
    key = {question.id: question.options[question.answer] for question in unknown_questions(SEED)}
    right = [letter is not None and question.options[letter] == key[question.id] for question, letter in answers]
    return sum(right) / len(right)


def share_of_commonest_letter(answers: list[tuple[Question, str | None]]) -> float:
    return Counter(letter for _, letter in answers).most_common(1)[0][1] / len(answers)


def test_right_answers_rise_from_chance(workplace):
    run = train(workplace, "learning", "given")
    first, last = said(run, [1]), said(run, range(STEPS - 4, STEPS + 1))
    assert len(last) == 5 * len(UNKNOWN) * SAMPLES
    assert share_right(first) < 0.4
    assert share_right(last) > 0.8
    assert share_of_commonest_letter(last) < 0.5
    metrics = {row["step"]: row for row in read_json_lines(run / "metrics.jsonl")}
    assert min(row["reward/boxed"] for row in metrics.values()) > 0.9  # the form was known before: not what was learnt
    assert metrics[1]["reward/correct"] == pytest.approx(share_right(first))
    assert metrics[STEPS]["policy_version"] == STEPS  # the last step was sampled with the weights of all before


def test_without_a_true_key_nothing_true_is_learnt(workplace):
    run = train(workplace, "control", "shuffled")
    first, last = said(run, [1]), said(run, range(STEPS - 4, STEPS + 1))
    assert share_right(last) < 0.5
    agree = [[letter == question.answer for question, letter in answers] for answers in (first, last)]  # recorded: shuffled
    assert sum(agree[0]) / len(agree[0]) < 0.4 and sum(agree[1]) / len(agree[1]) > 0.8
