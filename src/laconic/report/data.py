"""What compaction did, as data."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

FORMAT = 1


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One weight.

    Attributes:
        name: of the layer.
        kind: class of the dense layer.
        shape: of the dense weight.
        rank: the rank it was cut to; None where it stays dense.
        full_rank: the smaller side of its matrix.
        params_before, params_after: parameters of the weight (of both factors).
        macs_before, macs_after: MACs on the example inputs; None without.
        energy: share of the squared singular values that was kept.
        spectrum: singular values just before the cut, largest first; empty where not computed.
        ms_before, ms_after: measured time of the layer alone; None where not measured.
        note: why it stays dense, or what else there is to say.
        inputs: channels between the first two of three layers, where the pair was cut again along its inputs; None for a pair.
        slim: shape of the weight (or of the one that the pair stands for) without the neurons that went; None if none did.
        price: what a lower rank would have lost when the structure became final, as a logarithm of what is kept, for each percent of the budget
            that it saves; None without a budget or without neurons, and where no lower rank is possible.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    rank: int | None
    full_rank: int | None
    params_before: int
    params_after: int
    macs_before: int | None = None
    macs_after: int | None = None
    energy: float = 1.0
    spectrum: tuple[float, ...] = ()
    ms_before: float | None = None
    ms_after: float | None = None
    note: str = ""
    slim: tuple[int, ...] | None = None
    inputs: int | None = None
    price: float | None = None

    @property
    def outcome(self) -> str:
        """What became of it: dense, slim, low-rank, or both."""
        return {(False, False): "dense", (True, False): "slim", (False, True): "low-rank", (True, True): "both"}[
            self.slim is not None, self.rank is not None
        ]


@dataclass(frozen=True, slots=True)
class GroupReport:
    """The neurons of a layer and all that is tied to them.

    Attributes:
        name: of the first layer that puts them out.
        units, kept: how many there were and are.
        share: of the variance that their consumers take in, what is left.
        layers: every layer that shrank with them.
        price: what fewer units would have lost, as that of a layer.
        kind: what a unit is, in the plural.
    """

    name: str
    units: int
    kept: int
    share: float
    layers: tuple[str, ...]
    price: float | None = None
    kind: str = "units"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of a run at one proximal step or cut: ranks by weight, the strength at that time, and what a cut to the
    budget would have lost (see `laconic.schedule.Controller`).

    What is not known, NaN, becomes None, which JSON can hold.
    """

    step: int
    strength: float | None
    ranks: dict[str, int]
    gap: float | None = None

    def __post_init__(self) -> None:
        for name in ("strength", "gap"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                object.__setattr__(self, name, None)


@dataclass(frozen=True, slots=True)
class CompactReport:
    """What compaction did.

    Attributes:
        params_before, params_after: parameters of the whole model.
        macs_before, macs_after: MACs on the example inputs; None without.
        latency_before, latency_after: measured ms of a forward pass on the example inputs, where the budget is in ms.
        max_abs_diff: largest change of an output on the example inputs, in eval mode; None without, or where outputs cannot be compared (see the notes).
        surgery_error: largest relative difference between a cut layer and the dense layer with the truncated weight;
            rounding, or the cut would have been refused.
        layers: one entry for each weight of two or more dimensions.
        groups: one entry for each group of neurons under `Channels`.
        notes: everything else that a reader must know: fallbacks, settings without effect, losses.
        history: ranks over training.
        spectra_start: singular values when training began, by weight name.
    """

    params_before: int
    params_after: int
    macs_before: int | None
    macs_after: int | None
    max_abs_diff: float | None
    surgery_error: float
    layers: tuple[LayerReport, ...]
    notes: tuple[str, ...] = ()
    history: tuple[Snapshot, ...] = ()
    spectra_start: dict[str, tuple[float, ...]] | None = None
    latency_before: float | None = None
    latency_after: float | None = None
    groups: tuple[GroupReport, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain lists, dicts and numbers, ready for `json.dumps`. An infinite or undefined change of an output is a string."""
        diff = self.max_abs_diff
        return {"format": FORMAT, **asdict(self), "max_abs_diff": diff if diff is None or math.isfinite(diff) else str(diff)}

    @staticmethod
    def from_json(data: dict[str, Any]) -> CompactReport:
        fields = {k: v for k, v in data.items() if k != "format"}
        layers = tuple(
            LayerReport(
                **{**x, "shape": tuple(x["shape"]), "spectrum": tuple(x["spectrum"]), "slim": tuple(x["slim"]) if x.get("slim") else None}
            )
            for x in fields.pop("layers")
        )
        groups = tuple(GroupReport(**{**x, "layers": tuple(x["layers"])}) for x in fields.pop("groups", ()))
        history = tuple(Snapshot(**x) for x in fields.pop("history"))
        diff = fields.pop("max_abs_diff")
        starts = fields.pop("spectra_start")
        return CompactReport(
            **{**fields, "layers": layers, "groups": groups, "history": history, "notes": tuple(fields["notes"])},
            max_abs_diff=None if diff is None else float(diff),
            spectra_start=None if starts is None else {k: tuple(v) for k, v in starts.items()},
        )

    def __str__(self) -> str:
        lines = [f"parameters {self.params_before} -> {self.params_after} ({self.params_after / self.params_before:.3f})"]
        if self.macs_before and self.macs_after:
            lines.append(f"MACs {self.macs_before} -> {self.macs_after} ({self.macs_after / self.macs_before:.3f})")
        if self.latency_before and self.latency_after:
            lines.append(f"{self.latency_before:.3g} ms -> {self.latency_after:.3g} ms ({self.latency_after / self.latency_before:.3f})")
        if self.max_abs_diff is not None:
            lines.append(
                f"surgery error {self.surgery_error:.2g} (rounding); what was cut away at once changed an output by {self.max_abs_diff:.3g} at most"
            )
        for layer in self.layers:
            shape = f"{list(layer.shape)}" + (f" -> {list(layer.slim)}" if layer.slim is not None else "")
            inputs = f", inputs {layer.inputs} of {(layer.slim or layer.shape)[1]}" if layer.inputs is not None else ""
            rank = f"rank {layer.rank} of {layer.full_rank}{inputs}, energy {layer.energy:.4f}"
            outcome = f"{rank if layer.rank is not None else layer.outcome}{priced(layer.price)}"
            lines.append(f"  {layer.name} {shape}: {outcome}{layer.note and ': ' + layer.note}")
        lines += [f"  {g.name}: {g.kept} of {g.units} {g.kind}, share {g.share:.4f}{priced(g.price)}" for g in self.groups]
        if any(price is not None for price in (*(x.price for x in self.layers), *(g.price for g in self.groups))):
            lines.append(
                "  price: what the next rank, or unit, would lose for each percent of the budget that it saves, -log(share kept); the cheapest go first"
            )
        return "\n".join([*lines, *self.notes])


def priced(price: float | None) -> str:
    return "" if price is None else f", price {price:.2g}"
