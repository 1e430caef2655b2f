"""A plan as text for a terminal, and the wording that the page shares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from alphamed.lab.planner.advice import Advice
from alphamed.lab.planner.plan import Assessment, Plan, bottleneck, hours, mfu, steps_text, tokens_rate
from alphamed.lab.planner.topology import Seat
from alphamed.planner.hardware import GIB
from alphamed.planner.memory import Use

BAR = 28
PART_NAMES = {
    "generate": "generate",
    "logprobs": "log-probs",
    "update": "update",
    "sync": "weight sync",
    "other": "other",
    "handover": "hand-over",
}
MAX_NODES = 4
"""Nodes whose GPUs the terminal lists; pages and JSON have all."""


def text(plan: Plan, advice: Sequence[Advice]) -> str:
    """The whole plan, widths up to 120 columns."""
    return "\n".join(_lines(plan, advice))


def _lines(plan: Plan, advice: Sequence[Advice]) -> Iterator[str]:
    job, s = plan.job, plan.job.shape
    yield f"{job.config.run.name}: {job.config.model.path}, {s.parameters:,} parameters ({plan.source})"
    if plan.assessment:
        yield from _cluster(plan, plan.assessment)
        yield from _memory(plan.assessment)
        yield from _batch(plan, plan.assessment)
        yield from _time(plan, plan.assessment)
    for problem in plan.problems:
        yield f"PROBLEM  {problem}"
    yield from advice_lines(plan, advice)
    yield verdict(plan, advice)


def verdict(plan: Plan, advice: Sequence[Advice]) -> str:
    if plan.fits:
        return "It fits."
    if plan.assessment is None:
        return "This layout is illegal."
    if advice:
        return "It does not fit."
    within = (
        "on this machine"
        if plan.job.gpu.is_cpu
        else "within these nodes"
        if plan.job.nodes
        else "on up to four times as many GPUs"
    )
    return f"It does not fit, and no settings that do were found {within}."


def advice_lines(plan: Plan, advice: Sequence[Advice]) -> Iterator[str]:
    """What would make it fit, or faster."""
    for suggestion in advice:
        if plan.fits:
            yield f"FASTER   {' '.join(suggestion.overrides)}: {suggestion.seconds:.0f} s a step, {100 * suggestion.saved:.0f}% less"
        else:
            yield f"FITS     {' '.join(suggestion.overrides)}: {suggestion.seconds:.0f} s a step"


def _cluster(plan: Plan, assessment: Assessment) -> Iterator[str]:
    job, topology, p = plan.job, assessment.topology, plan.job.parallel
    device = "this machine's CPU" if job.gpu.is_cpu else f"{topology.nodes} x {job.gpus_per_node} {job.gpu.name}"
    virtual = f" x VPP {p.virtual_pipeline}" if p.virtual_pipeline else ""
    context = f" x CP {p.context}" if p.context > 1 else ""
    without = "no engines" if job.supervised else "no engines (replay)"
    engines = f"; {job.engines} engines of TP {job.rollout.tensor_parallel}" if job.engines else f"; {without}"
    yield f"\nTOPOLOGY   {device}: trainer TP {p.tensor}{context} x PP {p.pipeline}{virtual} x DP {p.data}{engines}"
    for node in range(min(topology.nodes, MAX_NODES)):
        on_gpu: dict[int, list[str]] = {}
        for seat in (seat for seat in topology.seats if seat.node == node):
            on_gpu.setdefault(seat.gpu, []).append(seat_label(seat, p.context > 1))
        yield f"  node {node:<3} " + "  ".join("+".join(labels) for labels in on_gpu.values())
    if topology.nodes > MAX_NODES:
        yield f"  ... {topology.nodes - MAX_NODES} more nodes (--html or --json lists them)"
    for group in topology.groups:
        when = "evaluation" if job.supervised and group.kind == "weight sync" else "step"
        where = "within a node" if group.within_node else f"{size(group.leaving)} leave a node each {when}"
        yield f"  {group.kind:<12} {group.number} x {group.size}, {where}"


def seat_label(seat: Seat, with_context: bool = False) -> str:
    if seat.role == "trainer":
        context = f"c{seat.context}" if with_context else ""
        return f"r{seat.rank}:t{seat.tensor}{context}d{seat.data}p{seat.pipeline}"
    return f"e{seat.engine}.{seat.worker}" if seat.role == "engine" else "-"


def _memory(assessment: Assessment) -> Iterator[str]:
    for use in assessment.uses:
        yield f"\nMEMORY     {use.role}, {use.where}: {use.total / GIB:.1f} of {use.limit / GIB:.1f} GiB"
        yield from _bars(use)
    if assessment.cache:
        cache = assessment.cache
        yield (
            f"  the KV cache holds {cache.tokens:,} tokens: {cache.full_sequences} sequences at full length, "
            f"{cache.mean_sequences} at the mean length; {cache.wanted_sequences} are configured"
        )


def _bars(use: Use) -> Iterator[str]:
    for cause, amount in use.causes.items():
        if amount:
            bar = "#" * max(1, round(BAR * amount / max(use.limit, use.total)))
            yield f"  {cause:<16} {amount / GIB:7.2f} GiB  {bar}"


def _batch(plan: Plan, assessment: Assessment) -> Iterator[str]:
    b = assessment.batch
    content = (
        f"{b.questions} prompts with {b.samples:,} responses"
        if plan.job.supervised
        else f"{b.questions} questions x {b.samples // b.questions} = {b.samples:,} samples"
    )
    yield (f"\nBATCH      {content}; expected {b.prompt_tokens:.0f} prompt + {b.response_tokens:.0f} response tokens")
    yield (
        f"  {b.trained_tokens:,.0f} tokens trained (shared prompts save {100 * b.shared_fraction:.0f}%), {b.updates} "
        f"updates of {b.rows} micro-batches a data rank of {b.micro.tokens:,.0f} tokens; bubble {100 * b.bubble:.1f}%"
    )


def _time(plan: Plan, assessment: Assessment) -> Iterator[str]:
    time, saved = assessment.time, plan.checkpoint
    assert saved is not None
    yield f"\nSTEP       {time.total:.0f} s{' (generation overlaps training)' if time.overlapped else ''}"
    longest = max(time.parts().values())
    for part, seconds in time.parts().items():
        if seconds:
            yield f"  {PART_NAMES[part]:<12} {seconds:7.1f} s  {'#' * max(1, round(BAR * seconds / longest))}"
    yield (
        f"  {tokens_rate(plan):,.0f} tokens/s/GPU, MFU of the update {100 * mfu(plan):.0f}%; bottleneck: "
        f"{PART_NAMES[bottleneck(plan)]}"
    )
    yield (
        f"  {steps_text(plan)}: {hours(plan):.1f} h, {hours(plan) * plan.job.gpus:,.0f} "
        f"{'device' if plan.job.gpu.is_cpu else 'GPU'}-hours"
    )
    if assessment.evaluations:
        e = assessment.evaluations
        added = f", those between steps add {e.added_seconds:.0f} s" if e.between and e.added_seconds < e.seconds else ""
        yield (
            f"  {e.ends + e.between} evaluation{'s' * (e.ends + e.between != 1)} of {e.questions:,} questions, {e.seconds:.0f} "
            f"s each{added}: {e.total / 3600:.1f} h of these"
        )
    elif plan.job.config.evaluation.all_files and plan.job.engines and plan.job.evaluation_questions is None:
        yield "  evaluations are not counted: their files are not here; set evaluation.questions, or plan where the files are"
    yield (
        f"  checkpoint {size(saved.bytes)}, {saved.save_s:.0f} s to save; preemption grace {saved.grace_s:.0f} s to end "
        f"the step and save, else up to {saved.at_risk_s:.0f} s of work are lost"
    )
    start = f", the engines' start {saved.start_deadline_s:,.0f} s" if plan.job.engines else ""
    yield (
        f"  deadlines: a checkpoint {saved.deadline_s:,.0f} s{start} (checkpoint.storage_bytes_per_s: "
        f"{plan.job.config.checkpoint.storage_bytes_per_s / 1e6:g} MB/s)\n"
    )


def size(amount: float) -> str:
    """Bytes with a decimal unit."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if amount >= scale:
            return f"{amount / scale:.1f} {unit}"
    return f"{amount:.0f} bytes"
