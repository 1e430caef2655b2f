"""Groups of responses -> packed micro-batches. Pure, deterministic, the same plan on every rank, O(n log n).

Invariants of `pack` (tests hold it to each of them):
  - every response of every group is in exactly one micro-batch of exactly one data rank;
  - the samples of a question are in one segment after one copy of their prompt; a group over the token budget is
    split, and only then is its prompt repeated;
  - what all prompts begin with (the stem: system prompt, worked examples) stands once at the head of each row;
  - no micro-batch exceeds the token budget, all data ranks get the same number of micro-batches (an idle one is a dummy
    that trains nothing), and rows hold a multiple of `layout.token_multiple` tokens;
  - with virtual pipeline stages the number of micro-batches is a multiple of the stages, as the interleaved schedule wants;
  - the cost of rows and of ranks is even: a stage waits for the most expensive row, the optimizer for the most expensive rank;
  - `response_tokens` and `sequences` count the whole mini-batch over all data ranks; tokens of a response without a loss
    (`TokenGroup.trained`) are read like a prompt and not counted.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from alphamed.records import Batch, Layout, MicroBatch, MiniBatch, Segment, TokenGroup

# Cost of a token pair in attention relative to a token in the dense layers, per layer: a pair takes 4 * heads * head_dim
# FLOPs where a token takes about 24 * hidden^2 (dense Llama shapes), so with heads * head_dim = hidden = 4096 about 1/24576.
ATTENTION_PAIR_COST = 1 / 24576
# Fewer common tokens are repeated: reading them takes every row one more call of the attention kernel in every layer.
SHORTEST_STEM = 32


@dataclass(frozen=True, slots=True)
class Unit:
    """What is never cut further: some samples of one group after one copy of their prompt."""

    group: int
    samples: tuple[int, ...]
    stem: int  # tokens of the row's stem that this prompt begins with; 0: it stands here whole
    prefix: int  # tokens from there to the first continuation
    continuations: tuple[int, ...]  # none when prompts are not shared

    @property
    def tokens(self) -> int:
        return self.prefix + sum(self.continuations)

    @property
    def cost(self) -> float:
        before = self.stem + self.prefix
        pairs = self.prefix * (self.stem + self.prefix / 2) + sum(n * (before + n / 2) for n in self.continuations)
        return self.tokens + ATTENTION_PAIR_COST * pairs


def pack(
    groups: Sequence[TokenGroup],
    layout: Layout,
    *,
    token_budget: int,
    mini_batches: int = 1,
    share_prompts: bool = True,
    skip_no_signal: bool = False,
) -> Batch:
    """Cut `groups` into `mini_batches` mini-batches of packed micro-batches for this data rank.

    token_budget: most tokens of a packed row; a single prompt with its response must fit. skip_no_signal: leave out responses
    whose advantage is 0, but for a mini-batch of nothing else; they are counted as if they were there, so that without a KL
    term the gradient is the same.
    Raises ValueError when there are fewer groups than mini-batches or a response cannot fit.
    """
    if len(groups) < mini_batches:
        raise ValueError(
            f"algorithm.mini_batches: {mini_batches} updates, but the step has only {len(groups)} groups; "
            f"lower it or raise rollout.questions_per_step"
        )
    stem = _stem(groups) if share_prompts else 0
    budget = token_budget - (layout.token_multiple - 1) - stem  # room to round a row up
    minis, rows, imbalance, unevenness = [], [], [], []
    for chunk in _chunks(len(groups), mini_batches):
        units = [u for g in chunk for u in _units(groups[g], g, stem, budget, share_prompts, skip_no_signal)]
        units = units or [u for g in chunk for u in _units(groups[g], g, stem, budget, share_prompts)]
        plan = _assign(units, budget, layout.data, layout.pipeline if layout.virtual_pipeline else 1)
        micro_batches = [_materialise(row, groups, layout.token_multiple) for row in plan[layout.data_rank]]
        counts = [_trained_tokens(groups[g], j) for g in chunk for j in range(len(groups[g].responses))]
        minis.append(MiniBatch(tuple(micro_batches), response_tokens=sum(counts), sequences=len(counts)))
        rows += [row for rank in plan for row in rank]
        costs = [[sum(u.cost for u in row) for row in rank] for rank in plan]
        imbalance.append(_excess([sum(rank) for rank in costs]))
        unevenness.append(max(_excess(rank) for rank in costs))
    return Batch(
        tuple(minis),
        _metrics(groups, rows, layout) | {"batch/dp_imbalance": max(imbalance), "batch/row_imbalance": max(unevenness)},
    )


def attach(batch: Batch, field: str, values: Sequence[Sequence[torch.Tensor | None]]) -> Batch:
    """A batch whose micro-batches carry `values[mini][micro]` ([T] float32, None before the last stage) as `old_logprobs` or
    `reference_logprobs`."""
    return replace(
        batch,
        mini_batches=tuple(
            replace(
                mini, micro_batches=tuple(replace(m, **{field: v}) for m, v in zip(mini.micro_batches, row, strict=True))
            )
            for mini, row in zip(batch.mini_batches, values, strict=True)
        ),
    )


def _trained_tokens(group: TokenGroup, sample: int) -> int:
    """Tokens of a response that have a loss."""
    return len(group.responses[sample]) if group.trained is None else int(group.trained[sample].sum())


def _excess(costs: Sequence[float]) -> float:
    """How far the largest is above the mean, as a share of it; 0 where there is none (a rank of dummies)."""
    return max(costs) * len(costs) / sum(costs) - 1 if any(costs) else 0.0


# ------------------------------------------------------------------------------------------------------------------ plan
def _chunks(n: int, parts: int) -> list[range]:
    """0..n-1 in `parts` consecutive ranges whose sizes differ by at most one."""
    edges = [n * i // parts for i in range(parts + 1)]
    return [range(a, b) for a, b in zip(edges, edges[1:])]


def _stem(groups: Sequence[TokenGroup]) -> int:
    """Tokens that all prompts begin with, the last of each prompt not counted: it begins the continuations."""
    first = groups[0].prompt
    common = min((_common(first, g.prompt) for g in groups[1:]), default=0)
    return common if common >= SHORTEST_STEM else 0


def _common(first: torch.Tensor, second: torch.Tensor) -> int:
    n = min(len(first), len(second)) - 1
    differ = (first[:n] != second[:n]).nonzero()
    return int(differ[0]) if len(differ) else n


def _units(
    group: TokenGroup, index: int, stem: int, budget: int, share_prompts: bool, skip_no_signal: bool = False
) -> list[Unit]:
    """budget: tokens of a row behind its stem."""
    prompt, lengths = len(group.prompt), {j: len(response) for j, response in enumerate(group.responses)}
    if prompt < 2:
        raise ValueError(f"group {index}: a prompt of {prompt} tokens; at least 2 are needed")
    if min(lengths.values()) < 1:
        raise ValueError(f"group {index}: holds an empty response; an engine returns at least one token")
    longest, prefix = max(lengths.values()), prompt - 1 - stem
    if prefix + longest > budget:
        raise ValueError(
            f"parallel.micro_batch_tokens: {budget + stem} cannot hold a prompt of {prompt} and a response of "
            f"{longest} tokens; raise it"
        )
    samples = [j for j in lengths if not skip_no_signal or group.advantages[j] != 0]
    if not share_prompts:
        return [Unit(index, (j,), 0, prefix + lengths[j], ()) for j in samples]
    parts: list[list[int]] = []
    used = budget
    for j in samples:
        if used + lengths[j] > budget:
            parts.append([])
            used = prefix
        parts[-1].append(j)
        used += lengths[j]
    return [Unit(index, tuple(part), stem, prefix, tuple(lengths[j] for j in part)) for part in parts]


def _assign(units: list[Unit], budget: int, ranks: int, multiple: int) -> list[list[list[Unit]]]:
    """plan[rank][row] = units. As few rows as fit, the same number on every rank and a multiple of `multiple`, costs of
    rows and of ranks balanced.

    Most expensive first into the cheapest row. Where that row has no room, longest first into the shortest: if that one has none
    then all rows are more than half full, so twice the least possible number of rows always suffices and a few attempts find
    a number that does.
    """
    least = max(1, -(-sum(u.tokens for u in units) // (budget * ranks)))
    enough = {*range(least, least + 3), -(-least * 5 // 4), -(-least * 3 // 2), 2 * least}
    for rows in sorted({-(-n // multiple) * multiple for n in enough}):
        for weight in (lambda u: u.cost, lambda u: u.tokens):
            filled = _fill(units, weight, rows * ranks, budget)
            if filled is not None:
                return _spread(filled, rows, ranks)
    raise AssertionError(f"{len(units)} units of at most {budget} tokens did not fit {2 * least} rows a rank")


def _fill(units: list[Unit], weight: Callable[[Unit], float], rows: int, budget: int) -> list[list[Unit]] | None:
    """Heaviest first into the lightest row; None where that has no room."""
    heap = [(0.0, 0, r) for r in range(rows)]  # weight, tokens, row
    content: list[list[int]] = [[] for _ in range(rows)]
    for i in sorted(range(len(units)), key=lambda i: (-weight(units[i]), i)):
        load, tokens, r = heap[0]
        if tokens + units[i].tokens > budget:
            return None
        heapq.heapreplace(heap, (load + weight(units[i]), tokens + units[i].tokens, r))
        content[r].append(i)
    return [[units[i] for i in sorted(row)] for row in content]


def _spread(rows: list[list[Unit]], per_rank: int, ranks: int) -> list[list[list[Unit]]]:
    """Most expensive row first to the rank with the least cost that still has room; empty rows become dummies."""
    costs = [sum(u.cost for u in row) for row in rows]
    heap = [(0.0, r) for r in range(ranks)]
    plan: list[list[list[Unit]]] = [[] for _ in range(ranks)]
    for i in sorted(range(len(rows)), key=lambda i: (-costs[i], i)):
        cost, r = heapq.heappop(heap)
        plan[r].append(rows[i])
        if len(plan[r]) < per_rank:
            heapq.heappush(heap, (cost + costs[i], r))
    return plan


# --------------------------------------------------------------------------------------------------------------- tensors
def _materialise(row: list[Unit], groups: Sequence[TokenGroup], multiple: int) -> MicroBatch:
    tokens, labels, positions, sequence, logprobs, advantages, segments, samples = [], [], [], [], [], [], [], []

    def read(context: torch.Tensor, first: int) -> None:
        """Tokens that are read and not trained on, at the positions from `first` on."""
        blank = torch.zeros(len(context))
        tokens.append(context)
        labels.append(torch.zeros_like(context))
        positions.append(torch.arange(first, first + len(context)))
        sequence.append(torch.full_like(context, -1))
        logprobs.append(blank)
        advantages.append(blank)

    stem = row[0].stem if row else 0
    if stem:
        read(groups[row[0].group].prompt[:stem], 0)
        segments.append(Segment(stem))
    for unit in row:
        group = groups[unit.group]
        head, last = group.prompt[:-1], group.prompt[-1:]
        read(head[stem:], stem)
        for j in unit.samples:
            response = group.responses[j]
            n = len(response)
            trained = torch.ones(n, dtype=torch.bool) if group.trained is None else group.trained[j]
            tokens += [last, response[:-1]]
            labels.append(torch.where(trained, response, 0))
            positions.append(torch.arange(len(head), len(head) + n))
            sequence.append(torch.where(trained, len(samples), -1))
            logprobs.append(torch.where(trained, group.rollout_logprobs[j], 0.0))
            advantages.append(torch.where(trained, group.advantages[j], 0.0))
            samples.append((unit.group, j))
        segments.append(Segment(unit.prefix, unit.continuations, attends_shared_prefix=stem > 0))
    length = sum(s.tokens for s in segments)
    padding = max(multiple, -(-length // multiple) * multiple) - length
    if padding:
        read(torch.zeros(padding, dtype=torch.int64), 0)
        segments.append(Segment(padding))
    ids = torch.cat(sequence)
    return MicroBatch(
        tokens=torch.cat(tokens),
        labels=torch.cat(labels),
        positions=torch.cat(positions),
        mask=ids >= 0,
        sequence=ids,
        rollout_logprobs=torch.cat(logprobs).float(),
        advantages=torch.cat(advantages).float(),
        segments=tuple(segments),
        samples=tuple(samples),
    )


def _metrics(groups: Sequence[TokenGroup], rows: list[list[Unit]], layout: Layout) -> dict[str, float]:
    """`rows`: of all data ranks, each of which has as many."""
    multiple = layout.token_multiple
    filled = [row[0].stem + sum(u.tokens for u in row) if row else 0 for row in rows]
    real, padded = sum(filled), sum(max(multiple, -(-n // multiple) * multiple) for n in filled)
    packed = [(unit.group, j) for row in rows for unit in row for j in unit.samples]
    unshared = sum(len(groups[g].prompt) - 1 + len(groups[g].responses[j]) for g, j in packed)
    return {
        "batch/micro_batches": len(rows) / layout.data,
        "batch/padding_fraction": 1 - real / padded,
        "batch/shared_fraction": 1 - real / unshared,
        "batch/skipped_fraction": 1 - len(packed) / sum(len(g.responses) for g in groups),
    }
