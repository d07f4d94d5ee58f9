"""Networks that the demo, the experiments and the benchmarks train."""

from .convnet import ConvNet, thin_widths
from .gpt import GPT

__all__ = ["GPT", "ConvNet", "thin_widths"]
