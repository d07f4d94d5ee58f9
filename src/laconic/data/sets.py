"""The data sets by name."""

from __future__ import annotations

import dataclasses
import io
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataNotFoundError, InvalidValueError, missing_extra, nearest
from .augment import crop, crop_and_flip, keep, zoom_and_flip
from .files import CHARACTERS, LazyImages, character_set, folder_set, idx_set, label_file, npz_set, python_batches

Images = Tensor | LazyImages
CPU = torch.device("cpu")
NEIGHBOURS = 16  # letters of a class from one photograph are neighbours: the likeness ends after about eight


@dataclass(frozen=True, slots=True)
class Dataset:
    """Images as float32 `[n, c, h, w]`, channels last in memory, normalised with mean and deviation of the training images;
    in memory, or (folders of images) decoded when they are asked for. Texts as windows of tokens `[n, t]`, labels `[n, t]`.
    `alike`: so many neighbours in the training set may come from one source (letters of one shop sign, windows of one scene of a play), and are held out together."""

    name: str
    train_x: Images
    train_y: Tensor
    test_x: Images
    test_y: Tensor
    classes: int
    augment: Callable[[Tensor, torch.Generator], Tensor] = keep
    device: torch.device = CPU  # of the model; the images wait in the CPU's memory
    notes: tuple[str, ...] = ()  # what was left out
    alike: int = 1

    def validation(self, share: float = 0.15, seed: int = 0) -> Dataset:
        """The same with a part of the training set in place of the test set: for tuning."""
        count = len(self.train_x)
        order = torch.randperm(-(-count // self.alike), generator=torch.Generator().manual_seed(seed))  # of blocks of neighbours
        images = (order[:, None] * self.alike + torch.arange(self.alike)).split([held := int(share * len(order)), len(order) - held])
        test, train = (part[part < count] for part in images)
        return dataclasses.replace(
            self,
            train_x=taken(self.train_x, train),
            train_y=self.train_y[train],
            test_x=taken(self.train_x, test),
            test_y=self.train_y[test],
        )


def taken(x: Images, index: Any) -> Images:
    """Some of the images."""
    return x.take(index) if isinstance(x, LazyImages) else x[index]


def _prepared(
    name: str, train_x: Any, train_y: Any, test_x: Any, test_y: Any, augment: Callable[[Tensor, torch.Generator], Tensor], alike: int = 1
) -> Dataset:
    train, test = (torch.as_tensor(np.asarray(x), dtype=torch.float32) for x in (train_x, test_x))
    dims = (0, 2, 3)
    mean, std = train.mean(dims, keepdim=True), train.std(dims, keepdim=True)
    std = torch.where(std > 0, std, 1.0)  # a channel that is the same everywhere
    labels = [torch.as_tensor(np.asarray(y), dtype=torch.int64) for y in (train_y, test_y)]
    train, test = (((x - mean) / std).contiguous(memory_format=torch.channels_last) for x in (train, test))
    return Dataset(name, train, labels[0], test, labels[1], int(labels[0].max()) + 1, augment, alike=alike)


def digits(root: Path | None, size: int) -> Dataset:
    """1,797 handwritten digits, 8 x 8, from scikit-learn (extra `demo`); every fifth image is for testing."""
    del root, size  # ships inside a package
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise missing_extra("scikit-learn", "demo", "the digits data set") from None
    x, y = load_digits(return_X_y=True)
    x = x.reshape(-1, 1, 8, 8)
    test = np.arange(len(x)) % 5 == 4
    return _prepared("digits", x[~test], y[~test], x[test], y[test], _small_shift)


def _small_shift(x: Tensor, generator: torch.Generator) -> Tensor:
    return crop(x, generator, pad=1)


def scene(root: Path | None, _: int) -> Dataset:
    """36 classes of characters cut from photographs (Chars74K), grey, 32 x 32, with the given split."""
    z = np.load(_file("chars74k_scene36.npz", root))
    x, y, test = z["x32"][:, None], z["y"], z["split"] == 1
    return _prepared("scene", x[~test], y[~test], x[test], y[test], crop, NEIGHBOURS)


def characters(root: Path | None, _: int) -> Dataset:
    """The characters of `scene`, with about as many rendered glyphs of the same classes (every fourth) added to the training images; tested on photographs alone."""
    photographs, glyphs = np.load(_file("chars74k_scene36.npz", root)), np.load(_file("chars74k_font34.npz", root))
    x, y, test = photographs["x32"][:, None], photographs["y"], photographs["split"] == 1
    added = np.flatnonzero(glyphs["split"] == 0)[::4]
    drawn = np.pad(glyphs["x28"][added][:, None], ((0, 0), (0, 0), (2, 2), (2, 2)), mode="edge")
    return _prepared(
        "characters", np.concatenate([x[~test], drawn]), np.concatenate([y[~test], glyphs["y"][added]]), x[test], y[test], crop, NEIGHBOURS
    )


def cifar10(root: Path | None, _: int) -> Dataset:
    """CIFAR-10 as JPEG of quality 75: not comparable with results on the original files."""
    try:
        from PIL import Image
    except ImportError:
        raise missing_extra("pillow", "images", "the cifar10 data set") from None
    z = np.load(_file("cifar10_q75_jpeg.npz", root))

    def decode(part: str) -> Any:
        data, offset = z[f"{part}_jpeg"].tobytes(), z[f"{part}_offset"]
        images = [np.asarray(Image.open(io.BytesIO(data[a:b]))) for a, b in itertools.pairwise(offset)]
        return np.stack(images).transpose(0, 3, 1, 2)

    return _prepared("cifar10", decode("train"), z["train_y"], decode("test"), z["test_y"], crop_and_flip)


def mnist(root: Path | None, _: int) -> Dataset:
    """60,000 and 10,000 handwritten digits, 28 x 28, grey, in the idx files of MNIST."""
    return _prepared("mnist", *idx_set(_file("mnist", root, "MNIST/raw")), crop)


def fashion_mnist(root: Path | None, _: int) -> Dataset:
    """60,000 and 10,000 pieces of clothing, 28 x 28, grey, in idx files like MNIST's."""
    return _prepared("fashion-mnist", *idx_set(_file("fashion-mnist", root, "FashionMNIST/raw")), crop_and_flip)


def cifar10_original(root: Path | None, _: int) -> Dataset:
    """CIFAR-10, its python version."""
    parts = [f"data_batch_{i}" for i in range(1, 6)]
    return _prepared("cifar10-original", *python_batches(_file("cifar-10-batches-py", root), parts, "test_batch", "labels"), crop_and_flip)


def cifar100(root: Path | None, _: int) -> Dataset:
    """CIFAR-100, its python version, with the 100 fine labels."""
    return _prepared("cifar100", *python_batches(_file("cifar-100-python", root), ["train"], "test", "fine_labels"), crop_and_flip)


def tiny_shakespeare(root: Path | None, size: int) -> Dataset:
    """1.1 million characters of Shakespeare: predict each next one from those before it in a window; the last tenth is for testing."""
    return text_set("tiny-shakespeare", _file("text/tinyshakespeare.txt", root), size)


def text_set(name: str, path: Path, size: int) -> Dataset:
    """A text in windows of `size` characters side by side, labelled by the characters that follow."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidValueError(f"{path}: not a text in UTF-8 ({error})") from None
    letters = sorted(set(text))
    number = {letter: i for i, letter in enumerate(letters)}
    tokens = torch.tensor([number[letter] for letter in text])
    count = (len(tokens) - 1) // size
    if count < 10:
        raise InvalidValueError(f"{path}: {len(tokens)} characters are too few for ten windows of {size}")
    x, y = (tokens[start : start + count * size].reshape(count, size) for start in (0, 1))
    test = count - count // 10
    passage = max(1, test // 20)  # held out whole, as the test text is: windows beside one another share their speakers and words
    return Dataset(name, x[:test], y[:test], x[test:], y[test:], len(letters), alike=passage)


def folders(name: str, path: Path, size: int) -> Dataset:
    """A folder of images, see `folder_set`. Characters and words (with a `gt.txt` or `char.xml`) keep their sides; others are mirrored, large ones zoomed into."""
    arrays, classes = folder_set(path, size)
    augment = crop if label_file(path / "train") else crop_and_flip if size <= 64 else zoom_and_flip
    return Dataset(name, *arrays, len(classes), augment)


def imagenet(root: Path | None, size: int) -> Dataset:
    """ImageNet (ILSVRC 2012) as folders of classes in train and val."""
    return folders("imagenet", _file("imagenet", root), size)


def icdar(root: Path | None, size: int) -> Dataset:
    """Characters of ICDAR 2003, 36 classes: capital and small letters are one, what is neither a letter nor a digit is left out and
    counted in the notes. Train and test have a `char.xml` each, as it is distributed, or a `gt.txt`."""
    arrays, notes = character_set(_file("icdar", root), size)
    return Dataset("icdar", *arrays, len(CHARACTERS), crop, notes=tuple(notes))


DATASETS: dict[str, Callable[[Path | None, int], Dataset]] = {
    "digits": digits,
    "scene": scene,
    "characters": characters,
    "cifar10": cifar10,
    "mnist": mnist,
    "fashion-mnist": fashion_mnist,
    "cifar10-original": cifar10_original,
    "cifar100": cifar100,
    "tiny-shakespeare": tiny_shakespeare,
    "imagenet": imagenet,
    "icdar": icdar,
}

FILES: dict[str, Callable[[str, int], Dataset]] = {
    ".npz": lambda name, _: _prepared(name, *npz_set(Path(name)), keep),
    ".txt": lambda name, size: text_set(name, Path(name), size),
}


def load_dataset(name: str, root: str | Path | None = None, train_limit: int | None = None, size: int = 32) -> Dataset:
    """Load a data set by name, an .npz file (see `npz_set`), a .txt file (see `text_set`), or a folder of images (see `folder_set`).

    Args:
        root: the folder in which the data sets of a name are.
        train_limit: take a prefix of the training images.
        size: of the images of a folder in pixels, of the windows of a text in characters; others have their own.

    Raises:
        InvalidValueError: unknown name. DataNotFoundError: not there, with the way to get it.
    """
    if name in DATASETS:
        data = DATASETS[name](Path(root) if root is not None else None, size)
    elif Path(name).suffix in FILES and Path(name).is_file():
        data = FILES[Path(name).suffix](name, size)
    elif Path(name).is_dir():
        data = folders(name, Path(name), size)
    else:
        raise InvalidValueError(
            f"task = {name!r} is unknown{nearest(name, DATASETS)}, and no {' or '.join(FILES)} file or folder of images"
        )
    if train_limit is None:
        return data
    some = slice(train_limit)
    return dataclasses.replace(data, train_x=taken(data.train_x, some), train_y=data.train_y[some])


def _file(name: str, root: Path | None, torchvision: str = "") -> Path:
    """Where it is. `torchvision` keeps it under another name, which goes first: on a file system that ignores case, `mnist` would find `MNIST` instead of `MNIST/raw`."""
    names = [torchvision, name] if torchvision else [name]
    given = root or (Path(os.environ["LACONIC_DATA"]) if os.environ.get("LACONIC_DATA") else None)
    places = [given] if given else [Path("data"), Path("../shared/data")]
    found = next((place / name for place in places for name in names if (place / name).exists()), None)
    if found is not None:
        return found
    looked = " or ".join(str(p) for p in places)
    raise DataNotFoundError(
        f"{' or '.join(names)} is not in {looked}: name its folder with --data DIR or LACONIC_DATA=DIR (docs/data.md says how the file is made); the task 'digits' needs no file"
    )
