"""Allocation against brute force, exact arithmetic and a hand-made case."""

import itertools
import math
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from laconic.allocate import Choice, energy_rule, log_shares, low_rank_choice, numerical_rank, product_rule
from laconic.errors import InfeasibleBudgetError, InvalidValueError
from laconic.penalties import energy_count

from .cases import with_spectrum


def ranked(name: str, values, unit, dense, largest: int, multiple: int = 1) -> Choice:
    """Ranks up to `largest` in multiples, each at `unit` a piece, then dense."""
    ranks = list(range(multiple, largest + 1, multiple)) or ([largest] if largest else [])
    return low_rank_choice(name, values, ranks, np.outer(ranks, unit), np.asarray(dense))


def factors(draw, currencies: int) -> np.ndarray:
    """Parameters, and further costs that are some multiple of them."""
    return np.array([1.0, *(draw(st.integers(1, 50)) for _ in range(currencies - 1))])


@st.composite
def layers(draw, currencies: int = 1) -> Choice:
    """A layer m x n with a random spectrum."""
    m, n = draw(st.integers(2, 7)), draw(st.integers(2, 7))
    values = np.sort(np.array(draw(st.lists(st.floats(0, 1), min_size=min(m, n), max_size=min(m, n)))))[::-1]
    largest, k = (m * n - 1) // (m + n), factors(draw, currencies)
    return ranked(f"{m}x{n}", values, (m + n) * k, m * n * k, largest, draw(st.sampled_from([1, 1, 2])))


@st.composite
def tables(draw, currencies: int = 1) -> Choice:
    """Gains and costs without any order, with ties."""
    count = draw(st.integers(1, 5))
    costs = draw(st.lists(st.integers(1, 12), min_size=count, max_size=count))
    gains = draw(st.lists(st.integers(-12, 0), min_size=count, max_size=count))
    ranks = (*range(1, count), None)
    return Choice("table", ranks, np.array(gains, dtype=float), np.array(costs, dtype=float)[:, None] * factors(draw, currencies))


def cost(choices: list[Choice], ranks) -> np.ndarray:
    return sum(c.costs[c.ranks.index(r)] for c, r in zip(choices, ranks, strict=True))


def gain(choices: list[Choice], ranks) -> float:
    return math.fsum(c.gains[c.ranks.index(r)] for c, r in zip(choices, ranks, strict=True))


def smallest(choices: list[Choice]) -> np.ndarray:
    return sum(c.costs.min(axis=0) for c in choices)


def largest(choices: list[Choice]) -> np.ndarray:
    return sum(c.costs.max(axis=0) for c in choices)


def brute_force(choices: list[Choice], limits: np.ndarray) -> float:
    return max(gain(choices, r) for r in itertools.product(*(c.ranks for c in choices)) if np.all(cost(choices, r) <= limits))


def largest_step(choices: list[Choice]) -> float:
    """No walk along a hull takes a step larger than from the cheapest option to the best."""
    return max(float(c.gains.max() - c.gains[np.flatnonzero(c.costs[:, 0] == c.costs[:, 0].min())].max()) for c in choices)


problems = st.lists(st.one_of(layers(), tables()), min_size=1, max_size=4)
shares = st.floats(0, 1)


@given(problems, shares)
def test_the_product_rule_loses_at_most_one_step_against_brute_force(choices, share):
    limits = smallest(choices) + share * (largest(choices) - smallest(choices))
    found = gain(choices, product_rule(choices, np.zeros(1), limits))
    best = brute_force(choices, limits)
    assert best - largest_step(choices) - 1e-9 <= found <= best + 1e-9


@given(problems, st.floats(0, 5))
def test_the_product_rule_is_optimal_at_every_budget_that_a_price_leads_to(choices, price):
    """What is best at a fixed price per unit of cost is the best that its cost can buy (Lagrange)."""
    bought = [c.ranks[np.lexsort((c.costs[:, 0], price * c.costs[:, 0] - c.gains))[0]] for c in choices]
    found = product_rule(choices, np.zeros(1), cost(choices, bought))
    assert gain(choices, found) == pytest.approx(gain(choices, bought), abs=1e-9)


@given(problems)
def test_without_a_binding_budget_everything_is_kept(choices):
    found = product_rule(choices, np.zeros(1), largest(choices))
    assert gain(choices, found) == pytest.approx(brute_force(choices, largest(choices)), abs=1e-12)


@given(st.lists(st.one_of(layers(2), tables(2)), min_size=1, max_size=4), shares, shares, st.integers(0, 100))
def test_no_limit_is_passed_and_nothing_more_fits(choices, share, other, fixed):
    limits = fixed + smallest(choices) + np.array([share, other]) * (largest(choices) - smallest(choices))
    ranks = product_rule(choices, np.full(2, float(fixed)), limits)
    spent = fixed + cost(choices, ranks)
    assert np.all(spent <= limits)
    for choice, rank in zip(choices, ranks, strict=True):
        now = choice.ranks.index(rank)
        better = choice.gains > choice.gains[now]
        assert not np.any(better & np.all(spent + choice.costs - choice.costs[now] <= limits, axis=1))


def test_a_steep_last_step_does_not_make_a_long_way_cheap():
    """The first gains 10 for 2 (its last unit alone 9.9), the second 16 for 3: with 3 to spend, the second."""
    first = Choice("first", (1, 2, 3), np.array([-10, -9.9, 0]), np.array([[1.0], [2.0], [3.0]]))
    second = Choice("second", (1, None), np.array([-16.0, 0]), np.array([[1.0], [4.0]]))
    assert product_rule([first, second], np.zeros(1), np.array([5.0])) == [1, None]


def test_a_rank_below_the_hull_is_taken_where_the_hull_does_not_fit():
    """All values equal: from rank 1 (14 parameters of 49) the steepest way up is straight to dense."""
    choice = ranked("7x7", np.ones(7), np.array([14.0]), np.array([49.0]), 3)
    for limit, rank in [(27, 1), (28, 2), (41, 2), (42, 3), (48, 3), (49, None)]:
        assert product_rule([choice], np.zeros(1), np.array([float(limit)])) == [rank]


@given(problems, shares)
def test_what_else_the_model_costs_counts(choices, share):
    limits = smallest(choices) + share * (largest(choices) - smallest(choices))
    assert product_rule(choices, np.full(1, 1000.0), limits + 1000) == product_rule(choices, np.zeros(1), limits)


def test_the_tighter_of_several_limits_rules():
    choice = ranked("w", np.ones(10), np.array([1.0, 10.0]), np.array([20.0, 200.0]), 10)
    for limits, rank in [((7.5, 1000.0), 7), ((1000.0, 43.0), 4), ((3.0, 43.0), 3)]:
        assert product_rule([choice], np.zeros(2), np.array(limits)) == [rank]


def test_what_is_cheap_in_one_limit_may_be_dear_in_another():
    """Cut, both weights have few parameters and take long; the limits force one cut, and allow no more."""
    choice = partial(Choice, ranks=(1, None), gains=np.array([-1.0, 0.0]))
    choices = [choice("a", costs=np.array([[1.0, 3.0], [10.0, 2.0]])), choice("b", costs=np.array([[1.0, 8.0], [10.0, 2.0]]))]
    for limits, ranks in [((11, 5), [1, None]), ((11, 10), [1, None]), ((2, 11), [1, 1]), ((20, 4), [None, None])]:
        assert product_rule(choices, np.zeros(2), np.array(limits, dtype=float)) == ranks
    with pytest.raises(InfeasibleBudgetError):
        product_rule(choices, np.zeros(2), np.array([2.0, 10.0]))


@pytest.mark.parametrize(
    ("limits", "message"),
    [([9.9], r"^budget: the smallest possible is 10, above the limit of 10$"), ([3.0], "smallest possible is 10, above the limit of 3")],
)
def test_an_impossible_budget_is_refused(limits, message):
    choices = [ranked(name, np.ones(4), np.array([4.0]), np.array([16.0]), 3) for name in "ab"]
    assert product_rule(choices, np.full(1, 2.0), np.array([10.0])) == [1, 1]
    with pytest.raises(InfeasibleBudgetError, match=message):
        product_rule(choices, np.full(1, 2.0), np.array(limits))


def test_a_product_starves_no_layer_where_a_sum_does():
    """Two flat spectra of 20 and 10 values, budget for 11 units: a unit adds 1/20 or 1/10 to the sum of shares, so the sum
    gives the first layer the least there is; r/20 * (11 - r)/10 is largest in the middle."""
    choices = [ranked(str(k), np.ones(k), np.ones(1), np.full(1, 100.0), k) for k in (20, 10)]
    limits = np.array([11.0])

    def sum_of_shares(ranks) -> float:
        return sum(r / k for r, k in zip(ranks, (20, 10), strict=True))

    affordable = [(a, b) for a in range(1, 21) for b in range(1, 11) if a + b <= 11]
    assert max(affordable, key=sum_of_shares) == (1, 10)
    assert product_rule(choices, np.zeros(1), limits) in ([5, 6], [6, 5])


# --- what may be chosen ---


def test_options_are_the_ranks_that_the_spectrum_has_and_dense():
    values = np.linspace(2, 1, 8)
    costs = np.outer([2, 4, 9], [3.0, 7.0])
    choice = low_rank_choice("w", values, [2, 4, 9], costs, np.array([50.0, 60.0]))
    assert choice.ranks == (2, 4, None)
    assert choice.costs.tolist() == [[6.0, 14.0], [12.0, 28.0], [50.0, 60.0]]
    kept = [float(np.sum(values[:r] ** 2) / np.sum(values**2)) for r in (2, 4)] + [1.0]
    np.testing.assert_allclose(np.exp(choice.gains), kept, rtol=1e-12)


def test_what_was_cut_has_no_way_back_to_dense():
    assert low_rank_choice("w", np.ones(3), [1, 2, 3], np.ones((3, 1)), None).ranks == (1, 2, 3)


spectra = st.lists(st.floats(1e-12, 1), min_size=1, max_size=12).map(lambda v: np.sort(np.array(v))[::-1])


@given(spectra, st.sampled_from([1.0, 1e-200, 1e200]))
def test_log_shares_are_accurate_for_tiny_tails(values, scale):
    with localcontext() as context:
        context.prec = 80
        squares = [Decimal(float(v)) ** 2 for v in values]
        exact = [float((sum(squares[:r]) / sum(squares)).ln()) for r in range(1, len(squares) + 1)]
    np.testing.assert_allclose(log_shares(values * scale), exact, rtol=1e-12, atol=0)


def test_log_shares_of_nothing_are_zero():
    assert log_shares(np.zeros(3)).tolist() == [0, 0, 0]
    assert log_shares(np.array([2.0, 0.0])).tolist() == [0, 0]


# --- rules for one layer ---


@given(st.lists(st.integers(0, 9), min_size=1, max_size=7), st.integers(1, 100))
def test_the_energy_rule_is_the_papers(values, percent):
    values = sorted(values, reverse=True)
    total = sum(v * v for v in values)

    def fewest(share: Fraction) -> int:
        return next(r for r in range(1, len(values) + 1) if sum(v * v for v in values[:r]) >= share * total)

    # Where the share is met exactly, rounding may ask for one more.
    share, little = Fraction(percent, 100), Fraction(1, 10**12)
    found = energy_rule(np.array(values, dtype=float), percent / 100)
    assert fewest(share * (1 - little)) <= found <= fewest(min(share * (1 + little), Fraction(1)))
    assert found == max(int(energy_count(torch.tensor(values, dtype=torch.float64), percent / 100)), 1)


@pytest.mark.parametrize("share", [0, -1.0, 1.5, math.nan])
def test_an_energy_share_is_above_zero_and_at_most_one(share):
    with pytest.raises(InvalidValueError, match="energy share"):
        energy_count(torch.ones(3), share)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(64, 48), (300, 20), (5, 200)])
@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_numerical_rank_sees_through_rounding(dtype, shape, rank, scale):
    matrix = torch.from_numpy(with_spectrum(*shape, np.linspace(1, 0.1, rank)) * scale).to(dtype)
    values = torch.linalg.svdvals(matrix.double()).numpy()
    assert numerical_rank(values, torch.finfo(dtype).eps, max(shape)) == rank


def test_numerical_rank_is_at_least_one():
    assert numerical_rank(np.zeros(4), 1e-7, 10) == 1


def test_of_equals_what_is_cheaper_in_a_cost_that_is_priced_alone_is_kept():
    """Two weights as large and as strong as each other, one of which computes ten times as much: nothing bounds that."""
    values, params = np.linspace(1, 0.1, 10), np.array([1.0, 0.0])
    choices = [
        ranked("wide", values, params + np.array([0.0, 10.0]), np.array([20.0, 200.0]), 10),
        ranked("narrow", values, params + np.array([0.0, 1.0]), np.array([20.0, 20.0]), 10),
    ]
    limits = np.array([10.0, math.inf])
    alone = product_rule(choices, np.zeros(2), limits, np.array([0.1, 0.0]))
    priced = product_rule(choices, np.zeros(2), limits, np.array([0.1, 0.01]))
    assert alone == [5, 5]
    assert priced[0] < 5 < priced[1]
    assert sum(priced) == 10
