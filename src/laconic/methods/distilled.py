"""Knowledge distillation (Hinton et al. 2015) from the dense network into the thin one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import Dataset
from ..recipe import Recipe
from ..training import Curve, Report, cross_entropy, fit, make_optimizer
from . import dense
from .base import Method, Trained, build, thin_network

SHARE, TEMPERATURE = 0.9, 4.0  # setting: share of the teacher's soft targets in the loss; their temperature


def train(data: Dataset, recipe: Recipe, seed: int, report: Report | None = None) -> Trained:
    """The teacher is trained first, and its time is in the curve; weights that the recipe names are one already."""
    teacher = Trained(build(data, recipe, seed), Curve(seconds=[0.0])) if recipe.init else dense.train(data, recipe, seed)
    teacher.model.eval()
    model = thin_network(data, recipe, seed)
    share = recipe.setting or SHARE

    def loss(outputs: Tensor, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            soft = F.softmax(teacher.model(x) / TEMPERATURE, -1).flatten(0, -2)
        hard = cross_entropy(outputs, y, recipe.label_smoothing)
        return share * TEMPERATURE**2 * F.cross_entropy(outputs.flatten(0, -2) / TEMPERATURE, soft) + (1 - share) * hard

    curve = fit(model, data, recipe, seed, make_optimizer(model, recipe), report=report, loss=loss)
    curve.seconds = [teacher.curve.seconds[-1] + s for s in curve.seconds]
    return Trained(model, curve, notes=[f"widths {model.widths}, teacher: the dense network of this seed"])


DISTILLED = Method("thin dense, distilled from dense", train, (SHARE, 0.5, 0.7), resumes=False)
