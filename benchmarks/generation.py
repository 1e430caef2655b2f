"""Generated tokens per second: this project's engines, coordinator and grading against bare vLLM in one process.

    .venv/bin/python benchmarks/generation.py [--questions 48] [--repeats 5] [--config FILE] [key=value ...]

Both sides get the same model, prompts, sampling (with the log-probs that training needs), vLLM arguments and cores: bare
vLLM is `vllm.LLM.generate` with all questions at once, this project everything between a submitted step and its graded
groups. By default the model and prompts of benchmarks/step.yaml with one engine; more engines count as so many bare ones.
Each side runs in a process of its own, one after the other, `--repeats` rounds after one that does not count. Tokens are
response tokens; numbers are medians.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from alphamed.config.loading import build_config, load_config
from alphamed.config.schema import Config
from alphamed.model.shape import read_shape, resolve
from alphamed.records import GenerationTask, Sampling
from alphamed.rollout.spec import EngineSpec, engine_environment, engine_specs

ROOT = Path(__file__).parents[1]
SIDES = ("bare vLLM", "alphamed")
DEADLINE_S = 3600.0
Round = Callable[[Sequence[GenerationTask], int], int]
"""Answers all tasks once; returns the number of response tokens."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", type=Path, default=ROOT / "benchmarks" / "step.yaml")
    parser.add_argument("--questions", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    if options.side:
        options.out.write_text(json.dumps(measure(options)), encoding="utf-8")
        return 0
    questions = ROOT / ".cache" / "medfacts" / "train.jsonl"
    if not questions.is_file():
        subprocess.run(
            [
                sys.executable,
                "-m",
                "alphamed.lab.datasets.medfacts",
                questions.parent,
                "--levels",
                "1",
                "--facts",
                "12",
                "--copies",
                "20",
            ],
            check=True,
            cwd=ROOT,
        )
    rates = {}
    print(f"{'side':<12}{'tokens/s':>10}{'of bare':>9}   {options.questions} questions, medians of {options.repeats}")
    for side in SIDES:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "rates.json"
            subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--side", side, "--out", out],
                check=True,
                cwd=ROOT,
                timeout=DEADLINE_S,
            )
            rates[side] = statistics.median(json.loads(out.read_text(encoding="utf-8")))
        print(f"{side:<12}{rates[side]:>10.0f}{rates[side] / rates[SIDES[0]]:>9.2f}", flush=True)
    return 0


def measure(options: argparse.Namespace) -> list[float]:
    """Tokens per second and engine of every round that counts."""
    from alphamed.data.prompts import PromptBuilder
    from alphamed.data.sources import load_questions
    from alphamed.data.tokenizer import load_tokenizer

    tree = load_config(options.config, options.overrides).model_dump(mode="json")
    tree["run"]["name"], tree["evaluation"]["files"] = "generation", []
    config = build_config(tree)
    folder = resolve(config.model.path, config.model.revision, config.model.cache)
    tokenizer = load_tokenizer(folder)
    prompts = PromptBuilder(tokenizer, config.prompt)
    r = config.rollout
    sampling = Sampling(r.samples_per_question, r.temperature, r.top_p, r.top_k, r.max_response_tokens)
    questions = load_questions(config.data.train, config.data.bad_rows).questions[: options.questions]
    tasks = [GenerationTask(f"g{i}", q, tuple(prompts.render(q)), sampling) for i, q in enumerate(questions)]
    start = {"bare vLLM": _bare, "alphamed": _ours}[options.side]
    engines = 1 if options.side == "bare vLLM" else r.engines
    with start(config, folder, engine_specs(config, folder, read_shape(folder), tokenizer.eos_ids)) as answer:
        answer(tasks, 0)
        rates = []
        for number in range(1, 1 + options.repeats):
            began = time.perf_counter()
            tokens = answer(tasks, number)
            rates.append(tokens / (time.perf_counter() - began) / engines)
    return rates


@contextlib.contextmanager
def _bare(config: Config, folder: Path, specs: Sequence[EngineSpec]) -> Iterator[Round]:
    spec = specs[0]
    os.environ.update(engine_environment(spec))
    if spec.cores:
        os.sched_setaffinity(0, {core for ids in spec.cores for core in ids})
    from dataclasses import fields

    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    from alphamed.rollout.engine import _engine_args, _sampling_params

    given = _engine_args(spec)  # AsyncLLM's, which have a few fields more
    llm = LLM.from_engine_args(EngineArgs(**{field.name: getattr(given, field.name) for field in fields(EngineArgs)}))

    def answer(tasks: Sequence[GenerationTask], number: int) -> int:
        params = _sampling_params(tasks[0].sampling, spec.eos_ids)
        outputs = llm.generate([{"prompt_token_ids": list(task.prompt_token_ids)} for task in tasks], params, use_tqdm=False)
        return sum(len(completion.token_ids) for output in outputs for completion in output.outputs)

    yield answer


@contextlib.contextmanager
def _ours(config: Config, folder: Path, specs: Sequence[EngineSpec]) -> Iterator[Round]:
    from alphamed.cluster import placement
    from alphamed.cluster.environment import enter, run_environment
    from alphamed.launch import guard
    from alphamed.launch.single_host import owned
    from alphamed.reward import process
    from alphamed.rollout.coordinator import Coordinator
    from alphamed.rollout.pool import EnginePool

    with contextlib.ExitStack() as stack:
        ledger = stack.enter_context(owned(config.run_dir))
        enter(run_environment(config, ledger.make_temporary_folder()))
        guard.start(config.run_dir, os.getpid())
        stack.callback(ledger.clean_up)
        placement.start_ray(config)
        stack.callback(placement.stop_ray)
        grader = process.start(config)
        pool = EnginePool.of_specs(specs, config.rollout.start_deadline_s)
        stack.callback(pool.stop)
        coordinator = Coordinator.start(config, pool, grader)

        def answer(tasks: Sequence[GenerationTask], number: int) -> int:
            return coordinator.run(f"round {number}", tasks).response_tokens

        yield answer


if __name__ == "__main__":
    sys.exit(main())
