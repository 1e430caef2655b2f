"""Batch arithmetic: questions, samples, tokens, micro-batches, and the share of time that pipeline stages wait."""

from __future__ import annotations

import math
from dataclasses import dataclass

from alphamed.planner.job import PlannedJob

PACKED_SHARE = 0.92
"""How full rows are on average: the group of a question is not split, the longest are placed first. batching.pack leaves 3
to 15% of the budget at rows of 8 to 30 groups (`batch/padding_fraction` counts only what is padded, rows themselves end
early)."""


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """A packed row: all its tokens, those that get log-probs, and the mean number of earlier tokens that each attends to."""

    tokens: float
    responses: float
    context: float

    def over(self, ranks: int) -> PlannedRow:
        """A context rank's part of the row."""
        return PlannedRow(self.tokens / ranks, self.responses / ranks, self.context)


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """One step. Token counts are expected ones; `rows` is per data rank and update."""

    questions: int
    samples: int
    updates: int
    prompt_tokens: float  # of a prompt, on average
    response_tokens: float
    trained_tokens: float  # of the step, over all data ranks, shared prompts counted once
    generated_tokens: float
    rows: int
    micro: PlannedRow
    bubble: float  # share of a stage's time in an update
    shared_fraction: float  # of the tokens that sharing prompts saves


def batch_of(job: PlannedJob) -> BatchPlan:
    """The batch of a step with the job's expected lengths."""
    prompt, response, samples = job.mean_prompt, job.mean_response, job.group_size
    questions, p = job.prompts, job.parallel
    separate = samples * (prompt - 1 + response)
    together = prompt - 1 + samples * response if p.share_prompts else separate
    updates = job.updates
    trained = questions * together
    per_rank = trained / updates / p.data
    rows = max(1, math.ceil(per_rank / (p.micro_batch_tokens * PACKED_SHARE)))
    if job.virtual > 1:  # the interleaved schedule takes a multiple of the stages
        rows = -(-rows // p.pipeline) * p.pipeline
    micro = PlannedRow(per_rank / rows, questions * samples * response / updates / p.data / rows, _context(job))
    bubble = (p.pipeline - 1) / job.virtual
    return BatchPlan(
        questions,
        job.samples,
        updates,
        prompt,
        response,
        trained,
        0.0 if job.supervised else job.samples * response,
        rows,
        micro,
        bubble / (rows + bubble),
        1 - together / separate,
    )


def fullest_row(job: PlannedJob) -> PlannedRow:
    """A row at its token budget, for memory: every token of it may get a log-prob."""
    tokens = float(job.parallel.micro_batch_tokens)
    return PlannedRow(tokens, tokens, _context(job))


def in_flight(job: PlannedJob, stage: int, rows: int | None = None) -> float:
    """PlannedRow-batches whose activations a stage holds at once, in units of all its layers (a chunk of virtual stages
    counts as its share). Megatron's 1F1B and interleaved schedules (core/pipeline_parallel/schedules.py)."""
    stages, virtual = job.parallel.pipeline, job.virtual
    rows = batch_of(job).rows if rows is None else rows
    if virtual == 1:
        return float(min(stages - stage, rows))
    warm_up = 2 * (stages - stage - 1) + (virtual - 1) * stages
    return min(warm_up + 1, rows * virtual) / virtual


def _context(job: PlannedJob) -> float:
    """Earlier tokens that a trained token attends to: its prompt, and half of its response."""
    if job.parallel.share_prompts:
        return job.mean_prompt + job.mean_response / 2
    return (job.mean_prompt + job.mean_response) / 2
