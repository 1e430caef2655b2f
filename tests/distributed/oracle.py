"""What Policy must compute, done plainly: a padded transformers model, autograd and torch.optim.AdamW in one process.

Nothing of the code under test is used, except for the records that describe a batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from alphamed.records import TokenGroup

TEMPERATURE, CLIP_LOW, CLIP_HIGH, KL_COEFFICIENT, CAP = 0.7, 0.2, 0.28, 0.05, 2.0
SMOOTH_LR, SMOOTH_CLIP = 3e-5, (0.9, 9.0)
"""For comparisons in bf16: bounds that no ratio reaches, for a rounded ratio falls on the other side of a bound now and
then, and its token's whole gradient with it; smaller steps, for Adam's first ones are signs, which rounding turns."""
LR, BETAS, EPS, WEIGHT_DECAY, CLIP_GRAD = 1e-4, (0.9, 0.95), 1e-8, 0.01, 1.0
Sample = tuple[int, int]  # (index of the group, index of the response)


@dataclass
class Data:
    """A fixed batch: groups of unequal sizes and lengths, with old and reference log-probs of every response."""

    groups: list[TokenGroup]
    old: dict[Sample, Tensor]
    reference: dict[Sample, Tensor]


@dataclass
class Trace:
    """What a run of updates gave: loss and gradient norm of each, log-probs before the first and after the last."""

    loss: list[float]
    grad_norm: list[float]
    before: dict[Sample, Tensor]
    after: dict[Sample, Tensor]
    gradient: dict[str, Tensor]  # of the first update, unclipped, by Hugging Face name
    entropy: float  # token mean at the first update
    kl: float


def load(folder: Path, dtype: torch.dtype = torch.float32):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")


def make_data(folder: Path, seed: int = 5, vocab: int = 509) -> Data:
    """Advantages that do not sum to zero; old and rollout log-probs near the model's own, so that ratios straddle the
    clipping bounds and the loss is not 0.

    Adam turns a gradient's sign into a step, so rounding decides where a gradient is as small. With this seed three updates
    in FP32 and in FP64 give log-probs within 5e-6 for all three models; with seed 3 they are 2.8e-5 apart for qwen3.
    """
    generator = torch.Generator().manual_seed(seed)

    def tokens(n: int) -> Tensor:
        return torch.randint(3, vocab, (n,), generator=generator)

    def noise(n: int, scale: float) -> Tensor:
        return torch.randn(n, generator=generator) * scale

    sizes = [(11, [6, 9, 4]), (7, [5, 5]), (23, [1, 14, 8, 3]), (2, [12])]  # (prompt, responses)
    shapes = [(tokens(p), [tokens(r) for r in rs]) for p, rs in sizes]
    with torch.no_grad():
        own = {s: x for s, (x, _) in scores(load(folder), shapes).items()}
    groups, old, reference = [], {}, {}
    for g, (prompt, responses) in enumerate(shapes):
        for j, response in enumerate(responses):
            old[g, j] = own[g, j] + noise(len(response), 0.3)
            reference[g, j] = own[g, j] + noise(len(response), 0.5)
        rollout = tuple(old[g, j] + noise(len(r), 0.05) for j, r in enumerate(responses))
        groups.append(TokenGroup(prompt, tuple(responses), rollout, noise(len(responses), 1.0) + 0.4, policy_version=0))
    return Data(groups, old, reference)


def supervised(data: Data) -> Data:
    """The same prompts and responses as examples to imitate; of every second group some tokens have no loss."""
    marks = [
        tuple((torch.arange(len(r)) + j) % 3 != g % 2 for j, r in enumerate(group.responses))
        if g % 2
        else tuple(torch.ones(len(r), dtype=torch.bool) for r in group.responses)
        for g, group in enumerate(data.groups)
    ]
    return replace(data, groups=[replace(group, trained=own) for group, own in zip(data.groups, marks)])


def cross_entropy(model, data: Data) -> Tensor:
    """transformers' own loss of causal models (loss/loss_utils.py, ForCausalLMLoss) over one padded batch, each response with
    its own copy of the prompt: the mean over all tokens that have a loss."""
    rows, labels = [], []
    for group in data.groups:
        for response, trained in zip(group.responses, group.trained):
            rows.append(torch.cat([group.prompt, response]))
            labels.append(torch.cat([torch.full_like(group.prompt, -100), torch.where(trained, response, -100)]))
    pad = lambda lists, value: torch.nn.utils.rnn.pad_sequence(lists, batch_first=True, padding_value=value)
    return model(
        input_ids=pad(rows, 0),
        attention_mask=pad([torch.ones_like(row) for row in rows], 0),
        labels=pad(labels, -100),
        num_items_in_batch=sum(int((row != -100).sum()) for row in labels),
    ).loss


def scores(model, shapes, temperature: float = TEMPERATURE) -> dict[Sample, tuple[Tensor, Tensor]]:
    """Log-probs and entropies of every response, each in a right-padded row with its own copy of the prompt."""
    rows = {(g, j): torch.cat([p, r]) for g, (p, rs) in enumerate(shapes) for j, r in enumerate(rs)}
    padded = torch.nn.utils.rnn.pad_sequence(list(rows.values()), batch_first=True)
    filled = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows.values()], batch_first=True)
    logits = model(input_ids=padded, attention_mask=filled).logits.float() / temperature
    found = {}
    for i, ((g, j), row) in enumerate(rows.items()):
        start = len(shapes[g][0])
        table = torch.log_softmax(logits[i, start - 1 : len(row) - 1], -1)
        found[g, j] = table.gather(1, row[start:, None])[:, 0], -(table.exp() * table).sum(-1)
    return found


def objective(
    found: dict[Sample, tuple[Tensor, Tensor]],
    data: Data,
    aggregation: str = "token_mean",
    correction: bool = False,
    members: list[int] | None = None,
    clip: tuple[float, float] = (CLIP_LOW, CLIP_HIGH),
) -> tuple[Tensor, float, float]:
    """Clipped GRPO loss with a k3 KL term over the groups `members`; also the token means of entropy and KL."""
    terms, lengths, entropy, kls = [], [], 0.0, 0.0
    for (g, j), (logprobs, h) in found.items():
        if members is not None and g not in members:
            continue
        ratio = (logprobs - data.old[g, j]).exp()
        advantage = data.groups[g].advantages[j]
        term = -torch.minimum(ratio * advantage, ratio.clamp(1 - clip[0], 1 + clip[1]) * advantage)
        if correction:
            term = term * (data.old[g, j] - data.groups[g].rollout_logprobs[j]).exp().clamp(max=CAP)
        d = data.reference[g, j] - logprobs
        kl = d.exp() - d - 1
        terms.append(term + KL_COEFFICIENT * kl)
        lengths.append(len(logprobs))
        entropy, kls = entropy + h.sum().item(), kls + kl.sum().item()
    if aggregation == "token_mean":
        loss = torch.cat(terms).sum() / sum(lengths)
    elif aggregation == "sequence_mean":
        loss = torch.stack([t.mean() for t in terms]).mean()
    else:
        loss = torch.stack([t.sum() / 16 for t in terms]).mean()
    return loss, entropy / sum(lengths), kls / sum(lengths)


def train(
    folder: Path,
    data: Data,
    updates: int = 3,
    aggregation: str = "token_mean",
    correction: bool = False,
    mini_batches: list[list[int]] | None = None,
    lr: float = LR,
    clip: tuple[float, float] = (CLIP_LOW, CLIP_HIGH),
    dtype: torch.dtype = torch.float32,
    imitate: bool = False,
) -> Trace:
    """AdamW on all groups at once, or on each of `mini_batches` (indices of groups) in turn, `updates` times. The model
    computes in `dtype`; the optimizer's parameters are FP32 in any case, the model's are taken from them. `imitate`: cross
    entropy with the responses (`supervised`) in place of the policy loss."""
    data, temperature = (supervised(data), 1.0) if imitate else (data, TEMPERATURE)
    model = load(folder, dtype)
    shapes = [(g.prompt, list(g.responses)) for g in data.groups]
    own = list(model.parameters())
    masters = own if dtype == torch.float32 else [p.detach().float().requires_grad_() for p in own]
    decayed = [p for p in masters if p.ndim > 1]
    others = [p for p in masters if p.ndim == 1]  # norms and biases
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
        lr=lr,
        betas=BETAS,
        eps=EPS,
        weight_decay=WEIGHT_DECAY,
        foreach=False,
    )
    trace = Trace([], [], {}, {}, {}, 0.0, 0.0)
    for update in range(updates):
        for members in mini_batches or [None]:
            model.zero_grad()
            found = scores(model, shapes, temperature)
            loss, entropy, kl = objective(found, data, aggregation, correction, members, clip)
            if imitate:
                found, entropy = of_trained(found, data)
                loss = cross_entropy(model, data)
            loss.backward()
            if not trace.loss:
                trace.before = {s: x.detach() for s, (x, _) in found.items()}
                trace.gradient = {n: p.grad.clone() for n, p in model.named_parameters()}
                trace.entropy, trace.kl = entropy, kl
            trace.loss.append(loss.item())
            for master, p in zip(masters, own):
                master.grad = p.grad.float()
            trace.grad_norm.append(torch.nn.utils.clip_grad_norm_(masters, CLIP_GRAD).item())
            optimizer.step()
            with torch.no_grad():
                for master, p in zip(masters, own):
                    p.copy_(master)
    with torch.no_grad():
        found = scores(model, shapes, temperature)
        trace.after = {s: x for s, (x, _) in (of_trained(found, data)[0] if imitate else found).items()}
    return trace


def of_trained(found: dict[Sample, tuple[Tensor, Tensor]], data: Data) -> tuple[dict[Sample, tuple[Tensor, Tensor]], float]:
    """`found` at the tokens that have a loss, and the mean entropy there."""
    left = {(g, j): tuple(x[data.groups[g].trained[j]] for x in pair) for (g, j), pair in found.items()}
    return left, torch.cat([entropy for _, entropy in left.values()]).mean().item()
