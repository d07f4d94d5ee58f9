"""The other question: not "how good at this size?" but "how small at this quality?"."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .budget import Budget
from .checks import check_choice, check_function, check_module, check_number
from .compaction import compress
from .costs import CURRENCIES
from .errors import InfeasibleBudgetError, InvalidValueError, one_line
from .measure import count_macs, count_params, evaluating
from .report import CompactReport
from .structures import LowRank

Shrink = Callable[[nn.Module, Budget], CompactReport]
# What a model costs now, where that can be counted: a time depends on the moment, and MACs on inputs.
COUNTS: dict[str, Callable[[nn.Module, Any], int | None]] = {
    "params": lambda model, _: count_params(model),
    "macs": lambda model, inputs: count_macs(model, inputs) if inputs is not None else None,
}


@dataclass(frozen=True, slots=True)
class Trial:
    """One budget that was tried: the fraction asked for, the score, whether it was good enough."""

    budget: float
    score: float
    good: bool


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The smallest model found.

    Attributes:
        model: a new model; the one that was given is unchanged. Where no budget was good enough, a copy of that one.
        report: what was cut; None where nothing was.
        budget: the fraction; 1 where no budget was good enough.
        score, dense_score: of this model and of the dense one.
        trials: in the order in which they were made.
    """

    model: nn.Module
    report: CompactReport | None
    budget: float
    score: float
    dense_score: float
    trials: tuple[Trial, ...]

    def __str__(self) -> str:
        """A line for what was found, one for each trial from the smallest budget up, and the report."""
        found = (
            f"{self.budget:.4g} of the dense cost"
            if self.report is not None
            else "no budget that was tried is good enough, the dense model"
        )
        lines = [f"{found}: score {self.score + 0.0:.4g} (dense {self.dense_score + 0.0:.4g})"]  # and no -0
        lines += [
            f"  {t.budget:.4g}: {t.score:.4g}, {'' if t.good else 'not '}good enough" for t in sorted(self.trials, key=lambda t: t.budget)
        ]
        return "\n".join(lines if self.report is None else [*lines, str(self.report)])


def smallest(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    max_loss: float,
    *,
    currency: str = "params",
    shrink: Shrink | None = None,
    structures: LowRank | Sequence[LowRank] | None = None,
    example_inputs: Any = None,
    calibration: Iterable[Any] | None = None,
    lowest: float = 0.02,
    precision: float = 0.05,
    report: Callable[[Trial], None] | None = None,
) -> SearchResult:
    r"""The smallest model that scores at most `max_loss` below the given one.

    .. math:: \operatorname{argmin}_b \; b \quad \text{subject to} \quad f(\text{model cut to } b) \ge f(\text{model}) - \text{max\_loss}

    by bisection of :math:`\log b`: every trial starts from the given weights, and the score is taken to fall with the
    budget. Use data for `evaluate` on which nothing else is reported: a search fits its data.

    Args:
        model: trained; not changed.
        evaluate: score of a model, larger is better; called in eval mode without gradients.
        max_loss: in the units of the score, at least 0.
        currency: `"params"`, `"macs"` or `"latency"`.
        shrink: cuts a copy of the model in place to a budget, with as much training as wanted, and returns the report;
            None: `laconic.compress` without training, with the next three arguments. That the copy is within the budget is
            checked (in params; in macs with example inputs).
        structures, example_inputs, calibration: see `laconic.compress`.
        lowest: smallest fraction that is tried (or the smallest feasible one, if that is larger).
        precision: stop once good and bad budgets are this close, relatively.
        report: called after every trial.

    Raises:
        InvalidTypeError: a number, or a function, that is none.
        InvalidValueError: an argument out of range, a score that is not a finite number, a `shrink` that leaves the model
            above the budget.

    Example:
        >>> import torch, laconic
        >>> net = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
        >>> x = torch.randn(64, 32)
        >>> wanted = net(x).detach()
        >>> found = laconic.smallest(net, lambda m: -float((m(x) - wanted).square().mean()), max_loss=0.01)
        >>> found.score >= -0.01
        True
    """
    check_module(model)
    check_function("evaluate", evaluate, "the model")
    check_choice("currency", currency, CURRENCIES)
    if shrink is not None:
        check_function("shrink", shrink, "the model and a budget")
    if report is not None:
        check_function("report", report, "a trial")
    for name, value in (("max_loss", max_loss), ("lowest", lowest), ("precision", precision)):
        check_number(name, value)
    if not (max_loss >= 0 and math.isfinite(max_loss)):
        raise InvalidValueError(f"max_loss = {max_loss}: must be finite and at least 0, in the units of the score")
    if not 0 < lowest < 1:
        raise InvalidValueError(f"lowest = {lowest}: a fraction of the dense cost, above 0 and below 1")
    if not 0 < precision < 1:
        raise InvalidValueError(f"precision = {precision}: must be above 0 and below 1")
    batches = list(calibration) if calibration is not None else None

    def cut(copied: nn.Module, budget: Budget) -> CompactReport:
        return compress(copied, structures, budget, example_inputs=example_inputs, calibration=batches)

    def score(candidate: nn.Module) -> float:
        with evaluating(candidate):
            value = evaluate(candidate)
        try:
            found = float(value)
        except (TypeError, ValueError, RuntimeError):  # the last is what PyTorch says of a tensor with several entries
            found = math.nan
        if not math.isfinite(found):
            what = value if value is None or isinstance(value, (int, float)) else f"{type(value).__name__} {value}"
            raise InvalidValueError(f"evaluate returned {one_line(what, 80)}: the score must be a finite number, larger is better")
        return found

    def check_shrunk(candidate: nn.Module, share: float) -> None:
        left = count(candidate, example_inputs)
        if left is None or dense_cost is None:
            return
        allowed = math.floor(share * dense_cost)
        if left > allowed:
            raise InvalidValueError(
                f"shrink was given Budget({currency}={share:.4g}), but the model still has {left} {CURRENCIES[currency].unit}, above the budget's {allowed}: did shrink call compact(), and does it change the model that it is given?"
            )

    def budget_of(share: float) -> Budget:
        amounts: dict[str, Any] = {currency: share}
        return Budget(**amounts)

    shrink = shrink or cut
    count = COUNTS.get(currency, lambda *_: None)
    dense_cost = count(model, example_inputs)
    dense_score = score(model)
    best = SearchResult(copy.deepcopy(model), None, 1.0, dense_score, dense_score, ())
    trials: list[Trial] = []
    bad, fraction = lowest, lowest
    while True:
        candidate = copy.deepcopy(model)
        try:
            cut_report = shrink(candidate, budget_of(fraction))
        except InfeasibleBudgetError as error:
            if not fraction < error.smallest < best.budget:
                break
            bad = fraction = error.smallest
            continue
        check_shrunk(candidate, fraction)
        found = score(candidate)
        trials.append(Trial(fraction, found, found >= dense_score - max_loss))
        if report is not None:
            report(trials[-1])
        if trials[-1].good:
            best = SearchResult(candidate, cut_report, fraction, found, dense_score, ())
            if fraction == bad:  # the lowest of all
                break
        else:
            bad = fraction
        if best.budget <= bad * (1 + precision):
            break
        fraction = math.sqrt(bad * best.budget)
    return SearchResult(best.model, best.report, best.budget, best.score, dense_score, tuple(trials))
