r"""Let a pair of layers step about as far as the layer that it replaced.

The gradients of the factors of :math:`W = A B` are :math:`G B^T` and :math:`A^T G`. An optimizer that steps in proportion
to the gradient (SGD) therefore moves W, to first order, by :math:`G B^T B + A A^T G` where it moved the dense weight by
:math:`G`: up to :math:`s_{\max}` times as far through each factor, so that a learning rate that was right before the cut
may be far too large after it. Both gradients are therefore divided by :math:`s_{\max}`, the largest singular value at the
last round of cuts, and the momentum with them: no direction moves more than twice as far as before. An optimizer that
divides by a second moment (Adam, Adagrad, RMSprop) does not see the size of a gradient, and is left alone.

Weight decay is not scaled: the optimizer adds it after the gradient, to each factor in proportion to the factor, so
that the product decays at twice the rate of the layer, with SGD as with AdamW.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from .allocate import Floats
from .optimizers import holds
from .structures import Site
from .surgery.optimizer import FIRST_MOMENTS, SECOND_MOMENTS

Scales = dict[str, float]


def gradient_scales(sites: Sequence[Site], values: dict[str, Floats], optimizers: Sequence[Any]) -> Scales:
    """`1 / s_max` of every site that is cut and stepped in proportion to its gradient."""
    return {
        site.name: 1 / float(values[site.name][0])
        for site in sites
        if site.rank is not None and values[site.name][0] > 0 and not any(_has_second_moment(o, site) for o in optimizers)
    }


def scale_moments(sites: Sequence[Site], optimizers: Sequence[Any], old: Scales, new: Scales) -> None:
    """What the optimizer has averaged from gradients of the old scale, in the new one."""
    for site in sites:
        factor = new.get(site.name, 1.0) / old.get(site.name, 1.0)
        for optimizer in optimizers:
            for weight in site.weights:
                for key, value in getattr(optimizer, "state", {}).get(weight, {}).items():
                    if factor != 1 and key in FIRST_MOMENTS and isinstance(value, torch.Tensor):
                        value.mul_(factor)


@dataclass(frozen=True, slots=True)
class Scaling:
    """A hook on a gradient."""

    scale: float

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * self.scale


def scale_gradients(sites: Sequence[Site], scales: Scales) -> list[RemovableHandle]:
    """Hooks on the weights: whatever is accumulated into `.grad` is scaled."""
    return [w.register_hook(Scaling(scales[s.name])) for s in sites if s.name in scales for w in s.weights if w.requires_grad]


def _has_second_moment(optimizer: Any, site: Site) -> bool:
    """Of the site's weights, or, where none of them had a gradient yet, of any that it holds beside them."""
    states = getattr(optimizer, "state", {})
    own = [states[w] for w in site.weights if states.get(w)]
    return any(not SECOND_MOMENTS.isdisjoint(s) for s in own or (states.values() if holds(optimizer, site.weights[0]) else ()))
