"""Losses, KL estimators and weights: hand-worked numbers, closed-form gradients, gradcheck."""

import math

import pytest
import torch

from alphamed.algorithms.loss import (
    LOSSES,
    kl_penalty,
    normalizer,
    policy_loss,
    supervised_loss,
    token_weights,
    weighted_sum,
)
from alphamed.config.choices import Aggregation, KlEstimator, Loss

NAN, INF = math.nan, math.inf
F64 = torch.float64
logs = lambda *ratios: torch.tensor([math.log(r) for r in ratios], dtype=F64)  # noqa: E731  log pi for pi_old = 1


def loss_and_gradient(kind, ratios, advantages, sequence, weights=None, low=0.2, high=0.3, correction=None):
    """LossTerms and d loss_sum / d log pi for pi_old = 1, so that log pi = log ratio."""
    logprobs = logs(*ratios).requires_grad_()
    sequence = torch.tensor(sequence)
    weights = token_weights(sequence, "token_mean", dtype=F64) if weights is None else torch.tensor(weights, dtype=F64)
    terms = policy_loss(
        logprobs,
        torch.zeros_like(logprobs),
        torch.tensor(advantages, dtype=F64),
        weights,
        sequence,
        kind,
        low,
        high,
        correction,
    )
    terms.loss_sum.backward()
    return terms, logprobs.grad


def close(actual, expected, **tolerance):
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype), **tolerance)


# ------------------------------------------------------------------------------------------------------------ supervised
def test_supervised_loss_is_the_mean_over_all_tokens_of_the_step():
    """Two micro-batches of three tokens and of one: -(ln 1/2 + ln 1/4 + ln 1/8 + ln 1/2) / 4 = 7/4 ln 2. The mean of the
    micro-batches' means would be (2 + 1) / 2 ln 2."""
    parts = []
    for probabilities, sequence in (([0.5, 0.25, 0.9, 0.125], [0, 0, -1, 1]), ([0.5], [0])):
        logprobs = logs(*probabilities).requires_grad_()
        weights = token_weights(torch.tensor(sequence), "token_mean", dtype=F64)
        loss = supervised_loss(logprobs, weights) / normalizer("token_mean", response_tokens=4, sequences=3)
        loss.backward()
        parts.append((loss, logprobs.grad))
    close(parts[0][0] + parts[1][0], 1.75 * math.log(2))
    close(parts[0][1], [-0.25, -0.25, 0.0, -0.25])
    close(parts[1][1], [-0.25])


# ----------------------------------------------------------------------------------------------------------------- clip
# bounds 0.8 and 1.3; each line: ratio, advantage, term = -min(r A, [r] A), d term / d log pi = -r A where r A is the
# minimum and 0 where the bound is
CLIP = [
    (1.0, 2.0, -2.0, -2.0),
    (1.2, 2.0, -2.4, -2.4),
    (1.5, 2.0, -2.6, 0.0),  # min(3.0, 2.6)
    (0.5, 2.0, -1.0, -1.0),  # min(1.0, 1.6): a good token that became rarer is not clipped
    (0.5, -2.0, 1.6, 0.0),  # min(-1.0, -1.6)
    (1.5, -2.0, 3.0, 3.0),  # min(-3.0, -2.6)
    (1.5, 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize("ratio, advantage, term, gradient", CLIP)
def test_clip_by_hand(ratio, advantage, term, gradient):
    terms, grad = loss_and_gradient("clip", [ratio], [advantage], [0])
    close(terms.loss_sum, term)
    close(grad, [gradient])
    assert terms.clipped_tokens.item() == (gradient == 0.0 and advantage != 0.0)


def test_clip_sums_weighted_terms():
    ratios, advantages, expected, gradient = map(list, zip(*CLIP))
    weights = [1.0, 2.0, 3.0, 0.5, 1.0, 1.0, 1.0]
    terms, grad = loss_and_gradient("clip", ratios, advantages, [0, 0, 0, 0, 1, 1, 2], weights)
    # -2 - 2 * 2.4 - 3 * 2.6 - 0.5 * 1 + 1.6 + 3 + 0 = -10.5
    close(terms.loss_sum, -10.5)
    close(grad, [w * g for w, g in zip(weights, gradient)])
    close(terms.clipped_tokens, 2.0)
    close(terms.ratio_sum, 7.7)  # 1 + 1.2 + 1.5 + 0.5 + 0.5 + 1.5 + 1.5
    close(terms.ratio_max, 1.5)
    close(terms.tokens, 7.0)


def test_drift_by_hand():
    # k3 of ratios 2 and 1/2: (2 - 1 - ln 2) + (1/2 - 1 + ln 2) = 1/2
    terms, _ = loss_and_gradient("clip", [2.0, 0.5], [1.0, 1.0], [0, 0])
    close(terms.drift_sum, 0.5)


# ----------------------------------------------------------------------------------------------------------------- gspo
def test_gspo_by_hand():
    # sequence 0, tokens with ratios 2 and 1/2: s = (2 * 1/2)^(1/2) = 1, inside; A = 1, term -1
    # sequence 1, tokens with ratios 4, 1, 1:   s = 4^(1/3) = 1.5874 > 1.3;       A = 2, term -2.6, clipped
    # sequence 2, one token with ratio 1/2:     s = 1/2 < 0.8;                    A = -1, term -min(-0.5, -0.8) = 0.8
    ratios, advantages = [2.0, 0.5, 4.0, 1.0, 1.0, 0.5], [1.0, 1.0, 2.0, 2.0, 2.0, -1.0]
    sequence = [0, 0, 1, 1, 1, 2]
    weights = token_weights(torch.tensor(sequence), "sequence_mean", dtype=F64).tolist()
    terms, grad = loss_and_gradient("gspo", ratios, advantages, sequence, weights)
    close(terms.loss_sum, -1.0 - 2.6 + 0.8)  # one term per sequence, as in the paper
    # d s / d log pi_t = s / length: sequence 0 gives -A s / 2 per token, clipped sequences 0
    close(grad, [-0.5, -0.5, 0.0, 0.0, 0.0, 0.0])
    close(terms.clipped_tokens, 4.0)
    close(terms.ratio_max, 4 ** (1 / 3))
    close(terms.ratio_sum, 2 * 1.0 + 3 * 4 ** (1 / 3) + 0.5)


def test_gspo_with_token_weights_counts_each_token():
    # s = 1.21^(1/2) = 1.1, A = 1: two tokens, each with the sequence's term; d/d log pi_t = -(2 * 1.1) / 2
    terms, grad = loss_and_gradient("gspo", [1.21, 1.0], [1.0, 1.0], [0, 0])
    close(terms.loss_sum, -2.2)
    close(grad, [-1.1, -1.1])


# ---------------------------------------------------------------------------------------------------------------- cispo
@pytest.mark.parametrize(
    "ratio, advantage, bounded",
    [(1.1, 2.0, 1.1), (1.5, 2.0, 1.3), (1.5, -2.0, 1.3), (0.5, 2.0, 0.8), (0.5, -1.0, 0.8), (1.5, 0.0, 1.3)],
)
def test_cispo_by_hand(ratio, advantage, bounded):
    terms, grad = loss_and_gradient("cispo", [ratio], [advantage], [0])
    close(terms.loss_sum, -bounded * advantage * math.log(ratio))
    close(grad, [-bounded * advantage])  # a clipped token keeps a gradient
    assert terms.clipped_tokens.item() == (bounded != ratio and advantage != 0.0)


def test_cispo_without_a_lower_bound():
    _, grad = loss_and_gradient("cispo", [0.01], [1.0], [0], low=1.0)
    close(grad, [-0.01])


# -------------------------------------------------------------------------------------------------- all losses together
@pytest.mark.parametrize("kind", LOSSES)
def test_first_update_is_the_policy_gradient(kind):
    # ratio 1: every loss has the gradient -A of plain REINFORCE, nothing is clipped, drift is 0
    logprobs = logs(0.3, 0.2, 0.9).requires_grad_()
    terms = policy_loss(
        logprobs,
        logprobs.detach(),
        torch.tensor([1.5, 1.5, -0.5], dtype=F64),
        torch.ones(3, dtype=F64),
        torch.tensor([0, 0, 1]),
        kind,
        0.2,
        0.3,
    )
    terms.loss_sum.backward()
    close(logprobs.grad, [-1.5, -1.5, 0.5])
    close(terms.ratio_sum, 3.0)
    assert terms.clipped_tokens == 0 and terms.drift_sum == 0 and terms.ratio_max == 1


@pytest.mark.parametrize("kind", LOSSES)
def test_correction_multiplies_each_term(kind):
    correction = torch.tensor([0.5, 2.0, 0.0], dtype=F64, requires_grad=True)
    _, plain = loss_and_gradient(kind, [1.0, 1.0, 1.0], [1.0, 1.0, -1.0], [0, 1, 2])
    _, corrected = loss_and_gradient(kind, [1.0, 1.0, 1.0], [1.0, 1.0, -1.0], [0, 1, 2], correction=correction)
    close(corrected, [0.5 * plain[0], 2.0 * plain[1], 0.0])
    assert correction.grad is None


@pytest.mark.parametrize("kind", LOSSES)
def test_what_lies_outside_the_responses_is_ignored(kind):
    ratios, advantages, sequence = [1.1, 0.9, 1.4], [1.0, 1.0, -2.0], [0, 0, 1]
    plain, grad = loss_and_gradient(kind, ratios, advantages, sequence)
    nan = torch.tensor([NAN], dtype=F64)
    logprobs = torch.cat([nan, logs(1.1, 0.9), -nan, logs(1.4), nan + INF]).requires_grad_()
    index = torch.tensor([-1, 0, 0, -1, 1, -1])
    old = torch.tensor([NAN, 0.0, 0.0, INF, 0.0, -INF], dtype=F64)
    terms = policy_loss(
        logprobs,
        old,
        torch.tensor([NAN, 1.0, 1.0, INF, -2.0, NAN], dtype=F64),
        token_weights(index, "token_mean", dtype=F64),
        index,
        kind,
        0.2,
        0.3,
        correction=torch.tensor([NAN, 1.0, 1.0, INF, 1.0, NAN], dtype=F64),
    )
    terms.loss_sum.backward()
    for name in terms.__slots__:
        close(getattr(terms, name), getattr(plain, name).item())
    close(logprobs.grad, [0.0, grad[0], grad[1], 0.0, grad[2], 0.0])


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
def test_cutting_the_batch_elsewhere_changes_nothing(kind, aggregation):
    generator = torch.Generator().manual_seed(11)
    lengths = [3, 1, 5, 2]
    sequence = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    logprobs = (torch.rand(11, generator=generator, dtype=F64) * -2).requires_grad_()
    old = logprobs.detach() + 0.3 * torch.randn(11, generator=generator, dtype=F64)
    advantages = torch.randn(4, generator=generator, dtype=F64)[sequence]

    def loss(rows):
        total = torch.zeros((), dtype=F64)
        for row in rows:
            keep = torch.isin(sequence, torch.tensor(row))
            local = torch.unique(sequence[keep], return_inverse=True)[1]
            weights = token_weights(local, aggregation, 7, dtype=F64)
            total = total + policy_loss(logprobs[keep], old[keep], advantages[keep], weights, local, kind, 0.2, 0.3).loss_sum
        return total / normalizer(aggregation, 11, 4)

    whole, cut = loss([[0, 1, 2, 3]]), loss([[2], [3, 0], [1]])
    torch.testing.assert_close(whole, cut, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        torch.autograd.grad(whole, logprobs)[0], torch.autograd.grad(cut, logprobs)[0], rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("kind", ["clip", "gspo"])
def test_gradcheck(kind):
    # ratios inside and outside the bounds, none of them near one, where the loss has a kink
    logprobs = logs(1.1, 0.95, 1.6, 0.6, 1.5, 0.7).requires_grad_()
    advantages = torch.tensor([1.0, 1.0, 1.0, -2.0, -0.5, 0.7], dtype=F64)
    sequence = torch.tensor([0, 0, 1, 2, 3, 4])
    weights = token_weights(sequence, "sequence_mean", dtype=F64)
    assert torch.autograd.gradcheck(
        lambda x: policy_loss(x, torch.zeros_like(x), advantages, weights, sequence, kind, 0.2, 0.3).loss_sum, [logprobs]
    )


def test_cispo_gradient_is_that_of_the_log_prob_with_fixed_weights():
    # the loss holds a stop-gradient, so finite differences do not apply; with the cut ratios as given numbers they do
    logprobs, advantages = logs(1.1, 1.6, 0.6).requires_grad_(), torch.tensor([1.0, 2.0, -2.0], dtype=F64)
    sequence, weights = torch.tensor([0, 0, 1]), torch.tensor([0.5, 0.5, 1.0], dtype=F64)
    terms = policy_loss(logprobs, torch.zeros(3, dtype=F64), advantages, weights, sequence, "cispo", 0.2, 0.3)
    fixed = torch.tensor([1.1, 1.3, 0.8], dtype=F64)
    expected = torch.autograd.grad((-fixed * advantages * logprobs * weights).sum(), logprobs)[0]
    torch.testing.assert_close(torch.autograd.grad(terms.loss_sum, logprobs)[0], expected)


def test_clip_against_a_padded_formulation():
    """The same loss in another form: rows padded to [S, R] with a mask, mean over each row, mean over rows."""
    generator = torch.Generator().manual_seed(2)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]], dtype=torch.bool)
    logprobs = (torch.randn(3, 4, generator=generator, dtype=F64) - 2).requires_grad_()
    old = logprobs.detach() + 0.5 * torch.randn(3, 4, generator=generator, dtype=F64)
    advantages = torch.randn(3, generator=generator, dtype=F64)
    ratio = torch.exp(logprobs - old)
    objective = torch.min(ratio * advantages[:, None], torch.clip(ratio, 0.8, 1.3) * advantages[:, None])
    padded = (-objective * mask).sum(1).div(mask.sum(1)).mean()
    sequence = torch.arange(3)[:, None].expand(3, 4)[mask]
    weights = token_weights(sequence, "sequence_mean", dtype=F64)
    terms = policy_loss(logprobs[mask], old[mask], advantages[sequence], weights, sequence, "clip", 0.2, 0.3)
    packed = terms.loss_sum / normalizer("sequence_mean", 8, 3)
    torch.testing.assert_close(packed, padded)
    torch.testing.assert_close(torch.autograd.grad(packed, logprobs)[0], torch.autograd.grad(padded, logprobs)[0])


# ------------------------------------------------------------------------------------------------------------- extremes
@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("log_ratio", [25.0, 1e3, 1e30, -25.0, -1e3])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_large_ratios_stay_finite(kind, log_ratio, advantage):
    logprobs = torch.tensor([log_ratio], requires_grad=True)
    terms = policy_loss(
        logprobs, torch.zeros(1), torch.tensor([advantage]), torch.ones(1), torch.tensor([0]), kind, 0.2, 0.3
    )
    terms.loss_sum.backward()
    assert logprobs.grad.isfinite().all()
    assert all(getattr(terms, name).isfinite() for name in terms.__slots__)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_log_probs_that_are_not_finite_show_in_the_loss(kind, bad):
    logprobs = torch.tensor([-1.0, bad], requires_grad=True)
    terms = policy_loss(
        logprobs, torch.tensor([-1.0, -1.0]), torch.ones(2), torch.ones(2), torch.tensor([0, 1]), kind, 0.2, 0.3
    )
    assert terms.loss_sum.isnan()


def test_a_row_without_responses_gives_zeros():
    logprobs = torch.zeros(3, requires_grad=True)
    for kind in LOSSES:
        terms = policy_loss(logprobs, *[torch.zeros(3)] * 3, torch.full((3,), -1), kind, 0.2, 0.3)
        assert [getattr(terms, name).item() for name in terms.__slots__] == [0.0] * 6


# ------------------------------------------------------------------------------------------------------------------- KL
# d = log reference - log pi. d = ln 2: k1 = -ln 2, k2 = (ln 2)^2 / 2, k3 = 2 - ln 2 - 1.
# d = ln 1/2: k1 = ln 2, k2 the same, k3 = 1/2 + ln 2 - 1.
LN2 = math.log(2.0)


@pytest.mark.parametrize(
    "kind, values, gradients",
    [
        ("k1", [-LN2, LN2, 0.0], [1.0, 1.0, 1.0]),  # d k1 / d log pi = 1
        ("k2", [LN2**2 / 2, LN2**2 / 2, 0.0], [-LN2, LN2, 0.0]),  # -d
        ("k3", [1 - LN2, LN2 - 0.5, 0.0], [-1.0, 0.5, 0.0]),  # 1 - exp(d)
    ],
)
def test_kl_by_hand(kind, values, gradients):
    logprobs = logs(0.25, 0.5, 0.3).requires_grad_()
    reference = logs(0.5, 0.25, 0.3).requires_grad_()
    kl = kl_penalty(logprobs, reference, kind)
    close(kl.detach(), values)
    kl.sum().backward()
    close(logprobs.grad, gradients)
    assert reference.grad is None


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_gradcheck(kind):
    logprobs, reference = logs(0.25, 0.5, 0.3, 0.9).requires_grad_(), logs(0.5, 0.2, 0.3, 0.1)
    assert torch.autograd.gradcheck(lambda x: kl_penalty(x, reference, kind), [logprobs])


@pytest.mark.parametrize("kind, exact", [("k1", True), ("k2", False), ("k3", True)])
def test_kl_estimates_the_kl(kind, exact):
    """The expectation under pi over a small vocabulary, summed exactly: k1 and k3 give the KL, k2 is close to it."""
    pi, reference = torch.tensor([0.5, 0.3, 0.2], dtype=F64), torch.tensor([0.4, 0.4, 0.2], dtype=F64)
    true = (pi * (pi / reference).log()).sum()
    estimate = (pi * kl_penalty(pi.log(), reference.log(), kind)).sum()
    torch.testing.assert_close(estimate, true, rtol=1e-12 if exact else 0.1, atol=0.0)


def test_what_the_expected_gradients_of_the_estimators_are():
    """Under pi, over the logits of a small vocabulary: k2's is that of KL(pi || reference); k3's that of KL(reference || pi),
    which is pi - reference; k1's is 0, so that the configuration refuses it as a penalty."""
    logits = torch.tensor([0.3, -0.2, 0.5], dtype=F64, requires_grad=True)
    reference = torch.tensor([0.4, 0.4, 0.2], dtype=F64).log()
    log_pi = logits.log_softmax(0)
    (true,) = torch.autograd.grad((log_pi.exp() * (log_pi - reference)).sum(), logits, retain_graph=True)

    def expected(kind):
        return torch.autograd.grad(
            (log_pi.detach().exp() * kl_penalty(log_pi, reference, kind)).sum(), logits, retain_graph=True
        )[0]

    torch.testing.assert_close(expected("k2"), true)
    torch.testing.assert_close(expected("k3"), log_pi.detach().exp() - reference.exp())
    torch.testing.assert_close(expected("k1"), torch.zeros(3, dtype=F64))


def test_k3_is_never_negative_and_stays_finite():
    difference = torch.tensor([1e-8, -1e-8, 1e-4, 30.0, -30.0, 1e30])
    logprobs = torch.zeros(6, requires_grad=True)
    kl = kl_penalty(logprobs, difference, "k3")
    kl.sum().backward()
    assert (kl >= 0).all() and kl.isfinite().all() and logprobs.grad.isfinite().all()


# ------------------------------------------------------------------------------------------------- weights and the rest
SEQUENCE = torch.tensor([-1, 1, 1, -1, 0, 2, 2, 2, -1])


@pytest.mark.parametrize(
    "aggregation, constant, weights, divisor",
    [
        ("token_mean", None, [0, 1, 1, 0, 1, 1, 1, 1, 0], 6),
        ("sequence_mean", None, [0, 1 / 2, 1 / 2, 0, 1, 1 / 3, 1 / 3, 1 / 3, 0], 3),
        ("constant", 4, [0, 1 / 4, 1 / 4, 0, 1 / 4, 1 / 4, 1 / 4, 1 / 4, 0], 3),
    ],
)
def test_weights_by_hand(aggregation, constant, weights, divisor):
    close(token_weights(SEQUENCE, aggregation, constant), weights)
    assert normalizer(aggregation, response_tokens=6, sequences=3) == divisor


def test_aggregations_by_hand():
    # terms 1 (twice), 4, 2 (three times): mean of tokens (2 + 4 + 6) / 6; of sequences (1 + 4 + 2) / 3;
    # constant 4: (2/4 + 4/4 + 6/4) / 3
    values = torch.tensor([9.0, 1, 1, 9, 4, 2, 2, 2, 9])
    for aggregation, expected in [("token_mean", 2.0), ("sequence_mean", 7 / 3), ("constant", 1.0)]:
        total = weighted_sum(values, token_weights(SEQUENCE, aggregation, 4))
        close(total / normalizer(aggregation, 6, 3), expected)


def test_weighted_sum_does_not_look_where_the_weight_is_zero():
    values = torch.tensor([NAN, 2.0, INF], requires_grad=True)
    total = weighted_sum(values, torch.tensor([0.0, 3.0, 0.0]))
    total.backward()
    close(total.detach(), 6.0)
    close(values.grad, [0.0, 3.0, 0.0])


def test_every_kind_of_the_configuration_exists():
    assert set(LOSSES) == {kind.value for kind in Loss}
    for kind in KlEstimator:
        kl_penalty(torch.zeros(1), torch.zeros(1), kind)
    for kind in Aggregation:
        token_weights(SEQUENCE, kind, 4), normalizer(kind, 1, 1)


@pytest.mark.parametrize(
    "call, problem",
    [
        (lambda: policy_loss(*[torch.zeros(1)] * 4, torch.tensor([0]), "ppo", 0.2, 0.2), "choose one of clip, gspo, cispo"),
        (lambda: kl_penalty(torch.zeros(1), torch.zeros(1), "k4"), "unknown kind 'k4'; choose one of k1, k2, k3"),
        (lambda: token_weights(SEQUENCE, "mean"), "unknown kind 'mean'"),
        (lambda: normalizer("mean", 1, 1), "unknown kind 'mean'"),
        (lambda: token_weights(SEQUENCE, "constant"), "needs a positive number of tokens, not None"),
    ],
)
def test_refused(call, problem):
    with pytest.raises(ValueError, match=problem):
        call()
