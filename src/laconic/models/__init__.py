"""Networks that the demo and the experiments train."""

from .convnet import ConvNet, thin_widths

__all__ = ["ConvNet", "thin_widths"]
