"""Everything that the demo and the experiments compare: the same data, steps, and optimizer; one file for each idea.

To add a method: write a function of (data, recipe, seed, report) that returns a `Trained` model within
`recipe.params`, in a file of its own, and give it a line in `METHODS`. `laconic train RECIPE --method NAME` then runs it,
`laconic bench RECIPES --methods NAMES` takes it into a grid.
"""

import dataclasses

from ..errors import RecipeError, nearest
from ..recipe import Recipe
from .activation_aware import SVD_ACTIVATION, SVD_ACTIVATION_TUNED
from .as_published import AS_PUBLISHED
from .base import Method, Trained, build, calibration, example, thin_network
from .cuttlefish import CUTTLEFISH
from .dense import DENSE
from .distilled import DISTILLED
from .fixed_rank import PUFFERFISH, SPECTRAL_INIT
from .found import FOUND, FOUND_WIDTHS
from .learning_compression import LC
from .magnitude import MAGNITUDE
from .ours import BOTH, CHANNELS, LACONIC, LATE, LOW_RANK, UNPRESSED, compressor_for
from .pat import PAT
from .refitted import REFITTED
from .spectral_penalties import SLORR_HOYER, SLORR_HOYER_TUNED, SLORR_NUC, SPECTRAL_WEIGHT_DECAY
from .svd import SVD, SVD_ENERGY, SVD_ENERGY_TUNED
from .svd import cut as cut_after_training
from .svd_training import SVD_TRAINING
from .svd_tuned import CUT_ONCE, SVD_TUNED
from .tensor_decompositions import CP, TUCKER
from .thin import THIN, THIN_LONG
from .torch_pruning import TORCH_PRUNING, TORCH_PRUNING_TAYLOR
from .trp import TRP

METHODS: dict[str, Method] = {
    "dense": DENSE,
    "svd": SVD,
    "svd-energy": SVD_ENERGY,
    "svd-activation": SVD_ACTIVATION,
    "svd-tuned": SVD_TUNED,
    "svd-energy-tuned": SVD_ENERGY_TUNED,
    "svd-activation-tuned": SVD_ACTIVATION_TUNED,
    "tucker": TUCKER,
    "cp": CP,
    "thin": THIN,
    "thin-long": THIN_LONG,
    "distilled": DISTILLED,
    "found": FOUND,
    "found-widths": FOUND_WIDTHS,
    "pufferfish": PUFFERFISH,
    "cuttlefish": CUTTLEFISH,
    "spectral-init": SPECTRAL_INIT,
    "as-published": AS_PUBLISHED,
    "trp": TRP,
    "lc": LC,
    "svd-training": SVD_TRAINING,
    "spectral-decay": SPECTRAL_WEIGHT_DECAY,
    "slorr-nuc": SLORR_NUC,
    "slorr-hoyer": SLORR_HOYER,
    "slorr-hoyer-tuned": SLORR_HOYER_TUNED,
    "pat": PAT,
    "magnitude": MAGNITUDE,
    "torch-pruning": TORCH_PRUNING,
    "torch-pruning-taylor": TORCH_PRUNING_TAYLOR,
    "late": LATE,
    "cut-once": CUT_ONCE,
    "refitted": REFITTED,
    "unpressed": UNPRESSED,
    "low-rank": LOW_RANK,
    "channels": CHANNELS,
    "both": BOTH,
    "laconic": LACONIC,
}


def at_own_rate(recipe: Recipe, method: str) -> Recipe:
    """The recipe with the learning rate that it has for this method; all that a method trains (a teacher, too) is trained at it.

    Raises:
        RecipeError: it has one for a method that there is not, or that trains nothing.
    """
    for name in recipe.rates:
        if name not in METHODS:
            raise RecipeError(f"recipe: rates.{name}: no such method{nearest(name, METHODS)}")
        if name == "svd":
            raise RecipeError("recipe: rates.svd: svd cuts the network that dense has trained: give dense a rate")
    return dataclasses.replace(recipe, lr=recipe.rates.get("dense" if method == "svd" else method, recipe.lr))


__all__ = [
    "METHODS",
    "Method",
    "Trained",
    "at_own_rate",
    "build",
    "calibration",
    "compressor_for",
    "cut_after_training",
    "example",
    "thin_network",
]
