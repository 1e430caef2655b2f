"""Trained tokens per second, forward and backward, of the same model and batches: transformers, and this trainer with
prompts shared and not.

    .venv/bin/python benchmarks/training.py [--model FOLDER] [--prompts 32 300] [--questions 2] [--samples 8]

One process, the same number of threads, the same loss (GRPO's at ratio 1), FP32 on a CPU and bf16 on a GPU. transformers
gets one question at a time, its samples padded to the longest and logits at the responses only (SDPA attention); the trainer
packs what `--budget` tokens hold. Neither takes an optimizer step. The methods run in turn, `--repeats` times after one that does
not count; gradient norms must agree. Tokens are response tokens; numbers are medians. `--model`: by default the model of
benchmarks/step.yaml, SmolLM2-135M.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")

from alphamed.batching import pack
from alphamed.config.loading import build_config, load_config
from alphamed.config.schema import Config
from alphamed.megatron import runtime as runtimes
from alphamed.model.shape import ModelShape, read_shape, resolve
from alphamed.records import MiniBatch, TokenGroup

STEP_CONFIG = Path(__file__).with_name("step.yaml")
NORM_TOLERANCE = {"fp32": 0.01, "bf16": 0.05}
Pass = Callable[[], float]
"""One forward and backward pass over the whole batch; returns the gradient's norm."""


def main() -> None:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--model", help="a Hugging Face folder")
    parser.add_argument("--prompts", type=int, nargs="+", default=[32, 300], help="lengths of the prompts, a table for each")
    parser.add_argument("--questions", type=int, default=2)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--responses", type=int, default=64, help="longest response; the shortest is half of it")
    parser.add_argument("--budget", type=int, default=2048, help="tokens of a packed row")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    default = load_config(STEP_CONFIG).model
    folder = resolve(options.model or default.path, None, default.cache)
    config, shape = _config(folder, options), read_shape(folder)
    runtime = runtimes.start(config)
    print(
        f"{folder.name}: {shape.parameters:,} parameters, {config.model.dtype} on {runtime.device}, "
        f"{torch.get_num_threads()} threads; {options.questions} x {options.samples} responses of {options.responses // 2} "
        f"to {options.responses} tokens; medians of {options.repeats}"
    )
    print(f"{'prompt':>6}  {'method':<24}{'seconds':>9}{'tokens/s':>10}{'of transformers':>17}")
    theirs = _Transformers(folder, runtime.device, config)
    ours = {share: _Trainer(config, shape, runtime, folder, share) for share in (False, True)}
    for prompt in options.prompts:
        groups = _groups(shape.vocab, prompt, options)
        passes = {
            "transformers, padded": theirs.on(groups),
            "packed": ours[False].on(groups),
            "packed, prompts shared": ours[True].on(groups),
        }
        _table(prompt, passes, sum(len(r) for g in groups for r in g.responses), options.repeats, str(config.model.dtype))
    runtimes.stop(runtime)


def _config(folder: Path, options: argparse.Namespace) -> Config:
    dtype = "bf16" if torch.cuda.is_available() else "fp32"
    return build_config(
        {
            "model": {"path": str(folder), "dtype": dtype},
            "data": {"train": ["-"]},
            "prompt": {"max_tokens": max(options.prompts)},
            "rollout": {
                "questions_per_step": options.questions,
                "samples_per_question": options.samples,
                "max_response_tokens": options.responses,
            },
            "parallel": {"micro_batch_tokens": options.budget, "distributed_optimizer": False},
        }
    )


def _groups(vocab: int, prompt: int, options: argparse.Namespace) -> list[TokenGroup]:
    random = torch.Generator().manual_seed(prompt)

    def ids(n: int) -> Tensor:
        return torch.randint(0, vocab, (n,), generator=random)

    lengths = torch.linspace(options.responses // 2, options.responses, options.samples).long().tolist()
    return [
        TokenGroup(
            ids(prompt),
            tuple(map(ids, lengths)),
            tuple(map(torch.zeros, lengths)),
            torch.linspace(-1, 1, options.samples),
            policy_version=0,
        )
        for _ in range(options.questions)
    ]


def _table(prompt: int, passes: dict[str, Pass], tokens: int, repeats: int, dtype: str) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    norms = {name: run() for name, run in passes.items()}  # does not count
    first = next(iter(norms.values()))
    for name, norm in norms.items():
        if abs(norm / first - 1) > NORM_TOLERANCE[dtype]:
            raise SystemExit(f"{name}: gradient norm {norm:.6g}, transformers' is {first:.6g}: not the same work")
    for _ in range(repeats):
        for name, run in passes.items():
            began = time.perf_counter()
            run()  # reads the norm, and so waits for the device
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    theirs = next(iter(medians.values()))
    for name, own in medians.items():
        print(f"{prompt:>6}  {name:<24}{own:>9.3f}{tokens / own:>10.0f}{theirs / own:>17.2f}", flush=True)


class _Trainer:
    """This project's model and schedule."""

    def __init__(self, config: Config, shape: ModelShape, runtime: runtimes.Runtime, folder: Path, share: bool) -> None:
        from alphamed.megatron.policy import Policy
        from alphamed.weights.hf_io import load_hf

        tree = config.model_dump(mode="json")
        tree["parallel"]["share_prompts"] = share
        self.policy = Policy(build_config(tree), shape, runtime)
        load_hf(folder, self.policy.model_chunks(), shape, self.policy.layout)

    def on(self, groups: Sequence[TokenGroup]) -> Pass:
        parallel = self.policy.config.parallel
        (mini,) = pack(
            groups, self.policy.layout, token_budget=parallel.micro_batch_tokens, share_prompts=parallel.share_prompts
        ).mini_batches
        return lambda: self._run(mini)

    def _run(self, mini: MiniBatch) -> float:
        from alphamed.megatron.step import forward_backward

        policy = self.policy
        forward_backward(policy._wrapped, mini, policy.layout, policy.runtime.device, policy.config)
        return _norm([p.main_grad for chunk in policy.model_chunks() for p in chunk.parameters()])


class _Transformers:
    """The same loss by transformers' model and autograd."""

    def __init__(self, folder: Path, device: torch.device, config: Config) -> None:
        from transformers import AutoModelForCausalLM

        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[str(config.model.dtype)]
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").to(device)
        self.device = device

    def on(self, groups: Sequence[TokenGroup]) -> Pass:
        total = sum(len(r) for g in groups for r in g.responses)
        return lambda: self._run(groups, total)

    def _run(self, groups: Sequence[TokenGroup], total: int) -> float:
        self.model.zero_grad()
        for group in groups:
            rows = [torch.cat([group.prompt, response]) for response in group.responses]
            tokens = pad_sequence(rows, batch_first=True).to(self.device)
            filled = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(self.device)
            labels = pad_sequence(list(group.responses), batch_first=True).to(self.device)
            mask = pad_sequence([torch.ones(len(r)) for r in group.responses], batch_first=True).to(self.device)
            logits = self.model(input_ids=tokens, attention_mask=filled, logits_to_keep=labels.shape[1] + 1).logits[:, :-1]
            logprobs = torch.log_softmax(logits.float(), -1).gather(2, labels[..., None])[..., 0]
            (-(group.advantages.to(self.device)[:, None] * logprobs * mask).sum() / total).backward()
        return _norm([p.grad for p in self.model.parameters()])


def _norm(gradients: Sequence[Tensor]) -> float:
    return torch.stack([gradient.float().norm() for gradient in gradients]).norm().item()


if __name__ == "__main__":
    main()
