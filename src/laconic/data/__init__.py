"""Data sets for the demo, the recipes and the experiments: loaded whole, as tensors; folders of images batch by batch.

`digits` ships inside scikit-learn. The others are read from a folder: `--data`, else the environment variable
LACONIC_DATA, else `data/` or `../shared/data`. An .npz file or a folder of images is named by its path.
"""

from .augment import crop, crop_and_flip, keep, zoom_and_flip
from .sets import DATASETS, Dataset, Images, load_dataset, taken

__all__ = ["DATASETS", "Dataset", "Images", "crop", "crop_and_flip", "keep", "load_dataset", "taken", "zoom_and_flip"]
