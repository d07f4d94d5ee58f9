"""Image sets in the layouts in which they are distributed: idx files, CIFAR's batches, npz archives, folders of images."""

from __future__ import annotations

import gzip
import os
import pickle
import re
import string
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor

from ..errors import DataNotFoundError, InvalidValueError, first_line, missing_extra

Arrays = tuple[Any, Any, Any, Any]  # train_x [n, c, h, w], train_y, test_x, test_y
Labelled = list[tuple[Path, str]]  # images with their labels
CHARACTERS = {c: i for i, c in enumerate(string.digits + string.ascii_lowercase)}  # the classes of a character, capital or small
IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".webp"}


def read_idx(path: Path) -> Any:
    """An idx file of bytes (MNIST's format), packed with gzip or not."""
    raw = path.read_bytes()
    data = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        raise InvalidValueError(f"{path}: not an idx file of unsigned bytes")
    sides = np.frombuffer(data, ">u4", data[3], 4)
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if values.size != sides.prod():
        raise InvalidValueError(f"{path}: {values.size} bytes, but its header says {' x '.join(map(str, sides))}")
    return values.reshape(sides).copy()


def idx_set(folder: Path) -> Arrays:
    """MNIST, Fashion-MNIST: four files, `train-images-idx3-ubyte[.gz]` and so on."""

    def read(name: str) -> Any:
        found = next((p for p in (folder / name, folder / f"{name}.gz") if p.exists()), None)
        if found is None:
            raise DataNotFoundError(f"{folder / name}[.gz] is not there: the four idx files of MNIST or Fashion-MNIST belong into {folder}")
        return read_idx(found)

    x = [read(f"{part}-images-idx3-ubyte")[:, None] for part in ("train", "t10k")]
    y = [read(f"{part}-labels-idx1-ubyte") for part in ("train", "t10k")]
    return x[0], y[0], x[1], y[1]


class _Plain(pickle.Unpickler):
    """Nothing but arrays: a pickle could otherwise run anything."""

    def find_class(self, module: str, name: str) -> Any:
        if (module.removeprefix("numpy.").startswith(("core", "_core", "numpy")) and name in ("_reconstruct", "ndarray", "dtype")) or (
            (module, name) == ("_codecs", "encode")
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not an array")


def python_batches(folder: Path, train: Sequence[str], test: str, labels: str) -> Arrays:
    """CIFAR-10 and CIFAR-100 as "python version": pickled dictionaries of `data` [n, 3072] and labels."""

    def read(name: str) -> tuple[Any, Any]:
        path = folder / name
        if not path.exists():
            raise DataNotFoundError(f"{path} is not there: unpack the python version of the data set, so that {folder} holds its batches")
        with path.open("rb") as file:
            try:
                batch = _Plain(file, encoding="bytes").load()
                return batch[b"data"].reshape(-1, 3, 32, 32), np.asarray(batch[labels.encode()])
            except (pickle.UnpicklingError, KeyError, EOFError, AttributeError, ValueError) as error:
                raise InvalidValueError(f"{path}: not a batch of CIFAR's python version ({error})") from None

    parts = [read(name) for name in train]
    x, y = read(test)
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts]), x, y


def npz_set(path: Path) -> Arrays:
    """An archive with `train_x`, `train_y`, `test_x`, `test_y`; images `[n, h, w]`, `[n, h, w, 1 or 3]` or `[n, c, h, w]`, labels whole numbers from 0."""
    try:
        with np.load(path, allow_pickle=False) as file:
            archive = dict(file)
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise InvalidValueError(f"{path}: not an .npz archive of plain arrays ({first_line(error)})") from None
    missing = [key for key in ("train_x", "train_y", "test_x", "test_y") if key not in archive]
    if missing:
        raise InvalidValueError(f"{path}: {', '.join(missing)} missing; it has {', '.join(archive)}")

    def planes(x: Any) -> Any:
        if x.ndim == 3:
            return x[:, None]
        return x.transpose(0, 3, 1, 2) if x.ndim == 4 and x.shape[3] in (1, 3) and x.shape[1] not in (1, 3) else x

    for part in ("train", "test"):
        _check_images(path, part, archive[f"{part}_x"], archive[f"{part}_y"])
    x, test_x = planes(archive["train_x"]), planes(archive["test_x"])
    if x.shape[1:] != test_x.shape[1:]:
        raise InvalidValueError(f"{path}: train_x has images of {x.shape[1:]}, test_x of {test_x.shape[1:]}: they must be of one size")
    highest, tested = (int(archive[f"{part}_y"].max()) for part in ("train", "test"))
    if tested > highest:
        raise InvalidValueError(f"{path}: test_y has a class {tested}, but the highest in train_y is {highest}")
    return x, archive["train_y"], test_x, archive["test_y"]


def _check_images(path: Path, part: str, x: Any, y: Any) -> None:
    if x.ndim not in (3, 4) or not x.size or x.dtype.kind not in "biuf":
        raise InvalidValueError(
            f"{path}: {part}_x is {x.dtype} of shape {x.shape}: expected numbers, [n, h, w], [n, h, w, 1 or 3] or [n, c, h, w]"
        )
    if not np.isfinite(x).all():
        raise InvalidValueError(f"{path}: {part}_x holds NaN or Inf")
    if y.shape != (len(x),) or y.dtype.kind not in "iu" or y.min() < 0:
        raise InvalidValueError(
            f"{path}: {part}_y is {y.dtype} of shape {y.shape}: expected the class of each of the {len(x)} images, a whole number from 0"
        )


class LazyImages:
    """Image files that look like a tensor `[n, 3, size, size]`: decoded, scaled and cut to the middle square when they are asked for.

    Values are normalised with the mean and deviation of each channel, seen on a part of the training images.
    """

    def __init__(self, files: Sequence[Path], size: int, mean: Tensor | None = None, std: Tensor | None = None):
        self.files, self.size = list(files), size
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
        if mean is None or std is None:
            some = self._decoded(range(0, len(self.files), max(1, len(self.files) // 512)))
            mean, std = some.mean((0, 2, 3), keepdim=True), some.std((0, 2, 3), keepdim=True).clamp_min(1e-3)
        self.mean, self.std = mean, std

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.files), 3, self.size, self.size))

    def __len__(self) -> int:
        return len(self.files)

    def _decoded(self, index: Sequence[int]) -> Tensor:
        images = list(self._pool.map(self._read, (self.files[i] for i in index)))
        return torch.stack(images).contiguous(memory_format=torch.channels_last)

    def _read(self, path: Path) -> Tensor:
        try:
            from PIL import Image, UnidentifiedImageError
        except ImportError:
            raise missing_extra("pillow", "images", "a folder of images") from None
        try:
            with Image.open(path) as image:
                scale = self.size / min(image.size)
                grown = image.convert("RGB").resize([max(self.size, round(s * scale)) for s in image.size], Image.Resampling.BILINEAR)
        except (UnidentifiedImageError, OSError) as error:
            raise InvalidValueError(f"{path}: not an image that can be read ({error})") from None
        left, top = ((s - self.size) // 2 for s in grown.size)
        square = np.asarray(grown.crop((left, top, left + self.size, top + self.size)), dtype=np.float32)
        return torch.from_numpy(square.transpose(2, 0, 1).copy())

    def __getitem__(self, index: Any) -> Tensor:
        chosen = range(len(self))[index] if isinstance(index, slice) else torch.as_tensor(index).tolist()
        x: Tensor = (self._decoded(chosen) - self.mean) / self.std
        return x

    def split(self, size: int) -> Iterator[Tensor]:
        """Batch by batch, decoded one after the other."""
        return (self[i : i + size] for i in range(0, len(self), size))

    def take(self, index: Any) -> LazyImages:
        """These files, still not decoded."""
        chosen = range(len(self))[index] if isinstance(index, slice) else torch.as_tensor(index).tolist()
        return LazyImages([self.files[i] for i in chosen], self.size, self.mean, self.std)


def lines_of(truth: Path) -> Labelled:
    """Lines `file, "label"`: the Robust Reading competitions from 2011 on."""
    lines = [line for line in truth.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    pairs = [re.fullmatch(r'\s*(.+?),\s*"(.*)"\s*', line) for line in lines]
    wrong = next((line for line, pair in zip(lines, pairs, strict=True) if pair is None), None)
    if wrong is not None:
        raise InvalidValueError(f'{truth}: {wrong!r}: expected lines of the form word_1.png, "label"')
    return [(truth.parent / p[1], p[2]) for p in pairs if p is not None]


def tags_of(truth: Path) -> Labelled:
    """Entries `<image file="char/1/1.jpg" tag="A" />`: ICDAR 2003."""
    try:
        entries = list(ElementTree.parse(truth).iter("image"))
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # the last two: encodings that it cannot read
        raise InvalidValueError(f"{truth}: not XML ({error})") from None
    wrong = next((dict(entry.attrib) for entry in entries if not {"file", "tag"} <= entry.attrib.keys()), None)
    if wrong is not None or not entries:
        found = "no entry" if wrong is None else f"an entry with {wrong}"
        raise InvalidValueError(f'{truth}: {found}: expected entries of the form <image file="char/1/1.jpg" tag="A" />')
    return [(truth.parent / entry.attrib["file"], entry.attrib["tag"]) for entry in entries]


LISTS: dict[str, Callable[[Path], Labelled]] = {"gt.txt": lines_of, "char.xml": tags_of}


def label_file(folder: Path) -> Path | None:
    """The file in it that names the label of each image."""
    return next((folder / name for name in LISTS if (folder / name).exists()), None)


def listed(folder: Path) -> tuple[list[Path], list[str]]:
    """Images and labels below a folder: by its `gt.txt` or `char.xml` (ICDAR), or a subfolder for each class (ImageNet)."""
    truth = label_file(folder)
    if truth is not None:
        found = LISTS[truth.name](truth)
        absent = next((path for path, _ in found if not path.exists()), None)
        if absent is not None:
            raise DataNotFoundError(f"{truth} names {os.path.relpath(absent, folder)}, which is not in {folder}")
    else:
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGES and not p.name.startswith("."))
        found = [(p, p.relative_to(folder).parts[0]) for p in files if len(p.relative_to(folder).parts) > 1]
    if not found:
        raise DataNotFoundError(f"{folder}: no images in subfolders named by their class, and no {' or '.join(LISTS)}")
    return [p for p, _ in found], [label for _, label in found]


def parts_of(root: Path) -> tuple[Path, Path]:
    """`root/train`, and `root/test` or `root/val`."""
    test = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or test is None:
        raise DataNotFoundError(f"{root}: expected a folder train and a folder test or val in it")
    return root / "train", test


def lazy_set(train_files: list[Path], train_y: list[int], test_files: list[Path], test_y: list[int], size: int) -> Arrays:
    """All normalised as the training images are."""
    train = LazyImages(train_files, size)
    return train, torch.tensor(train_y), LazyImages(test_files, size, train.mean, train.std), torch.tensor(test_y)


def folder_set(root: Path, size: int) -> tuple[Arrays, list[str]]:
    """`root/train` and `root/test` (or `root/val`), and the classes, which are numbered in the order of their names."""
    train, test = parts_of(root)
    train_files, train_labels = listed(train)
    test_files, test_labels = listed(test)
    classes = sorted(set(train_labels))
    number = {label: i for i, label in enumerate(classes)}
    unknown = sorted(set(test_labels) - set(classes))
    if unknown:
        raise InvalidValueError(f"{test}: {', '.join(unknown[:5])} not among the classes of {train}")
    y = [[number[label] for label in labels] for labels in (train_labels, test_labels)]
    return lazy_set(train_files, y[0], test_files, y[1], size), classes


def characters_of(folder: Path) -> tuple[list[Path], list[int], list[str]]:
    """Images of letters and digits, their classes in `CHARACTERS`, and the labels of the images that are left out because they show neither."""
    if label_file(folder) is None:
        raise DataNotFoundError(f"{folder}: neither char.xml nor gt.txt, which name the character of each image, is in it")
    files, labels = listed(folder)
    kept = [(file, CHARACTERS[label.lower()]) for file, label in zip(files, labels, strict=True) if label.lower() in CHARACTERS]
    left_out = [label for label in labels if label.lower() not in CHARACTERS]
    if not kept:
        raise InvalidValueError(f"{folder}: no image shows a single letter or digit, but {', '.join(map(repr, left_out[:5]))}")
    return [file for file, _ in kept], [y for _, y in kept], left_out


def character_set(root: Path, size: int) -> tuple[Arrays, list[str]]:
    """As `folder_set`, with the 36 letters and digits as classes whichever of them are there; and a note on each part from which images were left out."""
    parts = parts_of(root)
    (train_files, train_y, _), (test_files, test_y, _) = found = [characters_of(part) for part in parts]
    notes = [
        f"{part.name}: {len(left_out)} of {len(y) + len(left_out)} images left out, which show no single letter or digit, but "
        + ", ".join(map(repr, sorted(set(left_out))[:8]))
        for part, (_, y, left_out) in zip(parts, found, strict=True)
        if left_out
    ]
    return lazy_set(train_files, train_y, test_files, test_y, size), notes
