"""The trainer's half of a step on one GPU, at real sizes, beside what `alphamed plan` says of it: seconds, MFU, peak memory.

    .venv/bin/python benchmarks/trainer.py [--shapes llama-1b llama-3b] [--precision bf16 fp8] [--questions 16] [--repeats 3]

Models of Llama 3.2's shapes with random weights, questions of equal prompts with 8 responses of different lengths, rows as
long as `parallel.micro_batch_tokens` allows. Each line is a process of its own: log-probs of the old policy, then forward,
backward and AdamW. `peak` is torch's own count (`max_memory_allocated`), `planned` the plan's for the same rows, without what
is outside of torch's allocator. MFU counts model FLOPs (no recomputation) against the GPU's dense BF16 rate. Medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings

import torch

warnings.simplefilter("ignore")

from alphamed.batching import pack
from alphamed.config.loading import build_config
from alphamed.config.schema import Config
from alphamed.lab.planner.time import step_time
from alphamed.megatron import runtime as runtimes
from alphamed.model.shape import ModelShape, shape_of
from alphamed.planner import hardware
from alphamed.planner.batch import PlannedRow
from alphamed.planner.job import PlannedJob
from alphamed.planner.memory import stage_use
from alphamed.records import TokenGroup

LLAMA = {
    "model_type": "llama",
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_theta": 500000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
SHAPES = {
    "llama-1b": LLAMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
    },
    "llama-3b": LLAMA
    | {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}
SAMPLES = 8
OUTSIDE = ("NCCL and CUDA", "sync buckets")
"""Causes that torch's allocator does not see, or that a trainer without engines does not have."""
GIB = 1 << 30
DEADLINE_S = 600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--precision", nargs="+", choices=["bf16", "fp8"], default=["bf16", "fp8"])
    parser.add_argument("--recompute", nargs="+", choices=["none", "selective", "full"], default=["none", "full"])
    parser.add_argument("--gpu", default="h100-80g", help="what the plan assumes")
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=300)
    parser.add_argument("--response", type=int, default=600, help="longest; the shortest is half of it")
    parser.add_argument("--budget", type=int, default=8192, help="tokens of a row")
    parser.add_argument("--unshared", action="store_true", help="prompts are not shared: Transformer Engine's attention")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one.split("/"), options)))
        return
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/trainer.py needs a CUDA device; benchmarks/training.py runs on a CPU too")
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {options.questions} x {SAMPLES} responses of "
        f"{options.response // 2} to {options.response} tokens, prompts of {options.prompt}, "
        f"{'not ' if options.unshared else ''}shared; rows of {options.budget}; medians of {options.repeats}"
    )
    print(
        f"{'model':<10}{'type':<6}{'recompute':<11}{'log-probs s':>12}{'update s':>10}{'planned':>9}{'tokens/s':>10}"
        f"{'MFU':>6}{'peak GiB':>10}{'planned':>9}{'of peak':>9}"
    )
    for shape in options.shapes:
        for recompute in options.recompute:
            for precision in options.precision:
                name = f"{shape}/{precision}/{recompute}"
                try:
                    done = subprocess.run(
                        [sys.executable, __file__, *sys.argv[1:], "--one", name],
                        capture_output=True,
                        text=True,
                        timeout=DEADLINE_S,
                    )
                    failed = (done.stderr.splitlines() or ["?"])[-1] if done.returncode else None
                except subprocess.TimeoutExpired:
                    failed = f"not done within {DEADLINE_S} s"
                if failed:
                    print(f"{shape:<10}{precision:<6}{recompute:<11}failed: {failed}", flush=True)
                    continue
                one = json.loads(done.stdout.splitlines()[-1])
                print(
                    f"{shape:<10}{precision:<6}{recompute:<11}{one['logprobs']:>12.2f}{one['update']:>10.2f}"
                    f"{one['planned_update']:>9.2f}{one['tokens'] / one['update']:>10.0f}{one['mfu']:>6.0%}"
                    f"{one['peak'] / GIB:>10.2f}{one['planned'] / GIB:>9.2f}{one['planned'] / one['peak']:>9.0%}",
                    flush=True,
                )


def config_of(precision: str, recompute: str, options: argparse.Namespace) -> Config:
    return build_config(
        {
            "model": {"path": "-", "dtype": "bf16", "fp8": precision == "fp8"},
            "data": {"train": ["-"]},
            "prompt": {"max_tokens": options.prompt},
            "rollout": {
                "questions_per_step": options.questions,
                "samples_per_question": SAMPLES,
                "max_response_tokens": options.response,
            },
            "algorithm": {"kl_coefficient": 0.0, "old_logprobs": "recompute"},
            "parallel": {
                "micro_batch_tokens": options.budget,
                "recompute": recompute,
                "share_prompts": not options.unshared,
            },
        }
    )


def measure(shape_name: str, precision: str, recompute: str, options: argparse.Namespace) -> dict[str, float]:
    config, shape = config_of(precision, recompute, options), shape_of(SHAPES[shape_name], shape_name)
    runtime = runtimes.start(config)
    from alphamed.megatron.policy import Policy

    policy = Policy(config, shape, runtime)
    groups = questions(shape, options)
    batch = pack(groups, policy.layout, token_budget=options.budget, share_prompts=config.parallel.share_prompts)
    seconds: dict[str, list[float]] = {"logprobs": [], "update": []}
    for _ in range(1 + options.repeats):  # the first does not count
        for part, run in (("logprobs", lambda: policy.logprobs(batch)), ("update", lambda: policy.update(scored))):
            torch.cuda.synchronize()
            began = time.perf_counter()
            scored = run() if part == "logprobs" else run() and scored
            torch.cuda.synchronize()
            seconds[part].append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated()
    micros = batch.mini_batches[0].micro_batches
    largest = max(micros, key=lambda micro: len(micro.tokens))
    means = [sum(len(r) for r in g.responses) / SAMPLES for g in groups]
    job = PlannedJob(
        config, shape, hardware.gpu(options.gpu), 1, prompt_tokens=options.prompt, response_tokens=sum(means) / len(means)
    )
    row = PlannedRow(
        float(len(largest.tokens)), float(int(largest.mask.sum())), options.prompt + sum(means) / len(means) / 2
    )
    causes = stage_use(job, 0, row, len(micros)).causes
    planned = step_time(job)
    medians = {part: statistics.median(found[1:]) for part, found in seconds.items()}
    runtimes.stop(runtime)
    return medians | {
        "peak": peak,
        "planned": sum(v for name, v in causes.items() if name not in OUTSIDE),
        "planned_update": planned.update,
        "planned_logprobs": planned.logprobs,
        "tokens": sum(len(r) for g in groups for r in g.responses),
        "rows": len(micros),
        "mfu": planned.model_flops / medians["update"] / job.gpu.flops,
    }


def questions(shape: ModelShape, options: argparse.Namespace) -> list[TokenGroup]:
    random = torch.Generator().manual_seed(7)

    def ids(n: int) -> torch.Tensor:
        return torch.randint(0, shape.vocab, (n,), generator=random)

    lengths = torch.linspace(options.response // 2, options.response, SAMPLES).long().tolist()
    return [
        TokenGroup(
            ids(options.prompt),
            tuple(map(ids, lengths)),
            tuple(torch.full((n,), -11.0) for n in lengths),
            torch.linspace(-1, 1, SAMPLES),
            1,
        )
        for _ in range(options.questions)
    ]


if __name__ == "__main__":
    main()
