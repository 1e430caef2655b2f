"""Advantages from rewards: compares each response with the other responses to the same question."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

STD_EPSILON = 1e-6
"""Added to the standard deviation, so that differences that are only rounding are not scaled up to +-1."""


def group_advantages(
    rewards: Float[Tensor, " S"], group_ids: Int[Tensor, " S"] | Sequence[Hashable], kind: str
) -> Float[Tensor, " S"]:
    """Advantage of every response within its group, float32 [S] on the device of `rewards`.

    `group_ids[s]` is the group of response s: integers in a tensor, or any hashables. Groups may have any size and order. A
    group whose rewards are all equal, or with a single response, gets exactly 0. For a reward r in a group of n responses
    with `mean` and `std`:

    - `grpo`: (r - mean) / (std + 1e-6), with n - 1 in the denominator of std. The paper (2402.03300, section 4.1.2) does not
      specify the denominator. Public trainers use n - 1 (TRL adds 1e-4, verl 1e-6).
    - `dr_grpo`: r - mean (2503.20783).
    - `rloo`: r - mean of the others = n / (n - 1) * (r - mean) (2402.14740).

    Raises ValueError for an unknown kind, for different shapes, and for non-finite rewards.
    """
    if kind not in ADVANTAGES:
        raise ValueError(f"advantage: unknown kind {kind!r}; choose one of {', '.join(ADVANTAGES)}")
    if rewards.ndim != 1 or len(rewards) != len(group_ids):
        raise ValueError(
            f"rewards of shape {tuple(rewards.shape)} and {len(group_ids)} group ids; give one of each per response"
        )
    finite = torch.isfinite(rewards)
    if not bool(finite.all()):
        raise ValueError(f"rewards: {rewards[~finite][0].item()} is not finite; fix the reward function")
    if len(rewards) == 0:
        return rewards.float()
    group, size = _group_indices(group_ids, rewards.device)
    values = rewards.double()
    lowest = torch.full_like(size, torch.inf).scatter_reduce(0, group, values, "amin")
    values = values - lowest[group]  # equal rewards become exact zeros, whose mean has no rounding error
    centred = values - _group_sum(values, group, size)[group] / size[group]
    return ADVANTAGES[kind](centred, group, size).float()


def _grpo(centred: Tensor, group: Tensor, size: Tensor) -> Tensor:
    variance = _group_sum(centred.square(), group, size) / (size - 1).clamp(min=1)
    return centred / (variance.sqrt()[group] + STD_EPSILON)


def _dr_grpo(centred: Tensor, group: Tensor, size: Tensor) -> Tensor:
    return centred


def _rloo(centred: Tensor, group: Tensor, size: Tensor) -> Tensor:
    return centred * (size / (size - 1).clamp(min=1))[group]


ADVANTAGES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"grpo": _grpo, "dr_grpo": _dr_grpo, "rloo": _rloo}
"""Name -> function of (reward minus group mean [S], group index [S], group sizes [groups]), all float64."""


def _group_indices(group_ids: Tensor | Sequence[Hashable], device: torch.device) -> tuple[Tensor, Tensor]:
    """Dense group index of every response, int64 [S], and the size of every group, float64 [groups]."""
    if isinstance(group_ids, Tensor):
        group = torch.unique(group_ids, return_inverse=True)[1].to(device)
    else:
        index: dict[Hashable, int] = {}
        group = torch.tensor([index.setdefault(name, len(index)) for name in group_ids], device=device)
    return group, torch.bincount(group).double()


def _group_sum(values: Tensor, group: Tensor, size: Tensor) -> Tensor:
    return torch.zeros_like(size).index_add(0, group, values)
