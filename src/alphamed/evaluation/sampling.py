"""Several samples of a question taken together: majority vote, pass@k, runs and their bootstrap intervals. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

BOOTSTRAP_DRAWS = 10_000


def pass_at_k(right: Sequence[int], samples: int, k: int) -> float:
    """Unbiased estimate of the chance that at least one of k samples is right, mean over questions.

    `right[i]` of `samples` samples of question i are right: mean of 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, arXiv
    2107.03374, equation 1). ValueError for k outside 1..samples, or without questions.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k}: needs 1 to {samples} of the {samples} samples; choose another k")
    if not right:
        raise ValueError("pass@k of no question; give at least one")
    every = math.comb(samples, k)
    return sum(1 - math.comb(samples - count, k) / every for count in right) / len(right)


def shown_ks(samples: int) -> list[int]:
    """The k that results list: powers of two up to the number of samples, and that number."""
    return sorted({2**i for i in range(samples.bit_length()) if 2**i <= samples} | {samples})


def vote(letters: Sequence[str | None], key: str) -> float:
    """Chance that a majority vote is right: 1 or 0, with a tie broken at random 1 / tied where the key is among them.
    None (no readable answer) does not vote; 0 where none does."""
    counts = Counter(letter for letter in letters if letter is not None)
    most = max(counts.values(), default=0)
    tied = [letter for letter, count in counts.items() if count == most]
    return 1 / len(tied) if key in tied else 0.0


# ------------------------------------------------------------------------------------------------------------ bootstrap
def bootstrap_mean(values: Sequence[float], seed: int = 0, draws: int = BOOTSTRAP_DRAWS) -> tuple[float, float]:
    """95% percentile interval of the mean of `values`, resampled with replacement; (value, value) for a single one.

    With few values (five runs) the interval is narrower than it ought to be, about by sqrt((n - 1) / n).
    """
    return bootstrap_mean_of_means([values], seed, draws)


def bootstrap_mean_of_means(
    groups: Sequence[Sequence[float]], seed: int = 0, draws: int = BOOTSTRAP_DRAWS
) -> tuple[float, float]:
    """95% percentile interval of the mean over groups of each group's mean; every group is resampled within itself.
    ValueError where a group is empty."""
    import numpy as np

    if not groups or not all(len(values) for values in groups):
        raise ValueError("a bootstrap needs at least one value in every group")
    generator = np.random.default_rng(seed)
    total = np.zeros(draws)
    for values in groups:
        # how often each different value is drawn: as exact as drawing places, and 4,183 questions cost nothing
        different, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
        drawn = generator.multinomial(len(values), counts / len(values), size=draws)
        total += drawn @ different / len(values)
    low, high = np.quantile(total / len(groups), (0.025, 0.975))
    return float(low), float(high)
