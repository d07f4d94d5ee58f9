r"""Activation-aware SVD (SVD-LLM, Wang et al. 2024): the best approximation of what a layer puts out, not of its weight.

With the second moment :math:`C = E[x x^T] = L L^T` of a layer's inputs (of a convolution: of its patches)

.. math:: \operatorname{argmin}_{\operatorname{rank} B \le r} E\,\|(W - B)\,x\|^2 = (W L)_r\, L^{-1}

where :math:`(\cdot)_r` is the truncated SVD. The ranks come from the spectra of all :math:`W L` together, by the product rule.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..budget import Budget, ranks_for_budget
from ..compaction import cut_sites, spectra
from ..data import Dataset
from ..measure import evaluating
from ..outcome import make_report
from ..plan import make_plan
from ..recipe import Recipe
from ..report import CompactReport
from ..structures import LowRank
from .base import calibration, example
from .svd import post_hoc, trained_on

AT = 0.2  # setting of the one that trains on: the share of the run after which the network is cut
RIDGE = 1e-3  # of the mean of C's diagonal, added to it: directions that were never seen keep a little weight
POSITIONS = 50_000  # patches of a layer from which C is estimated


def patches(layer: Any, x: Tensor) -> Tensor:
    """What the rows of the unfolded weight are multiplied with: [positions, in * kh * kw]."""
    if isinstance(layer, nn.Linear):
        return x.flatten(0, -2)
    found = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return found.transpose(1, 2).flatten(0, 1)


def is_plain(layer: Any) -> bool:
    return isinstance(layer, nn.Linear) or (
        isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    )


def roots(layers: dict[str, nn.Module], model: nn.Module, data: Dataset) -> dict[str, Tensor]:
    """The Cholesky factor L of each layer's C, in float64, over some of the calibration images."""
    sums: dict[str, tuple[int, Tensor]] = {}

    def watch(name: str) -> Any:
        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            count, total = sums.get(name, (0, torch.zeros((), device=data.device)))
            if count < POSITIONS:
                rows = patches(layer, args[0].detach())
                sums[name] = count + len(rows), total + (rows.mT @ rows).double()

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        with evaluating(model):
            for batch in calibration(data):
                for part in batch.split(32):
                    model(part)
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for name, (count, total) in sums.items():
        c = total / count
        c.diagonal().add_(RIDGE * c.diagonal().mean())
        found[name] = torch.linalg.cholesky(c)
    return found


@torch.no_grad()
def by_outputs(model: nn.Module, data: Dataset, recipe: Recipe) -> CompactReport:
    """In place. Layers whose inputs are no plain rows or patches (transposed or grouped convolutions, padding by name) count by their weight alone."""
    structure = LowRank(matricization="out,in*kh*kw", inputs=False)
    budget = Budget(params=recipe.params)
    plan = make_plan(model, [structure], example(data))
    plain = {s.name: s for s in plan.sites if is_plain(s.modules[0])}
    factors = roots({name: s.modules[0] for name, s in plain.items()}, model, data)
    values = spectra(plan)
    for name, root in factors.items():
        values[name] = torch.linalg.svdvals(plain[name].matrix[0].double() @ root).cpu().numpy()
    ranks = ranks_for_budget(plan, values, budget)
    for name, rank in ranks.items():
        if rank is not None and name in factors:
            u, s, vh = torch.linalg.svd(plain[name].matrix[0].double() @ factors[name], full_matrices=False)
            best = torch.linalg.solve_triangular(factors[name], (u[:, :rank] * s[:rank]) @ vh[:rank], upper=False, left=False)
            plain[name].weights[0].copy_(plain[name].unfolding.fold(best[None].to(plain[name].weights[0].dtype)))
    done = cut_sites(model, plan, spectra(plan), ranks, example_inputs=example(data), calibration=calibration(data))
    return make_report(model, plan, done, example(data))


SVD_ACTIVATION = post_hoc("dense, then activation-aware SVD", by_outputs)
SVD_ACTIVATION_TUNED = trained_on("dense, cut by activation-aware SVD, trained on", by_outputs, (AT, 0.35, 0.5))
