"""What a policy does beside the fixed batch: logits, a real model's size, the first update, bf16, gradients that are not
finite. Run by worker.py.

Each function gets the folder of a tiny Llama and its data, runs on every rank, and returns what test_parity.py judges.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import oracle
import torch
import worker
from tiny import tiny_hf

from alphamed.records import TokenGroup


def logits(folder: Path, data: oracle.Data) -> dict:
    """Largest difference of logits from transformers', at every position, for all families, tied and untied."""
    found = {}
    for family in ("llama", "qwen2", "qwen3"):
        for tied in (False, True):
            with tempfile.TemporaryDirectory() as scratch:
                model = tiny_hf(Path(scratch), family, tied=tied, llama3_rope=family == "llama")
                case = worker.Case("logits", family, "", {"share_prompts": False})
                with worker.policy_of(case, model) as policy, torch.no_grad():
                    micro = worker.packed(case, policy, data.groups).mini_batches[0].micro_batches[0]
                    own = policy.model_chunks()[0].logits(micro)
                    reference, start, worst = oracle.load(model), 0, 0.0
                    for segment in micro.segments:
                        run = slice(start, start + segment.prefix)
                        expected = reference(micro.tokens[None, run]).logits[0]
                        worst = max(worst, (own[run] - expected).abs().max().item())
                        start += segment.prefix
                    found[family, tied] = {"difference": worst, "tokens": start, "largest": own.abs().max().item()}
    return found


SMOLLM2 = dict(vocab=49152, layers=30, hidden=576, ffn=1536, heads=9, kv_heads=3, head_dim=64, tied=True, scale=0.06)
"""The shape of SmolLM2-135M, at a scale of weights where FP32 rounds a little more than with the real ones: log-probs differ
by 4.5e-5 at most, the real model's by 3.2e-5."""


def size_135m(folder: Path, data: oracle.Data) -> dict:
    """Log-probs by a random model of 135M parameters, of packed rows that share their prompts, and transformers' of padded
    rows that do not."""
    generator = torch.Generator().manual_seed(5)

    def tokens(n: int) -> torch.Tensor:
        return torch.randint(0, SMOLLM2["vocab"], (n,), generator=generator)

    groups = [
        TokenGroup(
            tokens(prompt),
            tuple(map(tokens, lengths)),
            tuple(map(torch.zeros, lengths)),
            torch.ones(len(lengths)),
            policy_version=0,
        )
        for prompt, lengths in ((211, (48, 31, 48, 5)), (90, (40, 17)))
    ]
    with tempfile.TemporaryDirectory() as scratch:
        model = tiny_hf(Path(scratch), "llama", **SMOLLM2)
        with torch.no_grad():
            found = oracle.scores(oracle.load(model), [(group.prompt, list(group.responses)) for group in groups])
        case = worker.Case("135m", "llama", "", budget=600)
        with worker.policy_of(case, model) as policy:
            batch = worker.packed(case, policy, groups)
            own = worker.by_sample(policy.logprobs(batch), "old_logprobs")
            return {
                "own": own,
                "transformers": {sample: logprobs for sample, (logprobs, _) in found.items()},
                "shared": batch.metrics["batch/shared_fraction"],
                "parameters": policy.shape.parameters,
            }


def first_update(folder: Path, data: oracle.Data) -> dict:
    """Metrics of a first update without old log-probs, and with recomputed ones and a reference equal to the policy."""
    from alphamed.megatron.policy import NoReference, Reference
    from alphamed.weights.hf_io import load_hf

    case, found = worker.Case("first", "llama", "", budget=64), {}
    with worker.policy_of(case, folder) as policy:
        batch = worker.packed(case, policy, data.groups)
        found["old log-probs absent"] = policy.update(NoReference().logprobs(batch))
    with worker.policy_of(case, folder) as policy:
        reference = Reference(policy.config, policy.shape, policy.runtime)
        load_hf(folder, reference.model_chunks(), policy.shape, policy.layout)
        batch = worker.packed(case, policy, data.groups)
        found["recomputed"] = policy.update(reference.logprobs(policy.logprobs(batch)))
    return found


def offloaded_reference(folder: Path, data: oracle.Data) -> dict:
    """Log-probs of an offloaded reference, twice, and of one that stays; what the offloaded one holds between."""
    from alphamed.megatron.policy import Reference
    from alphamed.weights.hf_io import load_hf

    case, found = worker.Case("offloaded", "llama", "", {"tensor": 2, "sequence": True}, budget=64), {}
    for place in ("resident", "offloaded"):
        with worker.policy_of(case, folder, {"parallel": {"reference": place}}) as policy:
            batch = worker.packed(case, policy, data.groups)
            reference = Reference(policy.config, policy.shape, policy.runtime)
            load_hf(folder, reference.model_chunks(), policy.shape, policy.layout)
            reference.weights_changed()
            found[place] = [worker.by_sample(reference.logprobs(batch), "reference_logprobs") for _ in range(2)]
            found[f"{place} held"] = sum(p.numel() for chunk in reference.model_chunks() for p in chunk.parameters())
    return found


def bf16(folder: Path, data: oracle.Data) -> dict:
    """Three updates of the fixed batch in bf16."""
    case = worker.Case("bf16", "llama", "")
    with worker.policy_of(case, folder, {"model": {"dtype": "bf16"}}) as policy:
        bare = worker.packed(case, policy, data.groups)
        before = worker.by_sample(policy.logprobs(bare), "old_logprobs")
        batch = worker.fill(worker.fill(bare, "old_logprobs", data.old), "reference_logprobs", data.reference)
        for _ in range(3):
            policy.update(batch)
        after = worker.by_sample(policy.logprobs(bare), "old_logprobs")
        ratio = policy.update(bare)["policy/ratio_max"]
        return {
            "before": before,
            "after": after,
            "first_ratio": ratio,
            "dtype": next(policy.model_chunks()[0].parameters()).dtype,
        }


def non_finite(folder: Path, data: oracle.Data) -> dict:
    """An infinite advantage of one response, between good batches and twice in a row."""
    from alphamed.megatron.policy import UpdateError

    poisoned = [replace(data.groups[0], advantages=torch.full_like(data.groups[0].advantages, torch.inf)), *data.groups[1:]]
    found = {}
    for layout, parallel in (("tp2", {"tensor": 2}), ("pp2", {"pipeline": 2}), ("dp2", {"data": 2})):
        case = worker.Case(layout, "llama", "", parallel, budget=64)
        with worker.policy_of(case, folder, {"optimizer": {"max_skipped_steps": 1}}) as policy:
            weights = lambda: torch.cat([p.detach().flatten() for c in policy.model_chunks() for p in c.parameters()])
            good, bad = (worker.packed(case, policy, groups) for groups in (data.groups, poisoned))
            start = weights()
            result = {"bad": policy.update(bad), "unchanged": torch.equal(weights(), start)}
            result["good"] = policy.update(good)
            result["moved"] = not torch.equal(weights(), start)
            for attempt in (1, 2, 3):
                try:
                    policy.update(bad)
                    policy.require_finite()
                except UpdateError as error:
                    result |= {"raised_at": attempt, "message": str(error)}
                    break
            found[layout] = result
    return found
