"""What is tied to what: which channels of which layers make up one unit that can be removed.

The network runs once on the example inputs, and beside every tensor runs a label: along one of its axes, which unit
each position belongs to ("without the unit, this slice is not there"). Layers make units (their outputs) and read them
(their inputs); everything between them is followed operation by operation:

- what only moves numbers (view, transpose, cat, chunk, ...) moves the labels, by the same operation on the labels;
- what combines numbers place by place (add, relu, a gate, ...) ties the units that meet;
- a view that divides the axis of the units (attention heads) ties all that must go together for the tensors to stay
  rectangular: so a head becomes one unit, with its rows of query, key and value;
- what mixes the units among themselves (LayerNorm, softmax or a sum over them), what adds something that cannot shrink
  (embeddings, the input), and what is unknown, *holds* the units: they stay, and the reason is kept.

So the rule is always that slicing commutes with the operation. What is found this way is then tried on a copy, several
times: the model without some units must give what the model gives when nothing reads them.
"""

from ..surgery.channels import Count, End, Group
from .bases import across_the_mean, free_bases, random_rotation
from .groups import NOT_REACHED, find_groups
from .labels import leaves, outputs
from .trial import gap, largest, unread, unsafe_convolutions

__all__ = [
    "NOT_REACHED", "Count", "End", "Group", "across_the_mean", "find_groups", "free_bases", "gap", "largest", "leaves", "outputs", "random_rotation",
    "unread", "unsafe_convolutions",
]  # fmt: skip
