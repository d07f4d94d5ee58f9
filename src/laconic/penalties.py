r"""Penalties and projections on nonnegative values.

A penalty is a scalar function of a vector of nonnegative values (singular values, group norms, magnitudes), and three
methods are all that the rest of the package knows of it:

- ``value(s)``: the penalty, a 0-dim tensor;
- ``prox(s, tau)``: :math:`\operatorname{argmin}_{x \ge 0} \tfrac12 \|x - s\|_2^2 + \tau\, h(x)`;
- ``cutoff(tau)``: a value below which the prox certainly returns zero, whatever the other values are, so that a
  partial decomposition knows how deep it must look (0 when nothing can be said).

Values may be in any order, in the last dimension; leading dimensions are independent problems. Every method computes
in the dtype of `s`: callers pass float64 (a vector of singular values is small).

Slopes are normalised: L1, LogSum have slope 1 at zero, so that `tau` means the same shrinkage of small values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .checks import check_number, whole_number
from .errors import InvalidValueError


@runtime_checkable
class Penalty(Protocol):
    """What a penalty must offer; see the module's docstring."""

    def value(self, s: Tensor) -> Tensor: ...

    def prox(self, s: Tensor, tau: float) -> Tensor: ...

    def cutoff(self, tau: float) -> float: ...


def check_tau(tau: float) -> float:
    """`tau` as a float, or a clear error."""
    tau = float(tau)
    if not (tau >= 0 and math.isfinite(tau)):
        raise InvalidValueError(f"tau = {tau}: the threshold must be finite and at least 0")
    return tau


@dataclass(frozen=True, slots=True)
class L1:
    r"""Sum of the values: nuclear norm on singular values, group lasso on norms, lasso on magnitudes.

    .. math:: h(s) = \sum_i s_i, \qquad \operatorname{prox}(s, \tau)_i = (s_i - \tau)_+
    """

    def value(self, s: Tensor) -> Tensor:
        return s.sum(-1)

    def prox(self, s: Tensor, tau: float) -> Tensor:
        return (s - check_tau(tau)).clamp_min(0)

    def cutoff(self, tau: float) -> float:
        return check_tau(tau)


@dataclass(frozen=True, slots=True)
class LogSum:
    r"""Reweighted L1: small values are shrunk as by L1, large ones hardly at all.

    .. math:: h(s) = \epsilon \sum_i \log(1 + s_i / \epsilon)

    The prox solves :math:`x + \tau \epsilon / (\epsilon + x) = s` (the larger root), or is zero where zero has the
    smaller objective. On singular values this is the log-det surrogate of rank (Fazel, Hindi, Boyd 2003; Candes,
    Wakin, Boyd 2008).

    Args:
        epsilon: where shrinkage has fallen to half, in the units of the values. Large epsilon: L1; small: a hard
            threshold.
    """

    epsilon: float = 0.1

    def __post_init__(self) -> None:
        if not (self.epsilon > 0 and math.isfinite(self.epsilon)):
            raise InvalidValueError(f"LogSum(epsilon={self.epsilon}): must be finite and above 0")

    def value(self, s: Tensor) -> Tensor:
        return self.epsilon * torch.log1p(s / self.epsilon).sum(-1)

    def prox(self, s: Tensor, tau: float) -> Tensor:
        tau = check_tau(tau)
        if tau == 0:
            return s.clone()
        # (s + epsilon)^2 - 4 tau epsilon, in a form that neither overflows nor cancels.
        ratio = 2 * math.sqrt(tau) * math.sqrt(self.epsilon) / (s + self.epsilon)
        root = (1 - ratio).clamp_min(0).sqrt() * (1 + ratio).sqrt()
        x = ((s - self.epsilon) + (s + self.epsilon) * root) / 2
        return torch.where(s > self.cutoff(tau), x.clamp(min=0).minimum(s), torch.zeros_like(s))

    def cutoff(self, tau: float) -> float:
        r"""tau where the objective is convex (tau <= epsilon); above, the s at which zero and the larger root tie."""
        tau = check_tau(tau)
        if tau <= self.epsilon:
            return tau
        t = tau / self.epsilon  # in units of epsilon, so that no product vanishes or overflows

        def advantage_of_zero(s: float) -> float:
            ratio = 2 * math.sqrt(t) / (s + 1)
            x = max(((s - 1) + (s + 1) * math.sqrt(max(1 - ratio, 0.0) * (1 + ratio))) / 2, 0.0)
            # 1/2 (x - s)^2 + t h(x) - 1/2 s^2; decreasing in s.
            return x * (x / 2 - s) + t * math.log1p(x)

        low, high = max(2 * math.sqrt(t) - 1, 0.0), t
        for _ in range(200):
            middle = (low + high) / 2
            if not low < middle < high:
                break
            if advantage_of_zero(middle) > 0:
                low = middle
            else:
                high = middle
        return low * self.epsilon


@dataclass(frozen=True, slots=True)
class Hoyer:
    r"""Ratio of the 1-norm to the 2-norm: scale free, between 1 (one value) and sqrt(n) (all equal).

    .. math:: h(s) = \|s\|_1 / \|s\|_2, \qquad h(0) = 0

    For a fixed direction d the best length is :math:`\langle s, d \rangle`, and every stationary direction has the
    form :math:`(s - \rho)_+`, so the prox is a search over the one number rho: the minimum of
    :math:`-\tfrac12 \langle s, d\rangle^2 + \tau \|d\|_1` over unit d, one interval of rho per support size (Tao
    2022, *Minimization of L1 over L2*, for the form; the search ends at `16^-14` of an interval).
    Because the values are coupled, no cutoff can be given.
    """

    def value(self, s: Tensor) -> Tensor:
        top = s.amax(-1, keepdim=True)
        t = s / torch.where(top > 0, top, torch.ones_like(top))  # so that squares neither vanish nor overflow
        return t.sum(-1) / torch.linalg.vector_norm(t, dim=-1).clamp_min(1)  # at least 1, but for s = 0

    def prox(self, s: Tensor, tau: float) -> Tensor:
        tau = check_tau(tau)
        if tau == 0 or s.numel() == 0:
            return s.clone()
        if s.ndim > 1:
            rows = [self.prox(row, tau) for row in s.reshape(-1, s.shape[-1])]
            return torch.stack(rows).reshape(s.shape)
        scale = s.max()
        if scale == 0:
            return s.clone()
        t, tau = s / scale, tau / float(scale) / float(scale)  # the 2-norm cancels one scale, the square the other
        ordered = t.sort(descending=True).values
        count = torch.arange(1, len(t) + 1, dtype=s.dtype, device=s.device)
        sum1, sum2 = ordered.cumsum(0), ordered.square().cumsum(0)
        # With support size k, rho lies between the (k+1)-th and the k-th value.
        low = torch.cat([ordered[1:], ordered.new_zeros(1)])
        high = ordered

        def objective(rho: Tensor) -> Tensor:
            inner = sum2 - rho * sum1
            norm = (sum2 - 2 * rho * sum1 + count * rho * rho).clamp_min(0).sqrt()
            safe = norm.clamp_min(1e-150)
            value = -0.5 * (inner / safe) ** 2 + tau * (sum1 - count * rho) / safe
            return torch.where(norm > 1e-12, value, torch.full_like(value, math.inf))

        # rho = high gives d = 0 when the top values tie: stay a hair inside.
        grid = torch.linspace(0, 1 - 1e-9, 33, dtype=s.dtype, device=s.device)[:, None]
        for _ in range(14):  # every pass shrinks each interval by 16
            points = low + (high - low) * grid
            best = torch.stack([objective(p) for p in points]).argmin(0)
            low = points.gather(0, (best - 1).clamp_min(0)[None])[0]
            high = points.gather(0, (best + 1).clamp_max(32)[None])[0]
        rho = (low + high) / 2
        values = objective(rho)
        k = int(values.argmin())
        top_share = t.eq(1).sum()
        tied = -0.5 * top_share + tau * top_share.sqrt()  # all weight on the tied largest values
        if min(float(values[k]), float(tied)) >= 0:  # zero has objective 0 on this scale
            return torch.zeros_like(s)
        direction = t.eq(1).to(s.dtype) if tied < values[k] else (t - rho[k]).clamp_min(0)
        direction = direction / torch.linalg.vector_norm(direction)
        return scale * (t @ direction) * direction

    def cutoff(self, tau: float) -> float:
        check_tau(tau)
        return 0.0


@dataclass(frozen=True, slots=True)
class KeepLargest:
    r"""Projection: keep the k largest values, zero the rest. The prox does not depend on tau.

    .. math:: \operatorname{argmin}_x \tfrac12 \|x - s\|^2 \quad \text{subject to} \quad \|x\|_0 \le k
    """

    k: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", whole_number("KeepLargest: k", self.k, least=1))

    def value(self, s: Tensor) -> Tensor:
        return torch.where((s > 0).sum(-1) <= self.k, 0.0, math.inf)

    def prox(self, s: Tensor, tau: float) -> Tensor:
        check_tau(tau)
        if self.k >= s.shape[-1]:
            return s.clone()
        top = s.topk(self.k, dim=-1)
        return torch.zeros_like(s).scatter(-1, top.indices, top.values)

    def cutoff(self, tau: float) -> float:
        check_tau(tau)
        return 0.0


@dataclass(frozen=True, slots=True)
class KeepEnergy:
    r"""Projection: keep the fewest largest values whose squares sum to at least `share` of the whole.

    .. math:: \min r \quad \text{subject to} \quad \sum_{i \le r} s_i^2 \ge e \sum_i s_i^2
    """

    share: float

    def __post_init__(self) -> None:
        check_share(self.share)

    def count(self, s: Tensor) -> Tensor:
        """How many values are kept (at least one where any is above zero)."""
        return energy_count(s, self.share)

    def value(self, s: Tensor) -> Tensor:
        return torch.where((s > 0).sum(-1) <= self.count(s), 0.0, math.inf)

    def prox(self, s: Tensor, tau: float) -> Tensor:
        check_tau(tau)
        order = s.sort(dim=-1, descending=True).indices
        place = torch.empty_like(order).scatter(-1, order, torch.arange(s.shape[-1]).expand_as(order).to(order))
        return torch.where(place < self.count(s)[..., None], s, torch.zeros_like(s))

    def cutoff(self, tau: float) -> float:
        check_tau(tau)
        return 0.0


def check_share(share: float) -> float:
    check_number("energy share", share)
    if not 0 < share <= 1:
        raise InvalidValueError(f"energy share = {share}: must be above 0 and at most 1")
    return float(share)


def energy_count(s: Tensor, share: float) -> Tensor:
    """The smallest r with `sum of the r largest squares >= share * sum of squares`, along the last dimension."""
    check_share(share)
    top = s.amax(-1, keepdim=True)
    squares = (s / torch.where(top > 0, top, torch.ones_like(top))).square().sort(dim=-1, descending=True).values
    kept = squares.cumsum(-1)
    enough = kept >= share * kept[..., -1:]
    r = enough.to(torch.int64).argmax(-1) + 1
    return torch.where(kept[..., -1] > 0, r, torch.zeros_like(r))
