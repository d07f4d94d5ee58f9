"""Data sets for the demo, the recipes and the experiments: loaded whole, as tensors.

`digits` ships inside scikit-learn. The others are read from a folder: `--data`, else the environment variable
LACONIC_DATA, else `data/` or `../shared/data`.
"""

from .augment import crop, crop_and_flip, keep
from .sets import DATASETS, Dataset, load_dataset

__all__ = ["DATASETS", "Dataset", "crop", "crop_and_flip", "keep", "load_dataset"]
