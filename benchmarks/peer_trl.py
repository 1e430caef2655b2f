"""The same GRPO step with TRL, in TRL's environment: peer_trl.py MODEL PROMPTS.json ROWS.jsonl STEPS."""

import json
import re
import sys
import time

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

QUESTIONS, SAMPLES, NEW_TOKENS = 4, 8, 64
# Responses whose gradients are computed at once. Logits of all 32 and what autograd keeps of them take more than 24 GB.
MICRO_BATCH = 8


def reward(completions, answer, **_):
    """0.9 for the right letter, 0.1 for any boxed one."""
    found = [re.findall(r"\\boxed\{([A-D])\}", text) for text in completions]
    return [0.1 * bool(letters) + 0.9 * (letters[-1:] == [right]) for letters, right in zip(found, answer)]


class Clock(TrainerCallback):
    """Writes one row a step."""

    def __init__(self, path):
        self.path = path

    def on_step_begin(self, *_, **__):
        self.began = time.monotonic()

    def on_step_end(self, *_, **__):
        with open(self.path, "a") as rows:
            rows.write(json.dumps({"time/step_s": time.monotonic() - self.began}) + "\n")


def main(model, prompts, rows, steps):
    questions = Dataset.from_list(json.load(open(prompts)))
    settings = GRPOConfig(
        output_dir=rows + ".out",
        max_steps=int(steps),
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=QUESTIONS * SAMPLES // MICRO_BATCH,
        num_generations=SAMPLES,
        max_completion_length=NEW_TOKENS,
        temperature=1.0,
        learning_rate=1e-5,
        beta=0.0,
        use_cpu=True,
        bf16=False,
        fp16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        seed=0,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
        processing_class=AutoTokenizer.from_pretrained(model),
        reward_funcs=reward,
        args=settings,
        train_dataset=questions,
        callbacks=[Clock(rows)],
    )
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
