"""Published GRPO steps of another trainer, as jobs: two fix the time model's efficiencies, the others test it.

NVIDIA NeMo-RL with Megatron-Core and vLLM on DGX H100, OpenMathInstruct-2, 64 questions x 32 samples, four updates a step,
at most 4,096 tokens in all, reference and old log-probs computed, rows packed without shared prompts. Sources: NeMo-RL's
performance summary (docs/about/performance-summary.md) with the recipes it names (examples/configs/recipes/llm/performance)
for layouts and recomputation, and the article on its version 0.3 for the 70B step's parts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from alphamed.config.loading import build_config
from alphamed.lab.planner.calibration import GPU, Efficiency
from alphamed.lab.planner.shapes import published
from alphamed.lab.planner.time import step_time
from alphamed.planner.hardware import gpu
from alphamed.planner.job import PlannedJob

PROMPT_TOKENS = 100
"""Mean of OpenMathInstruct-2's questions with their chat template; published lengths do not separate prompts."""


@dataclass(frozen=True, slots=True)
class Step:
    """A published step. `parts` where they were published."""

    name: str
    job: PlannedJob
    seconds: float
    parts: dict[str, float]


def _step(
    name: str,
    model: str,
    tokens: float,
    seconds: float,
    parallel: dict[str, Any],
    engines: int,
    engine_tp: int,
    one_off: bool = False,
    **parts: float,
) -> Step:
    config = build_config(
        {
            "model": {"path": model},
            "data": {"train": ["-"]},
            "prompt": {"max_tokens": 253},
            "rollout": {
                "questions_per_step": 64,
                "samples_per_question": 32,
                "max_response_tokens": 3840,
                "engines": engines,
                "tensor_parallel": engine_tp,
                "max_concurrent_requests": 256,
                "gpu_memory_utilization": 0.8 if one_off else 0.6,
            },
            "algorithm": {"kl_coefficient": 0.01, "mini_batches": 4, "old_logprobs": "recompute"},
            "parallel": {"micro_batch_tokens": 4096, "share_prompts": False, "logprob_chunk_tokens": 0} | parallel,
        }
    )
    job = PlannedJob(
        config,
        published()[model],
        gpu("h100-80g"),
        8,
        prompt_tokens=PROMPT_TOKENS,
        response_tokens=tokens - PROMPT_TOKENS,
        colocated=not one_off,
        overlapped=one_off,
    )
    return Step(name, job, seconds, parts)


def steps() -> dict[str, Step]:
    """By key. The first two fix the efficiencies."""
    small, large, middle = "meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-70B-Instruct", "Qwen/Qwen3-32B"
    full = {"recompute": "full"}
    return {
        "8b": _step("Llama-3.1-8B, 16 H100", small, 1019, 92.8, full | dict(pipeline=2, data=8), 16, 1),
        "70b": _step(
            "Llama-3.1-70B, 64 H100",
            large,
            398,
            147.0,
            dict(tensor=4, pipeline=4, data=4),
            16,
            4,
            generate=84.0,
            update=28.0,
            logprobs=18.0,
            sync=14.0,
        ),
        "8b one off": _step(
            "Llama-3.1-8B, 8 + 8 H100, one step off", small, 1123, 64.8, full | dict(pipeline=2, data=4), 8, 1, one_off=True
        ),
        "32b": _step("Qwen3-32B, 32 H100", middle, 3251, 376.0, dict(tensor=4, pipeline=4, data=2, sequence=True), 8, 4),
        "32b one off": _step(
            "Qwen3-32B, 32 + 32 H100, one step off",
            middle,
            3251,
            200.0,
            dict(tensor=4, pipeline=4, data=2, sequence=True),
            8,
            4,
            one_off=True,
        ),
    }


CALIBRATION = ("8b", "70b")
FITTED = ("matmul", "decode_s", "handover")


def fit(start: Efficiency = GPU) -> Efficiency:
    """The efficiencies that the two calibration steps give, five numbers from five: `sync` and `other_s` straight from the
    70B step's parts; `decode_s`, `matmul` and `handover` from its generation, from its update with log-probs (in which the
    source counts the hand-over between trainer and engines), and from the 8B step's total, by Gauss-Newton."""
    import numpy as np

    small, large = (steps()[key] for key in CALIBRATION)
    other = large.seconds - sum(large.parts.values())
    efficiency = replace(start, other_s=other)
    efficiency = replace(efficiency, sync=efficiency.sync * step_time(large.job, efficiency).sync / large.parts["sync"])

    def residuals(e: Efficiency) -> np.ndarray:
        step = step_time(large.job, e)
        pairs = [
            (step_time(small.job, e).total, small.seconds),
            (step.generate, large.parts["generate"]),
            (step.training + step.handover, large.parts["update"] + large.parts["logprobs"]),
        ]
        return np.array([math.log(predicted / measured) for predicted, measured in pairs])

    for _ in range(20):
        residual, columns = residuals(efficiency), []
        for name in FITTED:
            nudge = 1e-4 * getattr(efficiency, name)
            columns.append((residuals(replace(efficiency, **{name: getattr(efficiency, name) + nudge})) - residual) / nudge)
        change = np.linalg.lstsq(np.stack(columns, 1), -residual, rcond=None)[0]
        efficiency = replace(
            efficiency,
            **{
                name: max(getattr(efficiency, name) * 0.5, getattr(efficiency, name) + float(by))
                for name, by in zip(FITTED, change, strict=True)
            },
        )
    return efficiency


def table() -> str:
    """Predicted against published seconds as Markdown; docs/plan.md holds it."""
    lines = [
        "| step | role | published | predicted | off | generate | log-probs | update | sync | other | hand-over |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key, step in steps().items():
        predicted = step_time(step.job)
        cells = [
            f"{seconds:.0f}" + (f" ({step.parts[name]:.0f})" if name in step.parts else "")
            for name, seconds in predicted.parts().items()
        ]
        cells += ["-"] * ("handover" not in predicted.parts())
        role = "calibration" if key in CALIBRATION else "unseen"
        off = round(100 * (predicted.total / step.seconds - 1))
        lines.append(
            f"| {step.name} | {role} | {step.seconds:g} | {predicted.total:.1f} | {off:+d}% | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(fit())
    print(table())
