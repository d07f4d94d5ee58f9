"""Spectral shrinkage: every solver against NumPy in float64, against optimality conditions and against closed forms."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from laconic import (
    L1,
    DecompositionError,
    InvalidTypeError,
    InvalidValueError,
    KeepEnergy,
    KeepLargest,
    LogSum,
    NonFiniteError,
    reference,
    spectral_prox,
    svt,
)
from laconic.solvers import SOLVERS, eigen, gram

from .cases import matrices, with_spectrum

# Powers of ten that a largest singular value may have: the normal range, but for what squares up in fp16's subnormals.
SCALES = {torch.float64: (-300, 300), torch.float32: (-30, 30), torch.bfloat16: (-30, 30), torch.float16: (-2, 4)}

# Error of the result (Frobenius norm) in units of eps(dtype) * s_max, and what was measured over 3000 matrices up to 64 x 64
# with tau / s_max from 0.001 to 0.9:
SLACK = {
    (torch.float64, "svd"): 200,  # 68
    (torch.float64, "gram"): 400,  # 146; grows with s_max / tau
    (torch.float64, "gram-float64"): 400,  # 146
    (torch.float64, "auto"): 400,  # 146
    (torch.float32, "svd"): 100,  # 37
    (torch.float32, "gram"): 200,  # 67 at tau = 0.01 s_max, 1382 at 0.001
    (torch.float32, "gram-float64"): 5,  # 1.4
    (torch.float32, "auto"): 100,  # 23
    **{(torch.bfloat16, solver): 3 for solver in SOLVERS},  # 1.33: the result's own rounding
    **{(torch.float16, solver): 3 for solver in SOLVERS},  # 1.37
}


def tolerance(dtype: torch.dtype, solver: str, fraction: float) -> float:
    """Allowed error relative to s_max, where tau = fraction * s_max; forming the Gram matrix costs eps * s_max / tau."""
    squared = 4 / fraction if solver == "gram" else 0
    return torch.finfo(dtype).eps * SLACK[dtype, solver] + torch.finfo(torch.promote_types(dtype, torch.float32)).eps * squared


every_solver = pytest.mark.parametrize("solver", SOLVERS)
every_dtype = pytest.mark.parametrize("dtype", SCALES, ids=lambda d: str(d).removeprefix("torch."))
fractions = st.floats(1e-3, 0.95)


@st.composite
def scaled(draw, dtype: torch.dtype) -> tuple[torch.Tensor, float]:
    """A matrix in this dtype and (about) its largest singular value, anywhere in the dtype's range."""
    scale = 10.0 ** draw(st.floats(*SCALES[dtype]))
    return torch.from_numpy(draw(matrices()) * scale).to(dtype), scale


def numpy64(x: torch.Tensor) -> np.ndarray:
    return x.double().numpy()


# --- against the oracle ---


@every_dtype
@every_solver
@given(data=st.data(), fraction=fractions)
def test_the_result_is_the_oracles(dtype, solver, data, fraction):
    x, scale = data.draw(scaled(dtype))
    before = x.clone()
    result = svt(x, fraction * scale, solver)
    error = np.linalg.norm((numpy64(result.x) - reference.svt(numpy64(x), fraction * scale)) / scale)
    assert error <= tolerance(dtype, solver, fraction)
    assert (result.x.shape, result.x.dtype, result.x.device) == (x.shape, dtype, x.device)
    assert torch.equal(x, before)


@every_dtype
@every_solver
@given(data=st.data(), fraction=fractions)
def test_the_values_and_the_rank_are_the_oracles_outside_the_band(dtype, solver, data, fraction):
    x, scale = data.draw(scaled(dtype))
    tau = fraction * scale
    result = svt(x, tau, solver)
    s = np.linalg.svd(numpy64(x), compute_uv=False)
    assert (result.values[:-1] >= result.values[1:]).all()
    assert (result.input_values[:-1] >= result.input_values[1:]).all()
    # Values at or above the cutoff are right to `error` (measured: to 0.23 of it); below it, they are zero for certain.
    found, expected = result.values.numpy(), np.maximum(s - tau, 0)
    assert np.all(np.abs(found - expected)[s >= tau] <= result.error)
    assert np.all(found[s < tau - result.error] == 0)
    assert result.rank == int((result.values > 0).sum())
    assert np.sum(s > tau + result.error) <= result.rank <= np.sum(s > tau - result.error)


@every_solver
def test_the_band_of_uncertainty_is_narrow(solver):
    x = torch.from_numpy(with_spectrum(64, 48, np.linspace(1, 0.1, 48))).float()
    eps = torch.finfo(torch.float32).eps
    # SVD is certain to some eps * s_max, float32 Gram to some eps * s_max^2 / tau.
    assert 0 < svt(x, 0.1, solver).error <= 8 * eps * math.sqrt(64) * (10 if solver in ("gram", "auto") else 1) * 1.001


@pytest.mark.parametrize("solver", ["svd", "gram", "auto"])
@pytest.mark.parametrize("shape", [(6, 6), (5, 9), (9, 5), (1, 7), (40, 30)])
@pytest.mark.parametrize("fraction", [0.05, 0.4, 0.9])
def test_the_result_meets_the_optimality_conditions(solver, shape, fraction):
    x = torch.randn(shape, dtype=torch.float64)
    tau = fraction * float(torch.linalg.matrix_norm(x, 2))
    gap = reference.nuclear_optimality_gap(x.numpy(), svt(x, tau, solver).x.numpy(), tau)
    assert gap <= 1e-11  # measured: 2e-13
    assert reference.nuclear_optimality_gap(x.numpy(), svt(x, 0.99 * tau, solver).x.numpy(), tau) > 1e-3


def searched(epsilon: float, tau: float):
    h = reference.log_sum(epsilon)
    return lambda s: np.array([reference.scalar_prox(v, tau, h, points=2001) for v in s])


def largest(k: int):
    return lambda s: np.concatenate([s[:k], np.zeros(len(s) - len(s[:k]))])


def energy(share: float):
    return lambda s: next(largest(r)(s) for r in range(1, len(s) + 1) if np.sum(s[:r] ** 2) >= share * np.sum(s**2))


@every_solver
@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (1, 4), (2, 2), (30, 12)])
@pytest.mark.parametrize(
    ("penalty", "shrink"),
    [
        (LogSum(0.3), searched(0.3, 0.7)),
        (LogSum(2.0), searched(2.0, 0.7)),
        (KeepLargest(1), largest(1)),
        (KeepLargest(4), largest(4)),
        (KeepEnergy(0.75), energy(0.75)),
    ],
    ids=["LogSum 0.3", "LogSum 2", "KeepLargest 1", "KeepLargest 4", "KeepEnergy"],
)
def test_other_penalties_shrink_the_spectrum_as_the_oracle_does(solver, shape, penalty, shrink):
    x = torch.randn(shape, dtype=torch.float64)
    result = spectral_prox(x, penalty, 0.7, solver=SOLVERS[solver])
    # The search of scalar_prox sees a flat minimum to about 1e-7.
    np.testing.assert_allclose(result.x.numpy(), reference.spectral_map(x.numpy(), shrink), rtol=0, atol=1e-6)


# --- closed forms ---


@every_dtype
@every_solver
@given(data=st.data())
def test_threshold_zero_returns_the_input_bit_for_bit(dtype, solver, data):
    x, _ = data.draw(scaled(dtype))
    result = svt(x, 0.0, solver)
    assert torch.equal(result.x, x)
    assert result.x.data_ptr() != x.data_ptr()


@every_solver
def test_threshold_zero_returns_the_input_also_where_its_noise_is_subnormal(solver):
    x = torch.from_numpy(with_spectrum(8, 7, [1e-300]))
    assert torch.equal(svt(x, 0.0, solver).x, x)


@every_dtype
@every_solver
@given(data=st.data(), excess=st.floats(1.03, 100))
def test_a_threshold_above_the_largest_value_gives_exact_zero(dtype, solver, data, excess):
    x, scale = data.draw(scaled(dtype))
    result = svt(x, excess * scale, solver)
    assert not result.x.any()
    assert not result.values.any()
    assert result.rank == 0


@every_solver
@given(length=st.integers(1, 64), seed=st.integers(0, 99), fraction=st.floats(0, 2), upright=st.booleans())
def test_shrinking_one_row_is_group_lasso(solver, length, seed, fraction, upright):
    row = torch.randn(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    norm = math.sqrt(math.fsum(v * v for v in row.tolist()))
    x = row[:, None] if upright else row[None]
    torch.testing.assert_close(svt(x, fraction * norm, solver).x, max(1 - fraction, 0) * x, rtol=1e-12, atol=1e-13)


@every_solver
@pytest.mark.parametrize("shape", [(4, 6, 9), (3, 9, 6), (5, 1, 4), (1, 3, 3)])
def test_a_stack_is_its_matrices_one_at_a_time(solver, shape):
    stack = torch.randn(shape, dtype=torch.float64) * torch.logspace(-1, 1, shape[0], dtype=torch.float64)[:, None, None]
    together, alone = svt(stack, 0.8, solver), [svt(x, 0.8, solver) for x in stack]
    torch.testing.assert_close(together.x, torch.stack([r.x for r in alone]), rtol=0, atol=1e-12)
    torch.testing.assert_close(together.values, torch.stack([r.values for r in alone]), rtol=0, atol=1e-12)
    assert together.rank == max(r.rank for r in alone)


@every_solver
def test_strides_do_not_matter(solver):
    x = torch.randn(12, 8, dtype=torch.float64)
    torch.testing.assert_close(svt(x.T, 1.0, solver).x.T, svt(x, 1.0, solver).x, rtol=0, atol=1e-12)
    assert torch.equal(svt(x[:, ::2], 0.0, solver).x, x[:, ::2])


@pytest.mark.parametrize("exponent", [-100, -7, 7, 100])
@every_solver
def test_scale_is_exact(solver, exponent):
    """Multiplying matrix and threshold by a power of two multiplies the result by it, bit for bit."""
    x, c = torch.randn(8, 6), 2.0**exponent
    assert torch.equal(svt(c * x, c * 1.5, solver).x, c * svt(x, 1.5, solver).x)


@every_solver
def test_the_result_hangs_on_no_graph(solver):
    x = torch.randn(5, 4, requires_grad=True)
    assert not svt(x, 0.1, solver).x.requires_grad
    assert not svt(x, 0.0, solver).x.requires_grad


@every_solver
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(solver, dtype):
    x = torch.randn(20, 12).to(dtype)
    outside = svt(x, 1.0, solver)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = svt(x, 1.0, solver)
    assert torch.equal(inside.x, outside.x)
    assert inside.x.dtype == dtype
    assert torch.equal(inside.values, outside.values)


# --- the choice of a solver ---


@pytest.mark.parametrize(
    ("shape", "dtype", "fraction", "solver"),
    [
        ((2, 50), torch.float32, 0.5, "svd"),
        ((50, 1), torch.float64, 0.5, "svd"),
        ((8, 8), torch.float32, 0.023, "gram"),
        ((8, 8), torch.float32, 0.021, "gram-float64"),
        ((3, 50), torch.float32, 0.0, "gram-float64"),
        ((8, 8), torch.bfloat16, 0.5, "gram"),
        ((8, 8), torch.float16, 0.001, "gram-float64"),
        ((8, 8), torch.float64, 1e-6, "gram"),
        ((8, 8), torch.float64, 9e-7, "svd"),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 2.0**-9, 2.0**9])
def test_auto_chooses_by_its_table(shape, dtype, fraction, solver, scale):
    x = torch.zeros(shape, dtype=dtype)
    x[0, 0] = scale  # of rank one: Frobenius norm and s_max are the same
    assert svt(x, fraction * scale).solver == solver


def test_auto_keeps_the_error_at_the_cutoff_small():
    x = torch.from_numpy(with_spectrum(64, 64, [1.0] + [0.0222] * 63)).float()
    fraction = 64 * torch.finfo(torch.float32).eps ** 0.5
    result = svt(x, fraction * float(x.norm()))
    assert result.solver == "gram"
    true = np.linalg.svd(numpy64(x), compute_uv=False)
    assert np.abs(result.input_values.numpy() - true).max() < 0.01 * 0.0222


@pytest.mark.parametrize("name", [n for n in SOLVERS if n != "auto"])
def test_a_named_solver_is_the_one_that_is_used(name):
    assert svt(torch.randn(6, 5), 0.5, name).solver == name
    assert svt(torch.randn(6, 5), 0.5, SOLVERS[name]).solver == name
    assert spectral_prox(torch.randn(6, 5), L1(), 0.5, solver=name).solver == name


# --- failures ---


def break_down(*dtypes: torch.dtype):
    """A decomposition that fails for these dtypes, and how many times it was asked."""

    def broken(original):
        def decompose(x, *args, **kwargs):
            if x.dtype in dtypes:
                raise torch.linalg.LinAlgError("did not converge\nand more that nobody reads")
            return original(x, *args, **kwargs)

        return decompose

    return broken


def test_when_eigh_fails_svd_steps_in_and_says_so(monkeypatch):
    x = torch.randn(9, 6)
    monkeypatch.setattr(torch.linalg, "eigh", break_down(torch.float32)(torch.linalg.eigh))
    result = svt(x, 1.0, "gram")
    assert (result.solver, result.failures) == ("svd", ("gram (torch.float32, cpu): did not converge",))
    assert torch.equal(result.x, svt(x, 1.0, "svd").x)
    assert result.state["failures"] == 1


@pytest.mark.parametrize("spectrum", ["random", "low rank", "zero", "all equal", "many decades"])
def test_large_matrices_are_decomposed_in_place_and_as_well(spectrum):
    """LAPACK's other eigensolver, from LARGE on: residual and orthogonality in units of eps."""
    n = eigen.LARGE + 3
    g = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64)).Q
    values = {
        "random": torch.rand(n, generator=g, dtype=torch.float64),
        "low rank": torch.cat([torch.ones(5), torch.zeros(n - 5)]).double(),
        "zero": torch.zeros(n).double(),
        "all equal": torch.ones(n).double(),
        "many decades": torch.logspace(-200, 0, n, dtype=torch.float64),
    }[spectrum]
    gram = (basis * values) @ basis.T
    gram = torch.stack([gram + gram.T, 3 * (gram + gram.T)])  # [2, n, n]: what comes second must not be mixed up with the first
    alone = eigen.eigvalsh_inside(gram.clone())
    got, u = eigen.eigh_inside(gram.clone())
    rounding = n * torch.finfo(torch.float64).eps
    assert (got.diff(dim=1) >= 0).all()
    for value in (got, alone):
        assert (value - torch.stack([2 * values.sort().values, 6 * values.sort().values])).abs().max() <= 10 * rounding
    assert (u.mT @ u - torch.eye(n)).abs().max() <= 10 * rounding  # less orthogonal than those of divide and conquer, by 5
    assert (gram @ u - u * got[:, None]).abs().max() <= 10 * rounding


def test_the_prox_of_large_matrices_is_that_of_the_oracle():
    x = torch.randn(2, eigen.LARGE + 8, eigen.LARGE + 1, generator=torch.Generator().manual_seed(2))
    tau = 0.03 * float(torch.linalg.matrix_norm(x, 2).max())  # low enough to need float64, high enough to cut
    result = svt(x, tau, "gram-float64")
    for got, values, one in zip(result.x, result.values, x, strict=True):
        expected = reference.svt(numpy64(one), tau)
        assert np.abs(numpy64(got) - expected).max() <= 1e-6 * np.abs(expected).max()
        assert int((values > 0).sum()) == np.linalg.matrix_rank(expected)
    assert (gram.singular_values(x) - torch.linalg.svdvals(x.double())).abs().max() <= 1e-10 * result.input_values.max()


def test_when_the_solver_of_large_matrices_fails_svd_steps_in(monkeypatch):
    def fails(*args, **options):
        raise np.linalg.LinAlgError("did not converge")

    monkeypatch.setattr("scipy.linalg.eigh", fails)
    x = torch.randn(eigen.LARGE, eigen.LARGE)
    result = svt(x, 1.0, "gram-float64")
    assert (result.solver, result.failures) == ("svd", ("gram-float64 (torch.float32, cpu): did not converge",))


def test_when_float32_fails_float64_steps_in(monkeypatch):
    x = torch.randn(9, 6)
    expected = reference.svt(numpy64(x), 1.0)
    monkeypatch.setattr(torch.linalg, "eigh", break_down(torch.float32)(torch.linalg.eigh))
    monkeypatch.setattr(torch.linalg, "svd", break_down(torch.float32)(torch.linalg.svd))
    result = svt(x, 1.0, "gram")
    assert [line.split(":")[0] for line in result.failures] == ["gram (torch.float32, cpu)", "svd (torch.float32, cpu)"]
    assert result.x.dtype == torch.float32
    np.testing.assert_allclose(result.x.numpy(), expected, rtol=0, atol=1e-6)


@every_solver
def test_when_everything_fails_the_error_names_the_matrix(monkeypatch, solver):
    for function in ("eigh", "svd"):
        monkeypatch.setattr(torch.linalg, function, break_down(torch.float32, torch.float64)(getattr(torch.linalg, function)))
    with pytest.raises(DecompositionError, match=r"^block\.3: no solver could decompose it \(.*did not converge.*\); nothing was changed$"):
        spectral_prox(torch.randn(9, 6), L1(), 1.0, solver=SOLVERS[solver], name="block.3")


def test_errors_that_are_no_breakdown_are_not_swallowed(monkeypatch):
    def full(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch.linalg, "eigh", full)
    with pytest.raises(RuntimeError, match="out of memory"):
        svt(torch.randn(5, 5), 1.0, "gram")


def test_state_counts_calls_and_failures(monkeypatch):
    x = torch.randn(6, 5)
    first = svt(x, 0.5, "gram")
    monkeypatch.setattr(torch.linalg, "eigh", break_down(torch.float32)(torch.linalg.eigh))
    second = svt(x, 0.5, "gram", state=first.state)
    third = svt(x, 0.5, "svd", state=second.state)
    assert [(r.state["calls"], r.state["failures"], r.state["solver"]) for r in (first, second, third)] == [
        (1, 0, "gram"),
        (2, 1, "svd"),
        (3, 1, "svd"),
    ]
    assert first.state["calls"] == 1  # handed over, not written into
    assert torch.equal(third.x, svt(x, 0.5, "svd").x)


@every_dtype
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_are_refused_by_name(dtype, bad):
    x = torch.zeros(2, 5, 4, dtype=dtype)
    x[1, 3, 2] = bad
    with pytest.raises(NonFiniteError, match=r"^layer\.weight holds NaN or Inf: nothing was changed"):
        spectral_prox(x, L1(), 0.1, name="layer.weight")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(3, 3, dtype=torch.int64), 1.0), InvalidTypeError, r"x: expected a real floating-point tensor, got torch\.int64"),
        ((torch.ones(3, 3, dtype=torch.complex64), 1.0), InvalidTypeError, r"got torch\.complex64"),
        (([[1.0]], 1.0), InvalidTypeError, "got list"),
        ((np.ones((2, 2)), 1.0), InvalidTypeError, "got ndarray"),
        ((torch.ones(3), 1.0), InvalidValueError, r"expected a non-empty matrix .*, got shape \(3,\)"),
        ((torch.tensor(1.0), 1.0), InvalidValueError, r"got shape \(\)"),
        ((torch.ones(2, 2, 2, 2), 1.0), InvalidValueError, r"got shape \(2, 2, 2, 2\)"),
        ((torch.ones(0, 3), 1.0), InvalidValueError, r"got shape \(0, 3\)"),
        ((torch.ones(3, 3), -0.1), InvalidValueError, r"tau = -0\.1"),
        ((torch.ones(3, 3), math.nan), InvalidValueError, "tau = nan"),
        ((torch.ones(3, 3), math.inf), InvalidValueError, "tau = inf"),
        ((torch.ones(3, 3), 1.0, "gramm"), InvalidValueError, r"solver = 'gramm' is unknown; did you mean 'gram'\?"),
        ((torch.ones(3, 3), 1.0, "zzz"), InvalidValueError, "solver = 'zzz' is unknown; valid: auto, gram, gram-float64, svd"),
    ],
)
def test_wrong_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        svt(*arguments)
