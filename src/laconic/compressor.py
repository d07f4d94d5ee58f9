"""The object beside the optimizer: it watches the steps, shrinks the spectra, cuts the layers.

Nothing in the training loop changes. After the optimizer's own step a hook adds the learning rate of that step to each
weight's account; every few steps the account is paid with one proximal step.

One object, one file, and therefore a long one: the run, its end, and its resumption share all of its state.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from .allocate import Floats, log_shares, numerical_rank
from .budget import Budget, ranks_for_budget
from .compaction import CutResult, Ranks, choose_ranks, cut_sites, energy_ranks, guarded, make_report, spectra
from .errors import (
    CheckpointError,
    InvalidTypeError,
    InvalidValueError,
    LaconicError,
    NonFiniteError,
    OptimizerError,
    nearest,
)
from .measure import check_inputs
from .optimizers import check_optimizers, has_hooks, holds, last_holder, learning_rate, peak_learning_rate, was_skipped
from .penalties import check_share
from .plan import check_structures, make_plan, use_unfoldings
from .report import CompactReport, Snapshot
from .schedule import Controller, Schedule
from .structures import LowRank, Site, combined

STATE_VERSION = 1
MAX_SNAPSHOTS = 200


class Compressor:
    """Compression as a part of training.

    With a `budget`: a short dense warm-up, then pressure that is steered towards the budget, then (`cut="early"`) the
    layers are cut in mid-run, the optimizer's state is carried over, and the smaller network trains on. Without:
    `strength=` rules, the prox runs from the first step to the last, and nothing is cut before `compact()`.

    Args:
        model: trained in place.
        optimizer: the optimizer, or a list of several. Hooked; for one without hooks call `compressor.step()` after
            each of its steps.
        structures: what is compressed; None: `[LowRank()]`.
        budget: how much the result may cost.
        total_steps: optimizer steps of the whole run; needed with a budget.
        example_inputs: tuple of positional arguments; needed for MACs and for the check of the outputs.
        every: steps between proximal steps; None: 20, or a fiftieth of the run where that is less.
        cut: `"early"` or `"end"` (at `compact()`); without a budget always at the end.
        schedule: when pressure begins and when the layers are cut, as fractions of the run.
        calibration: not here, but in `compact`.

    Raises:
        LaconicError and its precise subclasses: neither budget nor strength; a budget without `total_steps`; out of
        reach (with the smallest feasible value); a model with nothing to compress; an optimizer that does not own the
        model's weights, or is LBFGS; NaN or Inf in a weight; a pattern that matches nothing.

    Example:
        >>> import torch, laconic
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> compressor = laconic.Compressor(model, optimizer, budget=laconic.Budget(params=0.5), total_steps=100)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        structures: LowRank | Sequence[LowRank] | None = None,
        *,
        budget: Budget | None = None,
        total_steps: int | None = None,
        example_inputs: Any = None,
        every: int | None = None,
        cut: str = "early",
        schedule: Schedule | None = None,
    ):
        if not isinstance(model, nn.Module):
            raise InvalidTypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        structures = check_structures(structures)
        _check_arguments(structures, budget, total_steps, every, cut, schedule)
        optimizers = check_optimizers(optimizer)
        trained = {p for o in optimizers for g in o.param_groups for p in g["params"]}
        if not any(p in trained for p in model.parameters()):
            raise OptimizerError(
                "the optimizer does not own any of the model's weights: build it from model.parameters() of this very model, after moving it to its device"
            )

        self.model = model
        self.optimizers = optimizers
        self.budget = budget
        self.total_steps = total_steps
        self.example_inputs = check_inputs(example_inputs) if example_inputs is not None else None
        self.every = every or (20 if total_steps is None else max(1, min(20, total_steps // 50)))
        self.schedule = schedule or Schedule()
        self.cut_early = cut == "early" and budget is not None
        self.plan = make_plan(model, structures, example_inputs, trained)
        for site in self.plan.sites:
            if not bool(torch.isfinite(site.weight).all()):
                raise NonFiniteError(f"{site.name} holds NaN or Inf before training: initialise or load the model again")
        start = spectra(self.plan)
        if budget is not None:
            ranks_for_budget(self.plan, start, budget)  # out of reach: said now, not at the end
        self.spectra_start = {k: v.astype(np.float32) for k, v in start.items()}  # for the report; small
        self.controller = self._controller()
        self.energy: float | None = None
        self.history: list[Snapshot] = []
        self.failures: list[str] = []
        self.solvers: dict[str, str] = {}
        self._owner = {s.name: last_holder(optimizers, s.weight) for s in self.plan.sites}
        self._owed = {s.name: 0.0 for s in self.plan.sites}
        self._values: dict[str, Floats] = {}
        self._steps = [0] * len(optimizers)
        self._stride = 1
        self._cuts: list[CutResult] = []
        self._report: CompactReport | None = None
        self._handles = [o.register_step_post_hook(partial(self._after_step, i)) for i, o in enumerate(optimizers) if has_hooks(o)]
        self._unhooked = [i for i, o in enumerate(optimizers) if not has_hooks(o)]

    @classmethod
    def as_published(
        cls, model: nn.Module, optimizer: Any, strength: float, steps_per_epoch: int, energy: float = 0.9, **low_rank: Any
    ) -> Self:
        """Alvarez & Salzmann 2017: nuclear norm, absolute threshold, one proximal step at the end of each epoch; `compact`
        keeps the share `energy` of each layer's squared singular values. `low_rank`: further options of `LowRank`."""
        compressor = cls(model, optimizer, [LowRank.as_published(strength, **low_rank)], every=steps_per_epoch)
        compressor.energy = check_share(energy)
        return compressor

    def _controller(self) -> Controller | None:
        """A controller, where a budget rules and no structure has a strength of its own."""
        if self.budget is None or self.total_steps is None or any(s.structure.strength is not None for s in self.plan.sites):
            return None
        # Half of the unit of the spectra over the whole phase of pressure, were the learning rate at its peak throughout.
        span = (self.cut_fraction - self.schedule.warmup) * self.total_steps
        return Controller(strength=0.5 / max(span * peak_learning_rate(self.optimizers), 1e-12))

    @property
    def cut_fraction(self) -> float:
        return self.schedule.cut if self.cut_early else 1.0

    # ---- the run ------------------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Optimizer steps so far (of the first optimizer; skipped ones do not count)."""
        return self._steps[0]

    def step(self) -> None:
        """Tell that an optimizer without hooks has stepped. Hooked optimizers need no call, and refuse one."""
        if not self._unhooked:
            raise LaconicError(
                "compressor.step() is only for optimizers without hooks; yours is hooked, so that optimizer.step() is enough"
            )
        for index in self._unhooked:
            self._after_step(index, self.optimizers[index])

    def _after_step(self, index: int, optimizer: Any, *_: Any) -> None:
        if was_skipped(optimizer):
            return
        self._steps[index] += 1
        cut_now = self.cut_early and not self._cuts and index == len(self.optimizers) - 1 and self.progress >= self.schedule.cut
        if self._cuts or not self._pressing:
            if cut_now:
                self._cut_in_mid_run()
            return
        for site in self.plan.sites:
            # A weight without a gradient was not moved by this step. Rates are read now: a scheduler may change them next.
            if site.weight.grad is not None and site.weight.requires_grad and holds(optimizer, site.weight):
                self._owed[site.name] += learning_rate(optimizer, site.weight)
        if self._steps[index] % self.every == 0 or cut_now:
            self._prox([s for s in self.plan.sites if cut_now or self._owner[s.name] is optimizer])
        if cut_now:
            self._cut_in_mid_run()

    @property
    def progress(self) -> float:
        """Share of `total_steps` done; 0 where it is not known."""
        return self.steps / self.total_steps if self.total_steps else 0.0

    @property
    def _pressing(self) -> bool:
        """Without a budget: always. With one: from the end of the warm-up on."""
        return self.budget is None or self.progress >= self.schedule.warmup

    def strength(self, site: Site) -> float:
        """The strength that holds for a weight now."""
        if site.structure.strength is not None:
            return site.structure.strength
        assert self.controller is not None
        return self.controller.strength

    def _prox(self, sites: Sequence[Site]) -> None:
        if not sites:  # the step of an optimizer that holds none of the weights: steering is once per round
            return
        for site in sites:
            owed, self._owed[site.name] = self._owed[site.name], 0.0
            tau = self.strength(site) * owed
            if tau == 0 or not site.weight.requires_grad:
                continue
            try:
                result = site.structure.shrink(site, tau)
            except NonFiniteError as error:
                self._owed[site.name] = owed
                gradient = site.weight.grad
                where = (
                    "its gradient holds them too"
                    if gradient is not None and not bool(torch.isfinite(gradient).all())
                    else "its last gradient was finite"
                )
                raise NonFiniteError(f"{error} ({where}; optimizer step {self.steps})") from None
            self._values[site.name] = combined(result.values).numpy()
            self.plan.ranks[site.name] = result.rank
            self.solvers[site.name] = result.solver
            self.failures += [f"step {self.steps}, {site.name}: {line}" for line in result.failures]
        self._steer()
        self._remember()

    def _steer(self) -> None:
        if self.controller is None or self.budget is None or len(self._values) < len(self.plan.sites):
            return
        span = self.cut_fraction - self.schedule.warmup
        self.controller.update(min((self.progress - self.schedule.warmup) / span, 1.0), self.gap())

    def gap(self) -> float:
        """What a cut to the budget would lose now (see `Controller`), from the spectra of the last proximal step."""
        if self.budget is None or len(self._values) < len(self.plan.sites):
            return math.nan
        ranks = ranks_for_budget(self.plan, self._values, self.budget)
        kept = [log_shares(self._values[name])[rank - 1] for name, rank in ranks.items() if rank is not None]
        return -float(np.sum(kept)) / len(ranks)

    def _remember(self) -> None:
        """Keep a thinned history: at most MAX_SNAPSHOTS, evenly spread."""
        if self.history and (self.steps - self.history[-1].step) < self._stride * self.every:
            return
        strengths = [self.strength(s) for s in self.plan.sites]
        self.history.append(Snapshot(self.steps, sum(strengths) / len(strengths), dict(self.plan.ranks)))
        if len(self.history) > MAX_SNAPSHOTS:
            del self.history[1::2]
            self._stride *= 2

    def _cut_in_mid_run(self) -> None:
        assert self.budget is not None
        values = spectra(self.plan)
        ranks = ranks_for_budget(self.plan, values, self.budget)
        self._cut(values, ranks, None, {}, [])

    def _cut(
        self, values: dict[str, Floats], ranks: Ranks, calibration: Any, times: dict[str, tuple[float, float]], notes: list[str]
    ) -> None:
        result = cut_sites(
            self.model, self.plan, values, ranks,
            example_inputs=self.example_inputs, optimizers=self.optimizers, calibration=calibration, timings=times,
        )  # fmt: skip
        result.notes[:0] = notes
        self._cuts.append(result)
        self.plan.ranks |= {name: rank for name, rank in result.ranks.items() if rank is not None}
        self._forget(result.ranks)
        self.history.append(Snapshot(self.steps, math.nan if not self.history else self.history[-1].strength, dict(self.plan.ranks)))

    def _forget(self, ranks: Ranks) -> None:
        """Let go of the layers that were cut out, or their dense weights would stay in memory."""
        for site in self.plan.sites:
            if ranks[site.name] is not None:
                site.modules = ()

    # ---- the end ------------------------------------------------------------------------------------------------

    def compact(self, energy: float | None = None, *, calibration: Iterable[Any] | None = None, only_faster: bool = False) -> CompactReport:
        """Cut what is still to be cut, in place, verified; a second call changes nothing and returns the same report.

        With a budget the ranks are chosen for it; else by `energy`, the share of squared singular values that every
        layer keeps; with neither, what is zero to rounding goes and nothing else.

        Args:
            energy: see above; not together with a budget.
            calibration: batches of inputs on which BatchNorm statistics are re-estimated.
            only_faster: time every layer on the example inputs and leave dense what does not get faster.

        Raises:
            InvalidValueError: `energy` together with a budget, or out of range.
            SurgeryError: refused; the model is as it was.
        """
        if self._report is not None:
            return self._report
        if energy is not None and self.budget is not None:
            raise InvalidValueError(f"compact(energy={energy}): the budget rules here; leave energy out")
        energy = check_share(energy) if energy is not None else self.energy
        notes = []
        if not self._cuts:
            if self.cut_early:
                done = f"{self.steps} of {self.total_steps} steps"
                notes.append(f"the run ended after {done}, before the cut at {self.schedule.cut:.0%}: cut now, without training afterwards")
                warnings.warn(f"laconic: {notes[-1]}", stacklevel=2)
            unpaid = [
                (s, s.weight.detach().clone(), self._owed[s.name]) for s in self.plan.sites if self._pressing and self._owed[s.name] > 0
            ]
            try:
                self._prox([s for s, _, _ in unpaid])
                values = spectra(self.plan)
                ranks, times, more = choose_ranks(
                    self.model, self.plan, values, partial(self._choose, values, energy), only_faster, self.example_inputs
                )
                self._cut(values, ranks, calibration, times, more)
            except BaseException:
                for site, weight, owed in unpaid:
                    site.weight.data.copy_(weight)
                    self._owed[site.name] = owed
                raise
        elif calibration is not None:
            notes.append("calibration had no effect: the model trained on after the cut")
        self._cuts[-1].notes += [*notes, *self._solver_notes()]
        self.detach()
        self._report = make_report(
            self.model,
            self.plan,
            self._cuts,
            self.example_inputs,
            history=tuple(self.history),
            spectra_start={k: tuple(float(f"{x:.6g}") for x in v) for k, v in self.spectra_start.items()},
        )
        return self._report

    def _choose(self, values: dict[str, Floats], energy: float | None, keep_dense: frozenset[str]) -> Ranks:
        if self.budget is not None:
            return ranks_for_budget(self.plan, values, self.budget, keep_dense)
        if energy is not None:
            ranks = energy_ranks(self.plan, values, energy)
        else:
            ranks = {
                s.name: guarded(s, numerical_rank(values[s.name], torch.finfo(s.weight.dtype).eps, max(s.unfolding.m, s.unfolding.n)))
                for s in self.plan.sites
            }
        return {name: None if name in keep_dense else rank for name, rank in ranks.items()}

    def _solver_notes(self) -> list[str]:
        """Which solvers `auto` chose in the last proximal step of each weight, and every failure that was survived."""
        chosen = sorted(set(self.solvers.values()))
        weights = {name: [w for w, used in self.solvers.items() if used == name] for name in chosen}
        notes = [f"proximal steps every {self.every} steps, by the solver {name}: {', '.join(weights[name])}" for name in chosen]
        return notes + [f"a solver failed and another was used: {line}" for line in self.failures]

    def detach(self) -> None:
        """Remove the hooks: from here on the optimizer runs alone."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def metrics(self) -> dict[str, float]:
        """A flat dict for any logger: step, strength, ranks, and the share of parameters that these ranks would leave."""
        sites = self.plan.sites
        left = self.plan.fixed_params
        for site in sites:
            rank = self.plan.ranks.get(site.name, site.unfolding.full_rank)
            left += rank * site.unfolding.unit_params if rank <= site.break_even else site.unfolding.dense_params
        flat = {
            "laconic/step": float(self.steps),
            "laconic/strength": sum(self.strength(s) for s in sites) / len(sites),
            "laconic/params_fraction": left / self.plan.params,
            "laconic/cut": float(bool(self._cuts)),
            "laconic/solver_failures": float(len(self.failures)),
        }
        if self.controller is not None and not self._cuts and len(self._values) == len(sites):
            flat["laconic/gap"] = self.gap()
        return flat | {f"laconic/rank/{s.name}": float(self.plan.ranks.get(s.name, s.unfolding.full_rank)) for s in sites}

    # ---- resume -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs besides the model's and the optimizer's own state; plain tensors and numbers."""
        return {
            "version": STATE_VERSION,
            "names": [s.name for s in self.plan.sites],
            "settings": self._settings(),
            "unfoldings": {s.name: s.unfolding.name for s in self.plan.sites},
            "steps": list(self._steps),
            "owed": dict(self._owed),
            "values": {k: torch.from_numpy(v.copy()) for k, v in self._values.items()},
            "ranks": dict(self.plan.ranks),
            "every": self.every,
            "stride": self._stride,
            "controller": {"strength": self.controller.strength, "start_gap": self.controller.start_gap} if self.controller else None,
            "history": [{"step": h.step, "strength": h.strength, "ranks": dict(h.ranks)} for h in self.history],
            "spectra_start": {k: v.tolist() for k, v in self.spectra_start.items()},
            "failures": list(self.failures),
            "solvers": dict(self.solvers),
            "cuts": [
                {
                    "ranks": c.ranks, "values": {k: torch.from_numpy(v.copy()) for k, v in c.values.items()}, "errors": c.errors,
                    "max_abs_diff": c.max_abs_diff, "notes": c.notes, "timings": {k: list(v) for k, v in c.timings.items()},
                }
                for c in self._cuts
            ],
        }  # fmt: skip

    def _settings(self) -> dict[str, Any]:
        """What must be the same on resume. The interval and the unfoldings are not here: they are taken from the state."""
        return {
            "total_steps": self.total_steps,
            "budget": dataclasses.asdict(self.budget) if self.budget is not None else None,
            "schedule": dataclasses.asdict(self.schedule),
            "cut": "early" if self.cut_early else "end",
            "structures": [repr(s.structure) for s in self.plan.sites],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume. Call it first, on a fresh dense model with its optimizer: it makes the same cuts on both; then load the
        model's and the optimizer's own state.

        Raises:
            CheckpointError: another format version, or a state of another model.
        """
        version = state.get("version")
        if version != STATE_VERSION:
            raise CheckpointError(f"compressor state has format version {version!r}; this laconic reads {STATE_VERSION}")
        names = [s.name for s in self.plan.sites]
        if state["names"] != names:
            differing = sorted(set(names) ^ set(state["names"]))
            raise CheckpointError(
                f"compressor state belongs to another model or other structures; differing weights: {', '.join(differing) or 'order'}"
            )
        settings = self._settings()
        changed = [f"{k} was {v!r}, is {settings.get(k)!r}" for k, v in state["settings"].items() if settings.get(k) != v]
        if changed:
            raise CheckpointError(f"compressor state was saved with other settings, a resume could not be exact: {'; '.join(changed)}")
        if len(state["steps"]) != len(self.optimizers):
            raise CheckpointError(f"compressor state has {len(state['steps'])} optimizers, this one {len(self.optimizers)}")
        use_unfoldings(self.model, self.plan, state["unfoldings"], self.example_inputs)
        self._steps = list(state["steps"])
        self._owed = dict(state["owed"])
        self._values = {k: v.numpy().copy() for k, v in state["values"].items()}
        self.plan.ranks = dict(state["ranks"])
        self.every, self._stride = state["every"], state["stride"]
        if self.controller is not None and state["controller"] is not None:
            self.controller.strength, self.controller.start_gap = state["controller"]["strength"], state["controller"]["start_gap"]
        self.history = [Snapshot(**h) for h in state["history"]]
        self.spectra_start = {k: np.array(v, dtype=np.float32) for k, v in state["spectra_start"].items()}
        self.failures, self.solvers = list(state["failures"]), dict(state["solvers"])
        for saved in state["cuts"]:
            values = {k: v.numpy().copy() for k, v in saved["values"].items()}
            times = {k: (v[0], v[1]) for k, v in saved["timings"].items()}
            replayed = cut_sites(self.model, self.plan, spectra(self.plan), saved["ranks"], optimizers=self.optimizers)
            self._cuts.append(CutResult(replayed.ranks, values, saved["errors"], saved["max_abs_diff"], list(saved["notes"]), times))
            self._forget(replayed.ranks)


def _check_arguments(structures: Sequence[LowRank], budget: Any, total_steps: Any, every: Any, cut: Any, schedule: Any) -> None:
    if budget is None and any(s.strength is None for s in structures):
        raise InvalidValueError(
            "Compressor needs a budget=laconic.Budget(params=0.25) (with total_steps=), or structures=[laconic.LowRank(strength=...)]"
        )
    if budget is not None and not isinstance(budget, Budget):
        raise InvalidTypeError(f"budget = {budget!r}: expected laconic.Budget(params=0.25)")
    if budget is not None and total_steps is None:
        raise InvalidValueError("a budget needs total_steps= (epochs x steps per epoch), to know when to press and when to cut")
    for name, value in (("total_steps", total_steps), ("every", every)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise InvalidValueError(f"{name} = {value!r}: must be a whole number, at least 1")
    if budget is None and schedule is not None:
        raise InvalidValueError("schedule= has no effect without a budget: a strength presses from the first step to the last")
    if cut not in ("early", "end"):
        raise InvalidValueError(f"cut = {cut!r} is unknown{nearest(str(cut), ('early', 'end'))}")
