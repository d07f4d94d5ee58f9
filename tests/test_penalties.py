"""Penalties against searches, brute force and closed forms."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from laconic import L1, Hoyer, InvalidValueError, KeepEnergy, KeepLargest, LogSum, Penalty, reference

SEPARABLE = {
    "l1": (L1(), lambda x: x),
    "logsum-0.01": (LogSum(0.01), reference.log_sum(0.01)),
    "logsum-0.5": (LogSum(0.5), reference.log_sum(0.5)),
    "logsum-20": (LogSum(20.0), reference.log_sum(20.0)),
}
SMOOTH = {**{name: penalty for name, (penalty, _) in SEPARABLE.items()}, "hoyer": Hoyer()}
ALL = {**SMOOTH, "keep-2": KeepLargest(2), "keep-80%": KeepEnergy(0.8), "keep-all": KeepEnergy(1.0)}

positive = st.floats(1e-3, 1e3)
values = st.lists(st.one_of(st.sampled_from([0.0, 0.0, 0.5, 1.0, 2.0]), st.floats(1e-3, 10)), min_size=1, max_size=8)
taus = st.floats(1e-3, 20)

each_separable = pytest.mark.parametrize(("penalty", "h"), SEPARABLE.values(), ids=SEPARABLE)
each_smooth = pytest.mark.parametrize("penalty", SMOOTH.values(), ids=SMOOTH)
each = pytest.mark.parametrize("penalty", ALL.values(), ids=ALL)


def vector(entries) -> Tensor:
    return torch.tensor(entries, dtype=torch.float64)


# --- what all share ---


@each
@given(s=values, tau=taus)
def test_zeros_stay_zero_and_order_is_preserved(penalty, s, tau):
    x = penalty.prox(vector(s), tau)
    assert torch.isfinite(x).all()
    assert (x >= 0).all()
    assert (x[vector(s) == 0] == 0).all()
    by_size = sorted(zip(s, x.tolist(), strict=True))
    for (smaller, a), (larger, b) in itertools.pairwise(by_size):
        assert smaller == larger or a <= b


@each_smooth
@given(s=values)
def test_threshold_zero_changes_nothing(penalty, s):
    assert torch.equal(penalty.prox(vector(s), 0.0), vector(s))


@each
def test_rows_of_a_batch_are_independent(penalty):
    batch = torch.rand(3, 4, 5, dtype=torch.float64)
    batch[1, 2] = 0
    alone = [penalty.prox(row, 0.3) for row in batch.reshape(-1, 5)]
    assert torch.equal(penalty.prox(batch, 0.3), torch.stack(alone).reshape(batch.shape))
    assert torch.equal(penalty.value(batch), torch.stack([penalty.value(row) for row in batch.reshape(-1, 5)]).reshape(3, 4))


@each
def test_the_order_of_the_values_does_not_matter(penalty):
    s = torch.rand(9, dtype=torch.float64)
    shuffle = torch.randperm(9)
    torch.testing.assert_close(penalty.prox(s[shuffle], 0.4), penalty.prox(s, 0.4)[shuffle])


@each
def test_the_input_is_not_changed(penalty):
    s = vector([3.0, 0.5, 1.0, 0.0])
    for tau in (0.0, 0.7):
        penalty.prox(s, tau).fill_(7)
        assert s.tolist() == [3.0, 0.5, 1.0, 0.0]


@each
@given(s=values, tau=taus)
def test_below_the_cutoff_everything_is_zero(penalty, s, tau):
    x = penalty.prox(vector(s), tau)
    assert (x[vector(s) < penalty.cutoff(tau)] == 0).all()


@each
def test_everything_that_we_offer_is_a_penalty(penalty):
    assert isinstance(penalty, Penalty)


@each_smooth
@given(exponent=st.integers(-600, 600), tau=st.floats(1e-3, 10))
def test_no_scale_of_the_values_breaks_a_prox(penalty, exponent, tau):
    s = vector([1.0, 0.5, 0.0]) * 2.0**exponent
    x = penalty.prox(s, tau)
    assert torch.isfinite(x).all()
    if exponent < -100:
        assert x.tolist() == [0, 0, 0]
    if exponent > 100:
        torch.testing.assert_close(x, s)


# --- separable penalties ---


@each_separable
@given(s=st.floats(1e-3, 50), tau=taus)
def test_prox_finds_the_minimum_that_a_search_finds(penalty, h, s, tau):
    def objective(x: float) -> float:
        return 0.5 * (x - s) ** 2 + tau * float(h(np.array(x)))

    found, searched = float(penalty.prox(vector([s]), tau)), reference.scalar_prox(s, tau, h, points=2001)
    # Measured: at most 2e-16 (1 + objective) above the search; here 1e-14.
    assert objective(found) <= objective(searched) + 1e-14 * (1 + objective(searched))
    # Near the cutoff zero and the other minimum tie; elsewhere the place must agree as far as a flat minimum shows it.
    assume(abs(s - penalty.cutoff(tau)) > 1e-3 * s)
    assert found == pytest.approx(searched, abs=1e-5 * s)


@each_separable
@given(tau=taus)
def test_the_cutoff_is_where_a_search_first_leaves_zero(penalty, h, tau):
    cutoff = penalty.cutoff(tau)
    assert reference.scalar_prox(cutoff * 0.999, tau, h, points=2001) < 1e-9 * cutoff
    assert reference.scalar_prox(cutoff * 1.001, tau, h, points=2001) > 1e-4 * cutoff
    below, above = penalty.prox(vector([cutoff * 0.999999, cutoff * 1.000001]), tau)
    assert below == 0 < above


@each_separable
@given(s=values)
def test_value_of_separable_penalties(penalty, h, s):
    assert float(penalty.value(vector(s))) == pytest.approx(math.fsum(float(h(np.array(v))) for v in s), rel=1e-12)


@each_separable
def test_the_slope_at_zero_is_one(penalty, h):
    assert float(penalty.value(vector([1e-9]))) / 1e-9 == pytest.approx(1, rel=1e-6)


@given(s=values, change=st.lists(st.floats(-1, 1), min_size=8, max_size=8), tau=taus)
def test_l1_is_non_expansive(s, change, tau):
    a, b = vector(s), (vector(s) + vector(change[: len(s)])).clamp_min(0)
    distance = torch.linalg.vector_norm(L1().prox(a, tau) - L1().prox(b, tau))
    assert distance <= torch.linalg.vector_norm(a - b) * (1 + 1e-12)


@given(s=values, tau=st.floats(1e-3, 1))
def test_log_sum_becomes_l1_for_large_epsilon(s, tau):
    # Shrinkage is tau / (1 + x / epsilon): off by at most tau * 10 / epsilon.
    torch.testing.assert_close(LogSum(1e6).prox(vector(s), tau), L1().prox(vector(s), tau), rtol=0, atol=2e-5)


@given(s=values, tau=taus, exponent=st.sampled_from([-900, -300, 3, 300, 600]))
def test_log_sum_does_not_know_its_units(s, tau, exponent):
    c = 2.0**exponent
    found = LogSum(c * 0.5).prox(c * vector(s), c * tau) / c
    near_a_tie = (vector(s) - LogSum(0.5).cutoff(tau)).abs() < 1e-9
    torch.testing.assert_close(
        found.masked_fill(near_a_tie, 0), LogSum(0.5).prox(vector(s), tau).masked_fill(near_a_tie, 0), rtol=1e-7, atol=0
    )


def test_log_sum_halves_the_shrinkage_at_epsilon():
    x, epsilon, tau = 0.5, 0.5, 0.01
    s = x + tau / 2
    assert float(LogSum(epsilon).prox(vector([s]), tau)) == pytest.approx(x, rel=1e-12)


# --- Hoyer ---


def candidates(s: np.ndarray, x: np.ndarray):
    """Everything that might beat x as the prox of s."""
    rng = np.random.default_rng(0)
    order = np.argsort(-s)
    for k in range(len(s) + 1):
        top = np.zeros_like(s)
        top[order[:k]] = s[order[:k]]
        yield from (c * top for c in (0.7, 0.9, 1.0, 1.05))
        if k:
            yield np.where(top > 0, top.sum() / k, 0.0)
    yield from (c * x for c in (0.0, 0.5, 0.999, 1.001, 1.5))
    yield from (np.maximum(s - rho, 0) for rho in np.linspace(0, s.max(), 30))
    for size in (1e-1, 1e-2, 1e-4):
        yield from np.maximum(x + size * s.max() * rng.standard_normal((20, len(s))), 0)
        yield from np.where(x > 0, np.maximum(x + size * s.max() * rng.standard_normal((20, len(s))), 0), 0)
    yield from s.max() * rng.random((20, len(s)))


@given(s=values, tau=st.one_of(taus, st.floats(1e-4, 1e-1)))
def test_nothing_beats_the_prox_of_hoyer(s, tau):
    s = np.array(s)
    x = Hoyer().prox(vector(s), tau).numpy()
    best = reference.hoyer_objective(x, s, tau)
    for candidate in candidates(s, x):
        assert best <= reference.hoyer_objective(candidate, s, tau) * (1 + 1e-12) + 1e-12


@given(a=st.floats(0.01, 3), b=st.floats(0, 3), tau=st.floats(0.01, 5))
def test_hoyer_of_two_values_is_the_best_of_all_angles(a, b, tau):
    angle = np.linspace(0, np.pi / 2, 20_001)
    length = a * np.cos(angle) + b * np.sin(angle)
    searched = min(float(np.min(0.5 * (a * a + b * b - length**2) + tau * (np.cos(angle) + np.sin(angle)))), 0.5 * (a * a + b * b))
    found = reference.hoyer_objective(Hoyer().prox(vector([a, b]), tau).numpy(), np.array([a, b]), tau)
    assert found == pytest.approx(searched, rel=1e-7, abs=1e-7)


@pytest.mark.parametrize(
    ("s", "tau", "x"),
    [
        ([2.0], 1.9, [2.0]),  # one value: h = 1 wherever it is, so nothing moves it but its end
        ([2.0], 2.1, [0.0]),
        ([3.0, 3.0], 0.1, [3.0, 3.0]),  # equal values stay equal: their direction is stationary
        ([5.0, 1.0], 5.1, [5.0, 0.0]),  # turning (1, 0) towards the second value pays only for tau < 5 * 1
        ([0.0, 0.0], 1.0, [0.0, 0.0]),
    ],
)
def test_hoyer_in_closed_form(s, tau, x):
    torch.testing.assert_close(Hoyer().prox(vector(s), tau), vector(x))


@pytest.mark.slow
@given(s=values, tau=taus, exponent=st.integers(-30, 30))
def test_hoyer_is_scale_equivariant(s, tau, exponent):
    c = 2.0**exponent  # a power of two: exact
    assert torch.equal(Hoyer().prox(c * vector(s), c * c * tau), c * Hoyer().prox(vector(s), tau))


@pytest.mark.parametrize(("s", "h"), [([0, 0, 3], 1), ([2, 2, 2, 2], 2), ([3, 4], 1.4), ([0, 0], 0), ([1e-200] * 4, 2), ([1e200] * 4, 2)])
def test_value_of_hoyer(s, h):
    assert float(Hoyer().value(vector(s))) == pytest.approx(h)


# --- projections ---


@given(s=values, k=st.integers(1, 9))
def test_keep_largest_loses_least_of_all_choices_of_k(s, k):
    x = KeepLargest(k).prox(vector(s), 1.0).tolist()
    assert sum(v > 0 for v in x) <= k
    assert all(v in (0, before) for v, before in zip(x, s, strict=True))
    best = max(math.fsum(v * v for v in chosen) for chosen in itertools.combinations(s, min(k, len(s))))
    assert math.fsum(v * v for v in x) == pytest.approx(best)


def fewest(s: list[int], share: Fraction) -> int:
    """The fewest values whose squares reach the share, by trying all choices in exact numbers (of all, for shares above 1)."""
    total, share = sum(v * v for v in s), min(share, Fraction(1))
    return next(r for r in range(len(s) + 1) if any(sum(v * v for v in chosen) >= share * total for chosen in itertools.combinations(s, r)))


@given(s=st.lists(st.integers(0, 9), min_size=1, max_size=7), percent=st.integers(1, 100))
def test_keep_energy_keeps_the_fewest_that_reach_the_share(s, percent):
    x = KeepEnergy(percent / 100).prox(vector(s), 1.0).tolist()
    kept = sum(v > 0 for v in x)
    # Where the share is met exactly, rounding of share * total may ask for one more.
    assert (
        fewest(s, Fraction(percent, 100) * (1 - Fraction(1, 10**12)))
        <= kept
        <= fewest(s, Fraction(percent, 100) * (1 + Fraction(1, 10**12)))
    )
    assert sorted(x, reverse=True) == sorted(s, reverse=True)[:kept] + [0] * (len(s) - kept)
    assert all(v in (0, before) for v, before in zip(x, s, strict=True))


@given(s=values, k=st.integers(1, 9))
def test_projecting_twice_is_projecting_once_and_costs_nothing(s, k):
    once = KeepLargest(k).prox(vector(s), 1.0)
    assert torch.equal(KeepLargest(k).prox(once, 1.0), once)
    assert float(KeepLargest(k).value(once)) == 0


@pytest.mark.parametrize(
    ("penalty", "s", "value"),
    [
        (KeepLargest(2), [1.0, 2.0, 0.0], 0),
        (KeepLargest(2), [1.0, 2.0, 0.1], math.inf),
        (KeepEnergy(0.9), [3.0, 1.0], math.inf),  # the first alone has 9 of 10
        (KeepEnergy(0.91), [3.0, 1.0], 0),
        (KeepEnergy(0.5), [0.0, 0.0], 0),
    ],
)
def test_value_of_projections(penalty, s, value):
    assert float(penalty.value(vector(s))) == value


# --- errors ---


@each
@pytest.mark.parametrize("tau", [-1e-9, math.nan, math.inf])
@pytest.mark.parametrize("method", ["prox", "cutoff"])
def test_a_threshold_must_be_finite_and_not_negative(penalty, tau, method):
    arguments = (vector([1.0]), tau) if method == "prox" else (tau,)
    with pytest.raises(InvalidValueError, match=r"tau = .*: the threshold must be finite and at least 0"):
        getattr(penalty, method)(*arguments)


@pytest.mark.parametrize(
    ("build", "argument", "message"),
    [
        *((LogSum, bad, r"LogSum\(epsilon=.*\): must be finite and above 0") for bad in (0, -1.0, math.nan, math.inf)),
        *((KeepLargest, bad, r"KeepLargest: k = .*: must be a whole number, at least 1") for bad in (0, -3, 2.0, True, "2")),
        *((KeepEnergy, bad, r"energy share = .*: must be above 0 and at most 1") for bad in (0, -0.1, 1.01, math.nan)),
    ],
)
def test_a_penalty_refuses_wrong_settings(build, argument, message):
    with pytest.raises(InvalidValueError, match=message):
        build(argument)
