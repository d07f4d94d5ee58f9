"""The object beside the optimizer: it watches the steps, shrinks the spectra, cuts the layers.

Nothing in the training loop changes. After the optimizer's own step a hook adds the learning rate of that step to each
weight's account; every few steps the account is paid with one proximal step.

One object, one file, and therefore a long one: the run, its end, and its resumption share all of its state.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from .allocate import Floats, log_shares, numerical_rank
from .arguments import check_arguments, check_processes
from .axes import Covariances, Sums, covariances, turn
from .budget import (
    Budget,
    Shapes,
    correct,
    cost_weights,
    is_met,
    needless,
    no_options,
    optional_groups,
    prepare,
    ranks_for_budget,
    shapes_for_budget,
)
from .checks import check_module
from .compaction import choose_ranks, cut_sites, energy_ranks, guarded, not_carried, replay_cuts, spectra, values_of
from .costs import Ranks, present_costs
from .cuts import all_or_nothing, uninterrupted
from .distributed import agreed, bare, is_compiled, is_sharded, load_whole, reshard
from .errors import (
    CheckpointError,
    InfeasibleBudgetError,
    InvalidTypeError,
    InvalidValueError,
    LaconicError,
    NonFiniteError,
    OptimizerError,
    SurgeryError,
    one_line,
)
from .graph import NOT_REACHED
from .latency import skeleton
from .matricize import Unfolding
from .measure import check_inputs
from .moments import InputMoments
from .optimizers import (
    attached_to,
    check_optimizers,
    check_parameters,
    check_trained,
    has_hooks,
    holds,
    last_holder,
    learning_rate,
    named_by_identity,
    peak_learning_rate,
    was_skipped,
)
from .outcome import make_report, run_notes
from .pace import Scales, gradient_scales, scale_gradients, scale_moments
from .penalties import check_share
from .plan import check_structures, make_plan, streams_through, use_unfoldings
from .refit import refit_layers
from .report import CompactReport, Snapshot
from .schedule import EVEN, TURNED, Controller, Schedule, too_many_steps
from .slimming import consumers, importances_of, slim_neurons, unseen, watch_inputs
from .state import VERSION, RunState
from .structures import Channels, LowRank, Neurons, Site, Structure, Weight, shrink
from .surgery.batchnorm import as_batches, batch_norms
from .surgery.constants import dead_constants, fold, unread_units
from .timing import RankTimes, ShapeWatch, layer_times
from .watch import Watch, drop_dead
from .widths import LANES, choose_shapes

TINY = 1e-12  # a learning rate that is as good as none
ROUNDS = 16  # proximal steps in the phase of pressure, unless `every` is given
# A layer is cut in mid-run once its pair takes at most this share of its time in training, and again whenever its rank
# has fallen by a fifth. Where the time could not be measured: once it has this share of the break-even rank.
FIRST_CUT = 0.9
NEXT_CUT = 0.8
# A group of neurons is slimmed in mid-run once it keeps at most this share of those it has.
NEXT_SLIM = 0.9
FIRST_CUT_UNMEASURED = 0.6
STREAMS = "a residual stream runs through most of the model; structures=[LowRank(), Channels()] goes by what each layer has learnt"


class Compressor:
    """Compression as a part of training.

    With a `budget`: a short dense warm-up, then pressure that is steered towards the budget, then (`cut="early"`) the
    layers are cut in mid-run, the optimizer's state is carried over, and the smaller network trains on. Without:
    `strength=` rules, the prox runs from the first step to the last, and nothing is cut before `compact()`.

    Args:
        model: trained in place.
        optimizer: the optimizer, or a list of several. Hooked; for one without hooks call `compressor.step()` after
            each of its steps.
        structures: what is compressed; None: `[LowRank(), Channels(optional=True)]`: ranks alone, and neurons too where ranks alone would keep less of the network or the budget bounds MACs or milliseconds, and
            `[LowRank()]` without example inputs or with `cut="end"`, where no training repairs what neurons leave behind;
            `[Channels(even=True)]` where residual streams run through most of the model, as in a transformer. In multiples of 8 where the budget is in milliseconds.
        budget: how much the result may cost.
        total_steps: optimizer steps of the whole run; needed with a budget.
        example_inputs: tuple of positional arguments, or a dict of arguments by name; needed for MACs (which a budget in parameters prices, too), for `Channels`, and for the check of the outputs.
        every: steps between proximal steps; None: 16 rounds until the network settles, or 20 steps without a budget.
        cut: `"early"` or `"end"` (at `compact()`); without a budget always at the end.
        rebuild: several processes and `cut="early"`: called with the bare model at the end of every optimizer step that
            cut it, in every process; wrap the model in a new DistributedDataParallel there, and use that from the next
            step on (see docs/distributed.md).
        schedule: when pressure begins and when the layers are cut, as fractions of the run; None: `Schedule()`, and where all widths shrink by
            the same part (`Channels(even=True)`) `Schedule(warmup=0.01, settle=0.02)`, or `Schedule(warmup=0.05, settle=0.2)` where no channels can be turned to principal axes.

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
        structures: Structure | Sequence[Structure] | None = None,
        *,
        budget: Budget | None = None,
        total_steps: int | None = None,
        example_inputs: Any = None,
        every: int | None = None,
        cut: str = "early",
        schedule: Schedule | None = None,
        rebuild: Callable[[nn.Module], Any] | None = None,
    ):
        check_module(model)
        self.sharded = any(is_sharded(p) for p in model.parameters())
        trains_on = cut == "early" and not self.sharded
        multiple = budget.multiple if isinstance(budget, Budget) else 1
        in_params = not isinstance(budget, Budget) or budget.currencies == ("params",)
        default = structures is None
        structures, unasked = check_structures(structures, example_inputs, trains_on, multiple, optional=in_params)
        total_steps, every = check_arguments(structures, budget, total_steps, every, cut, schedule)
        self._compiled = is_compiled(model)
        model = bare(model)
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
        self.example_inputs = check_inputs(example_inputs, model) if example_inputs is not None else None
        self.rebuild = rebuild
        self.cut_early = cut == "early" and budget is not None
        check_processes(structures, self.sharded, self.cut_early, budget, rebuild)
        if any(other.model is model for o in optimizers for other in attached_to(o, Compressor)):
            raise OptimizerError("another Compressor is on this model and optimizer already: detach() that one first, or go on with it")
        self.plan = make_plan(model, structures, example_inputs, trained)
        if default and streams_through(self.plan):
            found = [g.group for g in self.plan.neurons], self.plan.whole
            structures = [Channels(even=True, multiple=multiple if multiple > 1 else None)]
            self.plan = make_plan(model, structures, example_inputs, trained, found)
            sizes = f"in multiples of {LANES}" + ("" if multiple > 1 else " or, where these are too coarse, of less")
            unasked = [f"all widths shrink by the same part, {sizes}, and no rank: {STREAMS}"]
        self.structures = structures
        even = TURNED if self._turns else EVEN
        if self._turns:
            turned = ", ".join(g.name for g in self.plan.neurons if g.basis is not None)
            unasked.append(
                f"the channels of {turned} are turned to principal axes before some go: nothing is pressed, and all widths are cut at once"
            )
            if any(x.structure.strength for x in self.plan.neurons):
                unasked.append("strength has no effect beside it; Channels(even=True, principal=False) presses channels as they are")
        self.schedule = schedule or (even if any(isinstance(s, Channels) and s.even for s in structures) else Schedule())
        if forgotten := [name for name, p in model.named_parameters() if p.requires_grad and p not in trained]:
            names = ", ".join(forgotten[:5]) + (", ..." if len(forgotten) > 5 else "")
            note = f"{len(forgotten)} parameters that ask for gradients are in none of the optimizers, and stay as they are: {names}"
            if strangers := len(trained.difference(model.parameters())):
                note += (
                    f"; and {strangers} that the optimizers hold are not in the model: was it unfused, moved or rebuilt after the optimizer "
                    "was made? Make the optimizer last"
                )
                warnings.warn(f"laconic: {note}", stacklevel=2)
            self.plan.notes.append(note)
        self.plan.notes += unasked
        self.plan.notes += no_options(self.plan, budget)
        if optional := sorted(optional_groups(self.plan, budget)):
            self.plan.notes.append(
                f"neurons of {', '.join(optional)} are optional: it is decided once, at the first proximal step, and they go only if that keeps more of the network than ranks alone"
            )
        if budget is not None and any(x.structure.scale == "absolute" and x.structure.strength is None for x in self._pressed):
            self.plan.notes.append(
                'scale="absolute" and a steered strength: it starts at half of the unit of the spectra, which in absolute numbers may be far too much; give strength=, or leave scale out'
            )
        reshard(model)  # counting ran it forward
        for site in self._pressed:
            if not site.finite:
                raise NonFiniteError(f"{site.name} holds NaN or Inf before training: initialise or load the model again")
        start = spectra(self.plan)
        if budget is not None:
            importances = importances_of(self.plan, {})
            prepare(model, self.plan, start, importances, budget, self.example_inputs)  # out of reach: said now, not at the end
        self._dense = skeleton(model) if budget is not None and "latency" in budget.currencies else None
        self.energy: float | None = None
        self.weights = cost_weights(self.plan, budget)
        self.state = RunState(
            steps=[0] * len(optimizers),
            every=every or self._interval(),
            owed={x.name: 0.0 for x in self._pressed},
            controller=self._controller(),
            forgone=None if optional else [],
            spectra_start={s.name: start[s.name].astype(np.float32) for s in self.plan.sites},
        )
        self.plan.ranks = self.state.ranks
        if budget is not None and self.state.controller is not None and is_met(self.plan, budget):
            self.state.settled = True
            self.plan.notes.append("the model is within the budget as it is: nothing is pressed or cut")
            warnings.warn(f"laconic: {self.plan.notes[-1]}", stacklevel=2)
        self._planned = self._pressed
        self._made_for = self._kind()
        self._shapes = {s.name: list(s.unfolding.shape) for s in self.plan.sites} | {g.name: [g.group.units] for g in self.plan.neurons}
        self._hold(optimizers)
        self._changed = False  # by this step, in mid-run
        self._report: CompactReport | None = None
        self._unreached = (
            {path for path, why in self.plan.whole.items() if why == NOT_REACHED} if self.plan.neurons and self.cut_early else set()
        )
        self._parameters = named_by_identity(model)
        self._attach()
        self._watch_unreached()

    def _hold(self, optimizers: list[Any]) -> None:
        self.optimizers = optimizers
        self._unhooked = [i for i, o in enumerate(optimizers) if not has_hooks(o)]
        self._owner = {x.name: last_holder(optimizers, x.weights[0]) for x in self._pressed}

    def _hook(self) -> list[Any]:
        return [o.register_step_post_hook(partial(self._after_step, i)) for i, o in enumerate(self.optimizers) if has_hooks(o)]

    def _attach(self) -> None:
        """Hook the optimizers, and the gradients that are scaled."""
        self._attached = True
        self._handles = self._hook()
        self._scaling: list[Any] = []
        self._hook_gradients()
        self._watch: ShapeWatch | None = None
        self._inputs: InputMoments | None = None
        self._axes: Covariances | None = None  # beside it
        self._sums: Sums = {}
        self._fitted_on: Sequence[Any] = ()
        self._alarm: Watch | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle, made together with the model and the optimizers, goes on where this one is."""
        here = {
            k: v
            for k, v in vars(self).items()
            if k not in ("_parameters", "_handles", "_scaling", "_watch", "_inputs", "_axes", "_sums", "_fitted_on", "_alarm")
        }
        # By themselves: a model that holds its compressor, and is being copied, has not got them yet when the compressor has.
        named = {name: p for name, p in self.model.named_parameters() if id(p) in self._parameters}
        read = consumers(self.model, self.plan) if self._inputs is not None else {}
        seen_through = self._axes.layers if self._axes is not None else {}
        unreached = {path: self.model.get_submodule(path) for path in self._unreached}
        return here | {"copied": (named, read, unreached, seen_through)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        named, read, unreached, seen_through = state.pop("copied")
        vars(self).update(state)
        self._parameters = {id(p): name for name, p in named.items()}
        drop_dead(
            [*read.values(), *seen_through.values(), *unreached.values(), *(module for site in self.plan.sites for module in site.modules)]
        )
        attached = self._attached
        self._attach()
        if not attached:
            self.detach()
            return
        if read:
            self._see(read, seen_through)
        self._alarm = Watch(unreached, self._reached)

    @classmethod
    def as_published(
        cls, model: nn.Module, optimizer: Any, strength: float, steps_per_epoch: int, energy: float = 0.9, **low_rank: Any
    ) -> Self:
        """Alvarez & Salzmann 2017: nuclear norm, absolute threshold, one proximal step at the end of each epoch; `compact`
        keeps the share `energy` of each layer's squared singular values. `low_rank`: further options of `LowRank`."""
        energy = check_share(energy)  # before the hooks are on
        compressor = cls(model, optimizer, [LowRank.as_published(strength, **low_rank)], every=steps_per_epoch)
        compressor.energy = energy
        return compressor

    def _controller(self) -> Controller | None:
        """A controller, where a budget rules and no structure has a strength of its own."""
        if self.budget is None or self.total_steps is None or any(x.structure.strength is not None for x in self._pressed):
            return None
        # Half of the unit of the spectra over the whole phase of pressure, were the learning rate at its peak throughout.
        span = max((self.settle - self.schedule.warmup) * self.total_steps, 1.0)
        peak = max(peak_learning_rate(self.optimizers, [x.weights[0] for x in self._pressed]), TINY)  # what is set later is seen later
        return Controller(strength=0.5 / (span * peak), peak=peak)

    def _interval(self) -> int:
        """With a budget so that there are ROUNDS proximal steps until the network settles; else 20 or less."""
        if self.total_steps is None:
            return 20
        if self.budget is None:
            return max(1, min(20, self.total_steps // 50))
        return max(1, round((self.settle - self.schedule.warmup) * self.total_steps / ROUNDS))

    @property
    def _pressed(self) -> list[Weight | Site | Neurons]:
        """Everything under a structure, in the order of the proximal steps: entries, ranks, then whole neurons."""
        return [*self.plan.entries, *self.plan.sites, *self.plan.neurons]

    @property
    def _turns(self) -> bool:
        """Nothing is pressed, and all neurons go in one cut: their channels are turned to principal axes first, and training goes on."""
        return self.cut_early and self.plan.turns

    def _kind(self) -> str:
        weight = self._pressed[0].weights[0]
        return f"{weight.dtype} on {weight.device}"

    @property
    def settle(self) -> float:
        """Fraction of the run at which pressure ends."""
        return self.schedule.settle if self.cut_early else 1.0

    # ---- the run ------------------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Optimizer steps so far (of the first optimizer; skipped ones do not count)."""
        return self.state.steps[0]

    @property
    def settled(self) -> bool:
        """Is the structure final? From here on shapes do not change: average weights, and keep the best of them."""
        return self.state.settled and (self.budget is None or is_met(self.plan, self.budget))

    @property
    def every(self) -> int:
        """Steps between proximal steps."""
        return self.state.every

    @property
    def history(self) -> list[Snapshot]:
        """Ranks and strength over the run, thinned."""
        return self.state.history

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
        state = self.state
        if state.steps[index] == 0 and self.example_inputs is not None and (now := self._kind()) != self._made_for:
            raise SurgeryError(
                f"the model's weights are {now} in the first step, and were {self._made_for} when the Compressor was built, for which the "
                "example inputs are: build it after .to(), .half() and the like"
            )
        state.steps[index] += 1
        if index == 0 and self.budget is not None and self.total_steps is not None and self.steps == too_many_steps(self.total_steps):
            warnings.warn(f"laconic: {self._overrun()}", stacklevel=2)
        round_done = index == len(self.optimizers) - 1
        with uninterrupted():
            if self.cut_early and round_done and state.shapes is None:
                self._watch_shapes()
            if not (state.settled or (self.budget is not None and self.progress < self.schedule.warmup)):
                self._press(index, optimizer, round_done)
            if round_done:
                self._watch_inputs()

    def _press(self, index: int, optimizer: Any, round_done: bool) -> None:
        """After a step in the phase of pressure: note the rate; every so often a proximal step, and cuts."""
        state = self.state
        for site in self._pressed:
            # A weight without a gradient was not moved by this step. Rates are read now: a scheduler may change them next.
            weight = site.weights[0]
            if weight.grad is not None and weight.requires_grad and holds(optimizer, weight):
                state.owed[site.name] += learning_rate(optimizer, weight)
        seen = not self._turns or self._inputs is not None or bool(self._sums)  # before that there is nothing to turn by
        settle_now = self.cut_early and round_done and seen and self.progress >= self.schedule.settle
        due = state.steps[index] % state.every == 0
        if due or settle_now:
            self._prox([x for x in self._pressed if settle_now or self._owner[x.name] is optimizer])
        if settle_now:
            self._settle()
        elif due and round_done and self.cut_early:
            self._shrink()
        if self._changed:
            self._watch_unreached()
            if self.rebuild is not None:
                self.rebuild(self.model)
        self._changed = False

    @property
    def progress(self) -> float:
        """Share of `total_steps` done; 0 where it is not known."""
        return self.steps / self.total_steps if self.total_steps else 0.0

    def _watch_inputs(self) -> None:
        """See what the consumers of the neurons take in during the step that the next proximal step follows."""
        if self.budget is None or not self.plan.neurons or self.state.settled or self._inputs is not None:
            return
        next_progress = (self.steps + 1) / (self.total_steps or 1)
        settles = self.cut_early and next_progress >= self.schedule.settle
        if next_progress >= self.schedule.warmup and (settles or (self.steps + 1) % self.state.every == 0):
            self._see(consumers(self.model, self.plan))

    def _see(self, read: dict[str, nn.Module], seen_through: dict[str, nn.Module] | None = None) -> None:
        """What these layers take in, and what runs through groups that can be turned, from now on."""
        self._inputs = InputMoments(read)
        self._axes = Covariances(self.model, self.plan.neurons, layers=seen_through)

    def strength(self, site: Weight | Site | Neurons) -> float:
        """The strength that holds for a weight now: its structure's own, or the controller's times the weight of its cost."""
        if site.structure.strength is not None:
            return site.structure.strength
        assert self.state.controller is not None
        return self.state.controller.strength * self.weights[site.name]

    def _prox(self, sites: Sequence[Weight | Site | Neurons]) -> None:
        if not sites:  # the step of an optimizer that holds none of the weights: steering is once per round
            return
        state = self.state
        check_parameters(self.model, self._parameters, self.optimizers, [w for x in self._pressed for w in x.weights])
        if state.controller is not None:
            state.controller.see(peak_learning_rate(self.optimizers, [x.weights[0] for x in self._pressed]))
        if self._inputs is not None:
            state.moments, self._inputs = self._inputs.finish(), None
            if self._axes is not None:
                self._sums, self._fitted_on = self._axes.finish(), [x for x in (self._axes.called_with,) if x is not None]
        if state.forgone is None and all(s.finite for s in self.plan.sites):  # else the steps below say it better
            self._decide(spectra(self.plan), importances_of(self.plan, state.moments))
        for site in sites:
            if site.name not in state.owed:  # just forgone
                continue
            owed, state.owed[site.name] = state.owed[site.name], 0.0
            tau = self.strength(site) * owed
            if tau == 0 or not site.weights[0].requires_grad or self._turns:
                if self.budget is not None and isinstance(site, Site):
                    state.values |= values_of(site)  # pressed or not, the controller and cuts on the way go by the spectra
                continue
            try:
                result = shrink(site, tau)
            except NonFiniteError as error:
                state.owed[site.name] = owed
                gradients = [w.grad for w in site.weights if w.grad is not None]
                bad = any(not bool(torch.isfinite(g).all()) for g in gradients)
                where = "its gradient holds them too" if bad else "its last gradient was finite"
                raise NonFiniteError(f"{error} ({where}; optimizer step {self.steps})") from None
            state.ranks[site.name] = result.rank
            if isinstance(site, Site):
                state.values[site.name] = result.values.numpy()
                if site.inner is not None and self.budget is not None:
                    state.values[site.inner.name] = site.joint_shares.numpy()
                state.solvers[site.name] = result.solver
            state.failures += [f"step {self.steps}, {site.name}: {line}" for line in result.failures]
        if self.budget is not None:
            state.importances = importances_of(self.plan, state.moments)
        gap = self.gap()
        if state.controller is not None and math.isfinite(gap):
            way = (self.progress - self.schedule.warmup) / (self.settle - self.schedule.warmup)
            state.controller.update(min(way, 1.0), gap)
        state.remember(sum(self.strength(x) for x in self._pressed) / len(self._pressed), gap)

    def _decide(self, values: dict[str, Floats], importances: dict[str, Floats]) -> None:
        """Once, before anything is pressed: do optional neurons go, or do ranks alone keep more?"""
        assert self.budget is not None
        dense = frozenset(not_carried(self.plan, self.optimizers)) if self.cut_early else frozenset()
        found = needless(self.plan, values, importances, self.budget, dense)
        self._forgo(sorted(found))
        if found:
            self.weights = cost_weights(self.plan, self.budget)

    def _forgo(self, names: list[str]) -> None:
        self.state.forgone = names
        self.plan.forgo(names)
        for name in names:
            self.state.owed.pop(name, None)
        if names and not self.plan.neurons:
            self._unreached = set()
            self._watch_unreached()

    @property
    def _spectra_known(self) -> bool:
        state = self.state
        return len(state.values) == len(self.plan.sites) + len(self.plan.inner) and len(state.importances) == len(self.plan.neurons)

    def gap(self) -> float:
        """What a cut to the budget would lose now (see `Controller`), from the spectra of the last proximal step."""
        if self.budget is None or not self._spectra_known:
            return math.nan
        if self.plan.neurons:
            walk = choose_shapes(
                self.plan, self.state.values, self.state.importances, self.budget.currencies, self.budget.limits(self.plan)
            )
            return -walk.gain() / len(self._pressed)
        values = self.state.values
        ranks = self._ranks(values)
        cut = [(s, rank) for s in self.plan.sites if (rank := ranks[s.name]) is not None]
        kept = [log_shares(values[s.name])[rank - 1] for s, rank in cut]
        kept += [values[s.inner.name][rank - 1, inner - 1] for s, rank in cut if s.inner is not None and (inner := ranks[s.inner.name])]
        return -float(np.sum(kept)) / len(self.plan.sites)

    def _shrink(self) -> None:
        """On the way to the budget: cut the layers for which it pays by now, and cut deeper those that were cut before.

        The spectra are those of the last proximal step: no decomposition is made to decide.
        """
        assert self.budget is not None
        if not self._spectra_known:
            return
        way = self.schedule.way(self.progress)
        dense = self._held_back()
        try:
            if self.plan.neurons and not self._turns:
                self._slim(way, dense, NEXT_SLIM)
            ranks = self._ranks(self.state.values, dense, way)
        except InfeasibleBudgetError:  # only without the layers whose state cannot be carried: wait for the end
            return
        due = {s.name: rank if (rank := ranks[s.name]) is not None and self._pays(s, rank) else s.rank for s in self.plan.sites}
        if any(due[s.name] != s.rank for s in self.plan.sites):
            self._cut_in_mid_run(self.state.values, due)

    def _slim(self, way: float, dense: frozenset[str], pays: float) -> None:
        """Take out the neurons that the interim budget leaves no place for, of groups that shrink to this share or below."""
        assert self.budget is not None
        state = self.state
        limits = self.budget.limits(self.plan, way)
        walk = choose_shapes(self.plan, state.values, state.importances, self.budget.currencies, limits, dense)
        if way == 1:
            state.cuts.prices = walk.prices()
        elif walk.has_heads or any(group.structure.even for group in self.plan.neurons):
            # Not below what the whole way leaves: units that went in a head's place would be missed once the head goes after all.
            with contextlib.suppress(InfeasibleBudgetError):
                end = choose_shapes(
                    self.plan, state.values, state.importances, self.budget.currencies, self.budget.limits(self.plan), dense
                )
                walk.units = {name: max(count, end.units[name]) for name, count in walk.units.items()}
        kept = walk.kept()
        kept = {g.name: kept[g.name] for g in self.plan.neurons if len(kept[g.name]) <= pays * len(g.kept)}
        before = {s.name: s.unfolding for s in self.plan.sites}
        units = {g.name: g.kept for g in self.plan.neurons}
        blind = unseen(self.plan, state.moments)
        means = {path: m.mean for path, m in state.moments.items()}
        together = all_or_nothing(self.model, self.plan, self.optimizers) if self.plan.turns else contextlib.nullcontext()
        with together:
            axes = turn(self.model, self.plan.neurons, kept, self._sums, means, self.example_inputs, self.optimizers)
            turned = copy.deepcopy(self.model) if axes.shares and self._fitted_on else None
            result = slim_neurons(
                self.model, self.plan, state.importances | axes.shares, axes.kept,
                example_inputs=self.example_inputs, optimizers=self.optimizers, means=means, gains=axes.gains,
            )  # fmt: skip
            if axes.shares and turned is None:
                result.notes.append("no layer was fitted: the inputs of the step before the cut were not seen")
            if turned is not None:
                result.notes.append(refit_layers(self.model, turned, self._fitted_on, axes.factors))
        if not result.kept:
            return
        self._sums, self._fitted_on = {}, ()
        state.importances |= axes.shares
        result.notes += blind + axes.notes
        for group in self.plan.neurons:
            if group.name in result.kept:
                share = state.importances[group.name][np.isin(units[group.name], group.kept)]
                state.importances[group.name] = share / max(share.sum(), math.ulp(0.0))
                state.ranks[group.name] = min(state.ranks.get(group.name, len(share)), len(share))
        for site in self.plan.sites:
            if site.unfolding != before[site.name]:
                state.values |= values_of(site)
                self._resize_times(site, before[site.name])
        state.moments = {}
        self._parameters = named_by_identity(self.model)
        self._scale(state.gradient_scales)  # on the new parameters
        state.cuts.add(result)
        self._changed = True

    def _resize_times(self, site: Site, before: Unfolding) -> None:
        """A layer with fewer channels: times that were measured are scaled, one that will be is measured for fewer."""
        state, now = self.state, site.unfolding
        if site.name in state.step_times:
            scaled = state.step_times[site.name].scaled(now.dense_params / before.dense_params, now.unit_params / before.unit_params)
            state.step_times[site.name] = scaled
        elif state.shapes is not None and site.name in state.shapes:
            shape = list(state.shapes[site.name])
            shape[len(shape) + 1 - len(now.shape)] = now.sides[1]
            state.shapes[site.name] = tuple(shape)

    def _pays(self, site: Site, rank: int) -> bool:
        """Is a cut to this rank worth the disturbance in mid-run? See FIRST_CUT."""
        if site.rank is not None:
            return rank <= NEXT_CUT * site.rank
        state = self.state
        shape = (state.shapes or {}).get(site.name)
        if shape is None:
            return rank <= FIRST_CUT_UNMEASURED * site.break_even
        if site.name not in state.step_times:
            measure = partial(layer_times, site.modules[0], site.unfolding, shape, site.break_even, training=True)
            state.step_times[site.name] = agreed(measure)
        times = state.step_times[site.name]
        return times.at(rank) <= FIRST_CUT * times.dense

    def _watch_shapes(self) -> None:
        """Between the first step and the second, see how large the inputs are in training."""
        if self._watch is None:
            self._watch = ShapeWatch({s.name: s.modules[0] for s in self.plan.sites})
        else:
            self.state.shapes, self._watch = self._watch.finish(), None

    def _watch_unreached(self) -> None:
        """Do layers run in training that the example inputs do not reach?"""
        if self._alarm is not None:
            self._alarm.close()
        self._alarm = Watch({path: self.model.get_submodule(path) for path in self._unreached}, self._reached)

    def _reached(self, path: str, *_: Any) -> None:
        if not torch.compiler.is_compiling() and path in self._unreached:
            self._unreached.remove(path)
            self.plan.notes.append(
                f"{path}: runs in training, but not on the example inputs: it is not known which neurons are tied to it, and the model may fail once "
                "some are gone; pass example_inputs that reach it, or structures=laconic.LowRank()"
            )
            warnings.warn(f"laconic: {self.plan.notes[-1]}", stacklevel=2)

    def _settle(self) -> None:
        """The last cut in mid-run: to the budget."""
        budget = self.budget
        assert budget is not None
        values = spectra(self.plan)
        dense = self._held_back()
        if self.plan.neurons:
            self.state.values = values
            self._correct(lambda: shapes_for_budget(self.plan, values, self.state.importances, budget, dense))
            self._slim(1.0, dense, 1.0)
            values = spectra(self.plan)
        self._correct(lambda: ({}, self._last_ranks(values, dense)))
        self._cut_in_mid_run(values, self._last_ranks(values, dense))
        self.state.settled = True  # not before: what fails here is tried again at the next step
        if self._compiled:  # which gives up after a few shapes, and none is new from here on
            torch.compiler.reset()

    def _held_back(self) -> frozenset[str]:
        """Sites that stay dense to the end, since their optimizer's state does not go over a cut; said once."""
        found = not_carried(self.plan, self.optimizers)
        if found:
            names = ", ".join(list(found)[:5]) + (", ..." if len(found) > 5 else "")
            note = f"{names}: cut at compact() alone, without training after it: {next(iter(found.values()))}; Adam, AdamW and SGD have none such"
            if note not in self.plan.notes:
                self.plan.notes.append(note)
                warnings.warn(f"laconic: {note}", stacklevel=2)
        return frozenset(found)

    def _last_ranks(self, values: dict[str, Floats], dense: frozenset[str]) -> Ranks:
        try:
            return self._ranks(values, dense)
        except InfeasibleBudgetError:  # what must wait for the end is cut deep there; the rest as planned for all
            return {n: None if n in dense else r for n, r in self._ranks(values).items()}

    def _ranks(self, values: dict[str, Floats], dense: frozenset[str] = frozenset(), way: float = 1.0) -> Ranks:
        """By the budget, for a network that trains on."""
        assert self.budget is not None
        return ranks_for_budget(self.plan, values, self.budget, dense, way, trains_on=self.cut_early)

    def _correct(self, shapes: Callable[[], Shapes]) -> None:
        """Where milliseconds count: measure what is to come of the network, before the last cuts, and correct the tables."""
        if self._dense is not None:
            assert self.example_inputs is not None
            correct(self.model, self.plan, self.example_inputs, shapes, self._dense)

    def _cut_in_mid_run(self, values: dict[str, Floats], ranks: Ranks) -> None:
        frozen = ", ".join(s.name for s in self.plan.sites if ranks[s.name] not in (None, s.rank) and not s.weights[0].requires_grad)
        self._cut(
            values,
            ranks,
            notes=[f"{frozen}: frozen when it was cut for the budget; not trained after it unless unfrozen"] if frozen else [],
        )
        self._scale(gradient_scales(self.plan.sites, values, self.optimizers))
        self._changed = True

    def _scale(self, scales: Scales) -> None:
        """From the next step on, gradients of the pairs are scaled so."""
        scale_moments(self.plan.sites, self.optimizers, self.state.gradient_scales, scales)
        self.state.gradient_scales = scales
        self._hook_gradients()

    def _hook_gradients(self) -> None:
        for handle in self._scaling:
            handle.remove()
        self._scaling = scale_gradients(self.plan.sites, self.state.gradient_scales)

    def _cut(self, values: dict[str, Floats], ranks: Ranks, calibration: Any = None, notes: Sequence[str] = ()) -> None:
        result = cut_sites(
            self.model, self.plan, values, ranks,
            example_inputs=self.example_inputs, optimizers=self.optimizers, calibration=calibration,
        )  # fmt: skip
        result.notes[:0] = notes
        state = self.state
        self._parameters = named_by_identity(self.model)
        state.cuts.add(result)
        state.ranks |= result.ranks
        for name, rank in result.ranks.items():
            state.values[name] = values[name][:rank]
        state.history.append(Snapshot(self.steps, math.nan if not state.history else state.history[-1].strength, dict(state.ranks)))

    # ---- the end ------------------------------------------------------------------------------------------------

    @torch.inference_mode(False)  # under which new parameters could not be trained
    def compact(
        self,
        energy: float | None = None,
        *,
        calibration: Iterable[Any] | None = None,
        only_faster: bool = False,
        into: nn.Module | None = None,
    ) -> CompactReport:
        """Cut what is still to be cut, in place, verified; a second call changes nothing and returns the same report.

        With a budget the ranks are chosen for it; else by `energy`, the share of squared singular values that every
        layer keeps; with neither, what is zero to rounding goes and nothing else.

        Args:
            energy: see above; not together with a budget.
            calibration: batches of inputs on which BatchNorm statistics are re-estimated.
            only_faster: time every layer on the example inputs and leave dense what does not get faster.
            into: a fresh dense model of the same class: it gets the trained weights and is cut, the trained model is not.
                Needed where the model is sharded (FSDP2); call it in every process.

        Raises:
            InvalidValueError: `into` missing for a sharded model; `energy` together with a budget, or out of range.
            SurgeryError: refused; the model is as it was.
        """
        if self._report is not None:
            return self._report
        if energy is not None and self.budget is not None:
            raise InvalidValueError(f"compact(energy={energy}): the budget rules here; leave energy out")
        calibration = as_batches(calibration)
        energy = check_share(energy) if energy is not None else self.energy
        before = self.model, self.plan, self.sharded
        if into is not None:
            self._move(into)
        elif self.sharded:
            raise InvalidValueError("the model is sharded (FSDP2) and cannot be cut in place: compact(into=MyNet()), a fresh dense model")
        if into is None:
            check_parameters(self.model, self._parameters, self.optimizers, [])
            check_trained(self.model)
        notes = self._notes_at_the_end()
        if self.settled:
            if calibration is not None:
                notes.append("calibration had no effect: the model trained on after the cut")
            if only_faster:
                notes.append("only_faster had no effect: the layers were cut in mid-run, and trained on")
        else:
            self._stop_watching()  # a step that was not taken
            saved, weights, unreached = copy.deepcopy(self.state), self.weights, self._unreached
            try:
                with all_or_nothing(self.model, self.plan, self.optimizers):
                    self._prox([x for x in self._pressed if self.state.owed[x.name] > 0])
                    values = spectra(self.plan)
                    kept = not_carried(self.plan, self.optimizers)
                    if self.plan.neurons:
                        self._slim_at_the_end(values, calibration)
                        values = spectra(self.plan)
                        if calibration and self.budget is not None and not batch_norms(self.model):
                            calibration = None  # it has had its effect
                    choose = partial(self._choose, values, energy, frozenset(kept))
                    ranks, times, more = choose_ranks(self.model, self.plan, values, choose, only_faster, self.example_inputs)
                    notes += [
                        f"{name} stays dense: {reason}"
                        if ranks[name] is None
                        else f"{name} was trained dense to the end, and cut then because the budget needs it: {reason}"
                        for name, reason in kept.items()
                    ]
                    self._cut(values, ranks, calibration, more)
                    self.state.cuts.timings |= times
            except BaseException:
                self.model, self.plan, self.sharded = before
                self.state, self.plan.ranks, self.weights = saved, saved.ranks, weights
                self._hook_gradients()
                self._parameters = named_by_identity(self.model)
                self._unreached = unreached
                self._watch_unreached()
                raise
            self.state.settled = True
        self.state.cuts.notes += [*notes, *run_notes(self.model, self.plan, self.state)]
        self.detach()
        self._report = make_report(
            self.model,
            self.plan,
            self.state.cuts,
            self.example_inputs,
            self.budget,
            self._dense,
            history=tuple(self.history),
            spectra_start={k: tuple(float(f"{x:.6g}") for x in v) for k, v in self.state.spectra_start.items()},
        )
        return self._report

    def _slim_at_the_end(self, values: dict[str, Floats], calibration: Sequence[Any] | None) -> None:
        """To the budget; without one, the neurons whose rows are zero, and those that nothing reads."""
        state = self.state
        if self.budget is not None:
            state.values = values
            if calibration is not None or not state.moments:  # else of the last step that was watched in training
                state.moments = watch_inputs(self.model, self.plan, calibration or [self.example_inputs])
                self._sums, self._fitted_on = covariances(self.model, self.plan.neurons, calibration or []), calibration or ()
            state.importances = importances_of(self.plan, state.moments)
            if state.forgone is None:
                self._decide(values, state.importances)
            if self.plan.neurons:
                self._slim(1.0, frozenset(), 1.0)
            return
        groups = [g.group for g in self.plan.neurons]
        dead = dead_constants(self.model, groups, self.example_inputs)
        fold(self.model, groups, dead)
        streams = {g.name for g in self.plan.neurons if g.norms}  # what nothing reads counts in LayerNorm's statistics
        gone = {
            g.name: {*(dead[g.name].units if g.name in dead else ()), *(() if g.name in streams else unread_units(self.model, g))}
            for g in groups
        }
        kept = {g.name: [u for u in g.kept.tolist() if u not in gone[g.name]] or g.kept[:1].tolist() for g in self.plan.neurons}
        alive = {g.name: np.isin(g.kept, kept[g.name]).astype(np.float64) for g in self.plan.neurons}
        state.cuts.add(slim_neurons(self.model, self.plan, alive, kept, example_inputs=self.example_inputs, optimizers=self.optimizers))
        for name, found in dead.items():
            for why in dict.fromkeys(found.stays.values()):
                units = ", ".join(str(unit) for unit, reason in found.stays.items() if reason == why)
                state.cuts.notes.append(f"{name}: dead, but kept: {units}; {why}")

    def _move(self, into: nn.Module) -> None:
        """Go on with a fresh dense model that has the trained weights."""
        check_module(into, "into")
        if any(s.rank is not None for s in self.plan.sites):
            raise InvalidValueError("into=: layers were cut in mid-run, so that the model itself is the result: compact() without into")
        reshard(self.model)
        self._prox([x for x in self._pressed if self.state.owed[x.name] > 0])
        try:
            load_whole(into, self.model)
        except RuntimeError as error:
            raise InvalidValueError(f"into=: not of the class of the trained model: {one_line(error)}") from None
        structures = list({id(x.structure): x.structure for x in self._planned}.values())
        plan = make_plan(into, structures, self.example_inputs)
        chosen = {s.name: s.unfolding.name for s in self.plan.sites}
        plan.sites = [s for s in plan.sites if s.name in chosen]
        use_unfoldings(into, plan, chosen, self.example_inputs)
        plan.ranks = self.state.ranks
        plan.forgo(self.state.forgone or [])
        self.model, self.plan, self.sharded = into, plan, False

    def _notes_at_the_end(self) -> list[str]:
        """What the numbers of steps say: an optimizer that never stepped, an end before the structure was final, many more steps than were told."""
        steps, total = min(self.state.steps), self.total_steps
        notes = []
        idle = [type(o).__name__ for o, count in zip(self.optimizers, self.state.steps, strict=True) if count == 0]
        if idle:
            notes.append(
                f"no step of {', '.join(idle)} was seen: is that what trains the model? (one without hooks needs compressor.step())"
            )
        if self.cut_early and not self.state.settled:
            notes.append(
                f"the run ended after {steps} of {total} steps, before it settled at {self.schedule.settle:.0%}: "
                "cut to the budget now, without training afterwards, which costs accuracy (steps of the optimizer that the Compressor was given count)"
            )
        for note in notes if self.budget is not None else ():
            warnings.warn(f"laconic: {note}", stacklevel=3)
        overran = self.budget is not None and total is not None and self.steps >= too_many_steps(total)
        return [*notes, self._overrun()] if overran else notes

    def _overrun(self) -> str:
        return (
            f"{self.steps} optimizer steps, but total_steps = {self.total_steps}: the schedule ended there; "
            "it counts optimizer steps, epochs x steps per epoch"
        )

    def _choose(self, values: dict[str, Floats], energy: float | None, not_carried: frozenset[str], keep_dense: frozenset[str]) -> Ranks:
        if self.budget is not None:
            try:
                return ranks_for_budget(self.plan, values, self.budget, keep_dense | not_carried)
            except InfeasibleBudgetError:
                return ranks_for_budget(self.plan, values, self.budget, keep_dense)
        keep_dense |= not_carried
        if energy is not None:
            ranks = energy_ranks(self.plan, values, energy)
        else:
            ranks = {
                s.name: guarded(s, numerical_rank(values[s.name], torch.finfo(s.dtype).eps, max(s.unfolding.m, s.unfolding.n)))
                for s in self.plan.sites
            }
        return {name: None if name in keep_dense else rank for name, rank in ranks.items()}

    def move_to(self, optimizer: Any) -> None:
        """Go on with another optimizer (or list) of the same parameters: for a trainer that makes its own after the cuts were
        replayed. Its state is not touched.

        Raises:
            OptimizerError: it does not hold the same weights, is not as many as before, or another compressor of the model is on it.
            LaconicError: this one was detached.
        """
        optimizers = check_optimizers(optimizer)
        if not self._attached:
            raise LaconicError("this compressor was detached, or has compacted its model: build a new one")
        if any(other is not self and other.model is self.model for o in optimizers for other in attached_to(o, Compressor)):
            raise OptimizerError("another Compressor is on this model and optimizer already: detach() that one first")
        if len(optimizers) != len(self.optimizers):
            raise OptimizerError(f"{len(optimizers)} optimizers in the place of {len(self.optimizers)}: the steps of each are counted")
        pressed = [w for x in self._pressed for w in x.weights]
        check_parameters(self.model, self._parameters, optimizers, pressed)
        for handle in self._handles:
            handle.remove()
        self._hold(optimizers)
        self._handles = self._hook()

    def detach(self) -> None:
        """Remove the hooks: from here on the optimizer runs alone."""
        self._attached = False
        self._scale({})
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._stop_watching()
        if self._alarm is not None:
            self._alarm.close()

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.finish()
        if self._inputs is not None:
            self._inputs.drop()
        if self._axes is not None:
            self._axes.drop()
        self._watch = self._inputs = self._axes = None

    def metrics(self) -> dict[str, float]:
        """A flat dict for any logger: step, strength, ranks, and the share of parameters that these ranks would leave."""
        sites = self.plan.sites
        ranks = {s.name: self.plan.ranks.get(s.name, s.unfolding.full_rank) for s in sites}
        units = {g.name: len(g.kept) for g in (*self.plan.neurons, *self.plan.forgone)}
        kept: Ranks = {s.name: r if (r := ranks[s.name]) <= s.break_even else None for s in sites} | {
            s.name: s.rank for s in self.plan.inner
        }
        left = present_costs(self.plan, ["params"], kept)[0]
        flat = {
            "laconic/step": float(self.steps),
            "laconic/strength": sum(self.strength(x) for x in self._pressed) / len(self._pressed),
            "laconic/params_fraction": float(left) / self.plan.params,
            "laconic/cuts": float(sum(s.rank is not None for s in sites)),
            "laconic/settled": float(self.settled),
            "laconic/solver_failures": float(len(self.state.failures)),
        }
        if self.state.controller is not None and not self.state.settled and self._spectra_known:
            flat["laconic/gap"] = self.gap()
        flat |= {f"laconic/rank/{name}": float(rank) for name, rank in ranks.items()}
        return flat | {f"laconic/units/{name}": float(count) for name, count in units.items()}

    # ---- resume -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs besides the model's and the optimizer's own state; plain tensors and numbers."""
        return {
            "version": VERSION,
            "names": [x.name for x in self._planned],
            "shapes": self._shapes,
            "settings": self._settings(),
            "unfoldings": {s.name: s.unfolding.name for s in self.plan.sites},
            "inner": [s.name for s in self.plan.inner],
            "measured": {
                "weights": dict(self.weights),
                "latency_ms": self.plan.latency_ms,
                "fixed_ms": self.plan.fixed_ms,
                "times": {s.name: s.times.to_json() if s.times is not None else None for s in self.plan.sites},
                "layers": {x.name: [x.beside_ms, x.weight_ms] for x in self.plan.layers},
            },
            "run": self.state.to_state(),
        }

    def _settings(self) -> dict[str, Any]:
        """What must be the same on resume. What is measured or chosen (the interval, unfoldings) is taken from the state."""
        return {
            "total_steps": self.total_steps,
            "budget": dataclasses.asdict(self.budget) if self.budget is not None else None,
            "schedule": dataclasses.asdict(self.schedule),
            "MACs of the example inputs": self.plan.macs,
            "cut": "early" if self.cut_early else "end",
            # A penalty of the user's own without a repr shows its address, which is another in every process.
            "structures": [re.sub(r" at 0x[0-9a-fA-F]+", "", repr(x.structure)) for x in self._planned],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume. Call it first, on a fresh dense model with its optimizer: it makes the same cuts on both; then load the
        model's and the optimizer's own state.

        Raises:
            InvalidTypeError: not a dict.
            CheckpointError: another format version, or a state of another model.
        """
        if not isinstance(state, dict):
            raise InvalidTypeError(f"compressor state: expected the dict that Compressor.state_dict() returned, got {type(state).__name__}")
        version = state.get("version")
        if version != VERSION:
            raise CheckpointError(f"compressor state has format version {version!r}; this laconic reads {VERSION}")
        if missing := [key for key in ("names", "settings", "unfoldings", "inner", "measured", "run") if key not in state]:
            raise CheckpointError(
                f"compressor state is not complete: {', '.join(missing)} missing; give what Compressor.state_dict() returned"
            )
        names = [x.name for x in self._planned]
        if state["names"] != names:
            differing = sorted(set(names) ^ set(state["names"]))
            raise CheckpointError(
                f"compressor state belongs to another model or other structures; differing weights: {', '.join(differing) or 'order'}"
            )
        there = state.get("shapes", {})  # states of before have none
        if other := [
            f"{name} is {there[name]} there, {shape} here" for name, shape in self._shapes.items() if there.get(name, shape) != shape
        ]:
            raise CheckpointError(f"compressor state belongs to a model of other shapes: {'; '.join(other[:5])}")
        settings = self._settings()
        changed = [f"{k} was {v!r}, is {settings.get(k)!r}" for k, v in state["settings"].items() if settings.get(k) != v]
        if changed:
            raise CheckpointError(f"compressor state was saved with other settings, a resume could not be exact: {'; '.join(changed)}")
        run = RunState.from_state(state["run"])
        if len(run.steps) != len(self.optimizers):
            raise CheckpointError(f"compressor state has {len(run.steps)} optimizers, this one {len(self.optimizers)}")
        if any(s.rank is not None for s in self.plan.sites) or any(len(g.kept) < g.group.units for g in self.plan.neurons):
            raise CheckpointError("this compressor has made cuts already: load the state into a fresh one, on a fresh dense model")
        self._stop_watching()
        self.plan.take_back([x for x in self._planned if isinstance(x, Neurons)])
        use_unfoldings(self.model, self.plan, state["unfoldings"], self.example_inputs)
        for site in self.plan.sites:
            if site.inner is not None and site.inner.name not in state["inner"]:
                site.inner = None
        measured = state["measured"]
        self.plan.latency_ms, self.plan.fixed_ms = measured["latency_ms"], measured["fixed_ms"]
        for layer in self.plan.layers:
            layer.beside_ms, layer.weight_ms = measured["layers"][layer.name]
        self.weights = dict(measured["weights"])
        self.state = run
        self.plan.ranks = run.ranks
        replay_cuts(self.model, self.plan, run.cuts.kept, run.cuts.ranks, self.optimizers)
        if run.forgone is not None:
            self._forgo(run.forgone)
        for site in self.plan.sites:
            times = measured["times"][site.name]
            site.times = RankTimes.from_json(times) if times is not None else None
        self._watch_inputs()
        self._watch_unreached()
        self._hook_gradients()
        self._parameters = named_by_identity(self.model)

    @contextlib.contextmanager
    def as_it_was_on_error(self) -> Iterator[None]:
        """A resume that fails after `load_state_dict` takes that back: the model, the optimizers' weights and states, the plan, the run."""
        mine = dict(vars(self))
        try:
            with all_or_nothing(self.model, self.plan, self.optimizers):
                yield
        except BaseException:
            if self._inputs is not None and self._inputs is not mine["_inputs"]:
                self._inputs.drop()
                if self._axes is not None:
                    self._axes.drop()
            vars(self).update(mine | {"_watch": self._watch, "_alarm": self._alarm})  # a watch that was ended stays so, and starts anew
            self._watch_unreached()
            raise
