r"""Principal axes: before channels go from a residual stream or from within attention heads, the basis is turned so that those which stay hold most.

- **A stream** whose norms put out :math:`\gamma \hat x + \beta`: of all orthogonal :math:`R` the one whose first :math:`k` rows keep most of
  :math:`\sum_{\text{norms}} E\|R \hat x\|^2`, the leading eigenvectors of :math:`\sum E[\hat x \hat x^T]`. LayerNorm, too, takes off the mean of the channels that are
  left: there the mean of the first :math:`k` channels is one of the directions that go.
  Where a tied head reads a norm, whose gain it cannot take over, that gain becomes one number first, if that changes the outputs little.
- **A head** of queries and keys: :math:`\min E\|q^T k - q^T P k\|^2` over :math:`P` of rank k, queries and keys taken as independent, by the singular values of
  :math:`E[q q^T]^{1/2} E[k k^T]^{1/2}`.
- **A head** of values: :math:`\min E\|W_O (v - \bar v) - W_O P (v - \bar v)\|^2`, by those of :math:`W_O \operatorname{Cov}(v)^{1/2}`.

Sources: the stream as in Ashkboos et al. 2024, *SliceGPT*; the least error of a product of given covariances is Eckart-Young's after whitening.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .allocate import Floats
from .cuts import all_or_nothing, largest_difference, outputs_uncut
from .distributed import gathered
from .errors import InvalidTypeError, SurgeryError, first_line
from .graph import across_the_mean, largest, outputs, random_rotation
from .matricize import by_inputs
from .measure import call, check_inputs, copied, evaluating
from .structures import Neurons
from .surgery.basis import Heads, Stream, Turned, flatten, turn_heads, turn_stream
from .surgery.channels import Ints, parameters_at
from .surgery.factorize import plain_layers
from .surgery.optimizer import unknown_state
from .watch import Watch, drop_dead

ROWS = 4096  # positions looked at in one call of a layer
RIDGE = 1e-6  # of the largest eigenvalue, where a covariance is divided by
SMALL = 1e-5  # in a norm of our own, beside the mean square

FLAT = 0.1  # of the outputs' size: a cut changes several times as much
TOLERANCE = 0.02  # of the largest output: of channels with next to no gain, and of weights in 16 bits

Sums = dict[str, Tensor]


@dataclass(slots=True)
class Turn:
    """What was turned.

    Attributes:
        kept: units to keep, by group.
        shares: what each unit has of all that the group holds, by group, where that was turned.
        gains: of streams, by group: how much larger the gains of its norms have to be once channels are gone, which have seen to it that the mean square
            of all that are left is 1.
        factors: of layers that put queries out, by path: which of their channels, and how much smaller they have to be (see `scale_queries`).
        unseen: groups that could have been turned, but nothing was seen of what they hold.
        lost: layers whose optimizer's state could not go along.
        failed: why nothing was turned.
        flattened: which norms' gains have become one number for it, or could not, and what that changes.
    """

    kept: dict[str, list[int]]
    shares: dict[str, Floats] = field(default_factory=dict)
    gains: dict[str, float] = field(default_factory=dict)
    factors: dict[str, tuple[Ints, float]] = field(default_factory=dict)
    unseen: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    failed: str = ""
    flattened: list[str] = field(default_factory=list)

    @property
    def notes(self) -> list[str]:
        found = [*([self.failed] if self.failed else []), *self.flattened]
        if self.lost:
            found.append(f"{', '.join(self.lost)}: the optimizer's state could not be turned with the channels, and starts anew")
        if self.shares:
            found.append(f"turned to principal axes before channels went: {', '.join(self.shares)}")
        if self.unseen:
            found.append(
                f"{', '.join(self.unseen)}: not turned to principal axes, since nothing was seen of what runs through: calibration= takes batches of it"
            )
        return found


class Covariances:
    """Sees what the streams and the heads that have a free basis hold, from now on until `finish`: of training steps, or of whatever runs.

    Attributes:
        called_with: the last arguments of the model; None where nothing has a free basis.
        layers: that are looked at, by path; given where the model is being copied, and not whole yet.
    """

    def __init__(self, model: nn.Module, neurons: Sequence[Neurons], training: bool = True, layers: dict[str, nn.Module] | None = None):
        self._model = model
        self._free = {g.name: g for g in neurons if g.basis is not None}
        self._of: dict[str, list[str]] = {}
        for group in self._free.values():
            basis = group.basis
            assert basis is not None
            paths = list(basis.readers) if isinstance(basis, Stream) else [basis.query.path, basis.key.path, basis.value.path]
            for path in dict.fromkeys(paths):
                self._of.setdefault(path, []).append(group.name)
        self._sums: Sums = {}
        self.called_with: tuple[Any, ...] | None = None
        whole = bool(self._free) and hasattr(model, "_forward_pre_hooks")  # it has none yet where it is being copied with what it holds
        self._calls = Watch({"": model}, self._called, training, whole=True) if whole else None
        self.layers = {path: model.get_submodule(path) for path in self._of} if layers is None else layers
        self._watch = Watch(self.layers, self._note, training, uncompiled=training)

    def _called(self, _: str, model: nn.Module, given: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        args, kwargs = given
        with contextlib.suppress(TypeError, InvalidTypeError):  # what is given in another way cannot be given again
            self.called_with = copied(
                check_inputs(inspect.signature(model.forward).bind(*args, **kwargs).arguments, model) if kwargs else args
            )

    @torch.no_grad()
    def _note(self, path: str, module: nn.Module, x: Tensor) -> None:
        for name in self._of[path]:
            group = self._free[name]
            if isinstance(group.basis, Stream):
                self._note_stream(group, group.basis, path, x)
            elif group.basis is not None:
                out = type(module).forward(module, x)
                for side in ("query", "key", "value"):
                    if getattr(group.basis, side).path == path:
                        self._note_heads(group, group.basis, side, out)

    def _note_stream(self, group: Neurons, stream: Stream, path: str, x: Tensor) -> None:
        end = next(end for end in group.group.carriers if end.path == path)
        x = _some(x)[:, group.channels(end)[:, 0].to(x.device)].float()
        x = x - x.mean(1, keepdim=True) if stream.centred else x
        x = x / (x.square().mean(1, keepdim=True) + SMALL).sqrt()
        self._add(group.name, x.mT @ x)

    def _note_heads(self, group: Neurons, heads: Heads, side: str, out: Tensor) -> None:
        out = _some(out)[:, group.channels(getattr(heads, side)).to(out.device)].float().permute(2, 0, 1)  # [heads, rows, places]
        out = torch.nn.functional.pad(out, (0, 1), value=1.0)
        self._add(f"{group.name} {side}", out.mT @ out)

    def _add(self, name: str, gram: Tensor) -> None:
        gram = gram.double().cpu()
        if bool(torch.isfinite(gram).all()):  # a bad batch does not count
            self._sums[name] = self._sums[name] + gram if name in self._sums else gram

    def drop(self) -> None:
        """See no more."""
        self._watch.close()
        if self._calls is not None:
            self._calls.close()
        if self._free:
            drop_dead([self._model])  # of what was being copied

    def finish(self) -> Sums:
        """Sums of products, by all processes together: of a stream by its name, of heads by name and side, with a 1 beside their places."""
        self.drop()
        found: Sums = {}
        for sums in gathered(self._sums):
            for name, gram in sums.items():
                found[name] = found[name] + gram if name in found else gram
        return found


def _some(x: Tensor) -> Tensor:
    x = x.flatten(0, -2)
    return x[:: -(-len(x) // ROWS)]


def covariances(model: nn.Module, neurons: Sequence[Neurons], batches: Iterable[Any]) -> Sums:
    """What is seen in these batches, in eval mode."""
    seen = Covariances(model, neurons, training=False)
    try:
        with evaluating(model), torch.no_grad():
            for batch in batches:
                call(model, check_inputs(batch, model, "a batch of calibration"))
    finally:
        seen.drop()
    return seen.finish()


def turn(
    model: nn.Module,
    neurons: Sequence[Neurons],
    kept: dict[str, list[int]],
    sums: Sums,
    means: dict[str, Tensor],
    example_inputs: Any,
    optimizers: Sequence[torch.optim.Optimizer] = (),
) -> Turn:
    """Turn the groups that have a free basis, are going to lose units, and were seen, in place: their first units hold most. Where the model would
    compute something else then, all is as it was, and the notes say so.

    Args:
        kept: units that would be left, by group: of groups that are turned as many of the first.
        means: of what layers take in, by path: turned, too, in place.
    """
    factors: dict[str, tuple[Ints, float]] = {}
    for group in neurons:
        for end in group.group.queries:
            factors[end.path] = end.index.ravel(), math.sqrt(len(kept.get(group.name, group.kept)) / len(group.kept))
    going = [g for g in neurons if g.basis is not None and len(kept.get(g.name, g.kept)) < len(g.kept)]
    done = Turn(dict(kept), factors=factors)
    if not going:
        return done
    turned_means = dict(means)
    try:
        with all_or_nothing(model, None, optimizers):
            _turn(model, going, done, sums, turned_means, check_inputs(example_inputs, model), optimizers)
    except (SurgeryError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        return Turn(dict(kept), factors=factors, failed=f"channels keep their axes: {first_line(error)}")
    means.update(turned_means)
    return done


def _turn(
    model: nn.Module,
    going: Sequence[Neurons],
    done: Turn,
    sums: Sums,
    means: dict[str, Tensor],
    inputs: tuple[Any, ...],
    optimizers: Sequence[torch.optim.Optimizer],
) -> None:
    before = outputs_uncut(model, inputs)
    kept = dict(done.kept)
    streams = [g.basis for g in going if isinstance(g.basis, Stream) and g.name in sums and len(kept[g.name]) > 1]
    refused = [stream for stream in streams if stream.flat and not _flat(model, stream, done, inputs, optimizers)]
    going = [g for g in going if g.basis not in refused]
    before = outputs(model, inputs) if any(stream.flat for stream in streams) else before
    # Heads first: they were seen as what comes out of layers that read the stream.
    for group in sorted(going, key=lambda g: isinstance(g.basis, Stream)):
        count = len(kept[group.name])
        if isinstance(group.basis, Stream) and group.name in sums and count > 1:
            rotation, share = stream_axes(sums[group.name], count, group.basis.centred)
            done.gains[group.name] = float(np.sqrt(share[:count].sum() * len(share) / count))
            seen = turn_stream(model, group.group, group.basis, rotation, optimizers)
        elif isinstance(group.basis, Heads) and all(f"{group.name} {side}" in sums for side in ("query", "key", "value")):
            queries, values, share = head_axes(model, group, sums, count)
            seen = turn_heads(model, group.group, group.basis, queries, values, optimizers)
        else:
            done.unseen.append(group.name)
            continue
        done.lost += _states_lost(model, group, optimizers)
        for path, turned in seen.items():
            if path in means:
                means[path] = _turned(means[path], turned)
        done.kept[group.name] = group.kept[:count].tolist()
        done.shares[group.name] = share
    if done.shares:
        scale = max(map(largest, before), default=1.0) or 1.0
        off, _ = largest_difference(before, outputs(model, inputs))
        if off is not None and not off <= TOLERANCE * scale:
            raise SurgeryError(f"turned to principal axes in {', '.join(done.shares)}, the outputs differ by {off / scale:.2g} (relative)")


def _flat(model: nn.Module, stream: Stream, done: Turn, inputs: tuple[Any, ...], optimizers: Sequence[torch.optim.Optimizer]) -> bool:
    """Make the gains before a tied head one number, where the outputs stay near what they were; else they are as they were. Either is noted."""
    before = outputs(model, inputs)
    norms: list[Any] = [model.get_submodule(path) for path in stream.flat]
    gains = [(norm.weight, norm.weight.detach().clone()) for norm in norms if norm.weight is not None]
    flatten(model, stream)
    pairs = [
        (a.double(), b.double())
        for a, b in zip(before, outputs(model, inputs), strict=False)
        if a.shape == b.shape and a.is_floating_point()
    ]
    changed, size = (
        sum(float(x.nan_to_num(0, 0, 0).square().sum()) for x in xs) for xs in ((b - a for a, b in pairs), (a for a, _ in pairs))
    )
    off, names = math.sqrt(changed / size) if size else 0.0, ", ".join(stream.flat)
    if not off <= FLAT:
        with torch.no_grad():
            for gain, value in gains:
                gain.copy_(value)
        done.flattened.append(
            f"the stream before {names} keeps its axes: a tied head reads it, and with one gain for all channels the outputs would differ by {off:.2g} of their size"
        )
        return False
    flatten(model, stream, optimizers)
    done.flattened.append(
        f"{names}: one gain for all channels, since a tied head reads them; by that the outputs differ by {off:.2g} of their size"
    )
    return True


def _states_lost(model: nn.Module, group: Neurons, optimizers: Sequence[torch.optim.Optimizer]) -> list[str]:
    """Forget the optimizers' state of parameters of a group where it holds what nobody can say how to turn; their names."""
    lost: dict[str, None] = {}
    for end in group.group.ends:
        for parameter in parameters_at(model.get_submodule(end.path), end):
            for optimizer in optimizers:
                if unknown_state(optimizer, parameter) is not None:
                    optimizer.state.pop(parameter)
                    lost[end.name] = None
    return list(lost)


def _turned(mean: Tensor, turned: Turned) -> Tensor:
    mean = mean.clone()
    mean[turned.positions] = torch.einsum("kij,jk->ik", turned.matrices, mean[turned.positions].double()).to(mean)
    return mean


def stream_axes(gram: Tensor, keep: int, centred: bool) -> tuple[Tensor, Floats]:
    """An orthogonal matrix whose first `keep` rows hold most, and the share of each row.

    The rows that are kept are a random mix of the principal axes: each channel holds about as much as another, as in a network that was
    never turned.
    """
    size = len(gram)
    gram = gram / gram.trace().clamp_min(1e-300)
    within = across_the_mean(size) if centred else torch.eye(size, dtype=torch.float64, device="cpu")
    values, vectors = torch.linalg.eigh(within.mT @ gram @ within)
    axes = within @ vectors.flip(1)  # [channels, axes], the largest first
    values = values.flip(0).clamp_min(0)
    if centred:
        first, last = across_the_mean(keep), across_the_mean(size - keep)
        parts = torch.tensor([1 / keep, -1 / (size - keep)], dtype=torch.float64, device="cpu").repeat_interleave(
            torch.tensor([keep, size - keep], device="cpu")
        )
        apart = parts[:, None] / parts.norm()
        mixed = torch.linalg.qr(
            torch.randn(keep - 1, keep - 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu")
        )[0]
        target = torch.cat([torch.block_diag(first @ mixed, last), apart], 1)
        rotation = target @ axes.mT + 1 / size
        held = values[: keep - 1].sum()
    else:
        mixed = torch.block_diag(random_rotation(keep, False), torch.eye(size - keep, dtype=torch.float64, device="cpu"))
        rotation = mixed @ axes.mT
        held = values[:keep].sum()
    held = float(held / values.sum().clamp_min(1e-300))
    share = np.full(size, (1 - held) / (size - keep))
    share[:keep] = held / keep
    return rotation, share


def head_axes(model: nn.Module, group: Neurons, sums: Sums, keep: int) -> tuple[Tensor, Tensor, Floats]:
    """Matrices `[heads, places, places]` for the queries (the keys get the inverse of their transpose) and the values, and the share of each place."""
    (end,) = group.group.consumers
    grams = {side: sums[f"{group.name} {side}"] / sums[f"{group.name} {side}"][:, -1:, -1:] for side in ("query", "key", "value")}
    query, to_query = _roots(grams["query"][:, :-1, :-1])
    key, _ = _roots(grams["key"][:, :-1, :-1])
    left, products, _ = torch.linalg.svd(query @ key)
    queries = products.clamp_min(1e-12 * products[:, :1]).sqrt()[:, :, None] * left.mT @ to_query
    mean = grams["value"][:, :-1, -1]
    value, to_value = _roots(grams["value"][:, :-1, :-1] - mean[:, :, None] * mean[:, None, :])
    module = model.get_submodule(end.path)
    columns = by_inputs(plain_layers(module)[0]).detach().flatten(1).double().cpu()  # [inputs, outputs]
    out = columns[group.channels(end)].permute(1, 2, 0)  # [heads, outputs, places]
    _, sizes, right = torch.linalg.svd(out @ value, full_matrices=False)
    if right.shape[1] < right.shape[2]:
        return queries, torch.eye(right.shape[2], dtype=torch.float64, device="cpu").expand(*right.shape[:1], -1, -1), _even(products)
    scale = sizes[:, :keep].mean(1).clamp_min(1e-12).sqrt()
    values = scale[:, None, None] * right @ to_value
    return queries, values, _even(sizes.square())


def _even(sizes: Tensor) -> Floats:
    share = (sizes / sizes.sum(1, keepdim=True).clamp_min(1e-300)).mean(0)
    return (share / share.sum()).numpy()


def _roots(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """The square root of each matrix, a little ridge added, and its inverse."""
    values, vectors = torch.linalg.eigh(covariance)
    values = values + RIDGE * values[:, -1:].clamp_min(1e-30)
    roots = values.clamp_min(1e-30).sqrt()[:, None, :]
    return vectors * roots @ vectors.mT, vectors / roots @ vectors.mT
