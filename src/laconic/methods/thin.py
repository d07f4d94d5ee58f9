"""The plainest rival: a dense network with all widths scaled down to the budget."""

from __future__ import annotations

from ..data import Dataset
from ..recipe import Recipe
from ..training import Report, Restart, fit, make_optimizer
from .base import Method, Trained, thin_network


def train(
    data: Dataset, recipe: Recipe, seed: int, report: Report | None = None, restart: Restart | None = None, epochs: int | None = None
) -> Trained:
    """For the same steps, or for `epochs`."""
    model = thin_network(data, recipe, seed)
    curve = fit(model, data, recipe, seed, make_optimizer(model, recipe), report=report, epochs=epochs, restart=restart)
    return Trained(model, curve, notes=[f"widths {model.widths}, {len(curve.loss)} epochs"])


def longer(data: Dataset, recipe: Recipe, seed: int, report: Report | None = None, restart: Restart | None = None) -> Trained:
    """For `recipe.thin_epochs`: about the training time of laconic, not its number of steps."""
    return train(data, recipe, seed, report, restart, recipe.thin_epochs or 2 * recipe.epochs)


THIN = Method("thin dense, same steps", train)
THIN_LONG = Method("thin dense, for longer", longer)
