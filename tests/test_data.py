"""Image sets in the layouts in which they are distributed, made small here."""

import gzip
import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

import laconic.errors as errors
from laconic.cli import main
from laconic.data import Dataset, load_dataset
from laconic.data.files import LazyImages, listed

Image = pytest.importorskip("PIL.Image")
RNG = np.random.default_rng(0)


def write_idx(path: Path, values: np.ndarray, packed: bool) -> None:
    raw = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()
    if packed:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(raw))
    else:
        path.write_bytes(raw)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("name", "place"), [
    ("mnist", "mnist"), ("fashion-mnist", "fashion-mnist"), ("mnist", "MNIST/raw"), ("fashion-mnist", "FashionMNIST/raw"),
])  # fmt: skip
def test_idx_files(name, place, packed, tmp_path):
    folder = tmp_path / place
    folder.mkdir(parents=True)
    images = {part: RNG.integers(0, 256, (n, 28, 28), dtype=np.uint8) for part, n in (("train", 20), ("t10k", 10))}
    for part, x in images.items():
        write_idx(folder / f"{part}-images-idx3-ubyte", x, packed)
        write_idx(folder / f"{part}-labels-idx1-ubyte", np.arange(len(x), dtype=np.uint8) % 10, packed)
    data = load_dataset(name, tmp_path)
    assert data.train_x.shape == (20, 1, 28, 28)
    assert data.classes == 10
    train = images["train"].astype(np.float64)
    wanted = (images["t10k"] - train.mean()) / train.std(ddof=1)
    np.testing.assert_allclose(data.test_x[:, 0].numpy(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "folder", "files", "key", "classes"), [
    ("cifar10-original", "cifar-10-batches-py", [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], "labels", 10),
    ("cifar100", "cifar-100-python", ["train", "test"], "fine_labels", 100),
])  # fmt: skip
def test_python_batches(name, folder, files, key, classes, tmp_path):
    (tmp_path / folder).mkdir()
    (tmp_path / f"{folder}.tar.gz").write_bytes(b"")  # torchvision leaves the archive beside it
    (tmp_path / folder / "batches.meta").write_bytes(b"")
    images = {}
    for file in files:
        images[file] = RNG.integers(0, 256, (classes, 3072), dtype=np.uint8)
        batch = {b"data": images[file], key.encode(): list(range(classes))}
        (tmp_path / folder / file).write_bytes(pickle.dumps(batch, protocol=2))
    data = load_dataset(name, tmp_path)
    assert data.classes == classes
    assert len(data.train_x) == classes * (len(files) - 1)
    train = np.concatenate([images[f] for f in files[:-1]]).reshape(-1, 3, 32, 32).astype(np.float64)
    mean, std = train.mean((0, 2, 3)), train.std((0, 2, 3), ddof=1)
    wanted = (images[files[-1]].reshape(-1, 3, 32, 32) - mean[:, None, None]) / std[:, None, None]
    np.testing.assert_allclose(data.test_x.numpy(), wanted, rtol=1e-4, atol=1e-4)


def test_a_pickle_that_would_run_something_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    (folder / "train").write_bytes(pickle.dumps({b"data": Evil()}))
    with pytest.raises(errors.InvalidValueError, match=r"not a batch of CIFAR's python version \(builtins\.print is not an array\)"):
        load_dataset("cifar100", tmp_path)


@pytest.mark.parametrize("shape", [(12, 9, 9), (12, 9, 9, 3), (12, 3, 9, 9), (12, 9, 9, 1)])
def test_npz(shape, tmp_path):
    x = RNG.integers(0, 256, shape, dtype=np.uint8)
    np.savez(tmp_path / "own.npz", train_x=x, train_y=np.arange(12) % 4, test_x=x[:4], test_y=np.arange(4))
    data = load_dataset(str(tmp_path / "own.npz"), train_limit=8)
    assert data.train_x.shape == (8, 3 if 3 in shape else 1, 9, 9)
    assert data.classes == 4


def test_a_channel_that_is_the_same_everywhere_stays_finite(tmp_path):
    x = np.stack([np.arange(36).reshape(12, 3), np.full((12, 3), 7)], 1)[..., None].astype(np.float32)
    np.savez(tmp_path / "own.npz", train_x=x, train_y=np.arange(12) % 4, test_x=x, test_y=np.arange(12) % 4)
    data = load_dataset(str(tmp_path / "own.npz"))
    assert bool(torch.isfinite(data.train_x).all())
    assert bool(torch.isfinite(data.test_x).all())


def write_folder(root: Path, names: dict[str, list[str]]) -> None:
    """Images of a grey that says their class, 20 x 30 pixels."""
    for part, labels in names.items():
        for i, label in enumerate(labels):
            path = root / part / label / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((20, 30, 3), 40 * (ord(label[0]) - 96), dtype=np.uint8)).save(path)


def test_a_folder_of_images_is_decoded_when_it_is_asked_for(tmp_path):
    write_folder(tmp_path, {"train": ["a", "b", "c"] * 4, "val": ["c", "a"]})
    (next((tmp_path).rglob("0.png")).parent / "._0.png").write_bytes(b"macOS leaves such files")
    data = load_dataset(str(tmp_path), size=16)
    assert isinstance(data.train_x, LazyImages)
    assert data.train_x.shape == (12, 3, 16, 16)
    assert data.classes == 3
    assert data.test_y.tolist() == [0, 2]
    batch = data.train_x[torch.tensor([0, 11])]
    assert batch.shape == (2, 3, 16, 16)
    assert bool((batch[0] < batch[1]).all())  # a is darker than c
    whole = data.train_x[:]
    torch.testing.assert_close(whole.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.cat(list(data.train_x.split(5))), whole)
    held = data.validation(0.25)
    assert isinstance(held.train_x, LazyImages)
    assert len(held.train_x) == 9
    assert len(held.test_x) == 3


def test_a_list_of_words_as_in_the_robust_reading_competitions(tmp_path):
    for name in ("word_1.png", "word_2.png"):
        Image.new("RGB", (10, 8)).save(tmp_path / name)
    (tmp_path / "gt.txt").write_text('\ufeffword_1.png, "Tiredness"\nword_2.png, "a, \\"b"\n', encoding="utf-8")
    files, labels = listed(tmp_path)
    assert [f.name for f in files] == ["word_1.png", "word_2.png"]
    assert labels == ["Tiredness", 'a, \\"b']


ENTRIES = {  # what a part of the set holds, and the class of each: capital and small letters are one
    "train": {"1": 1, "A": 10, "a": 10, "z": 35, "0": 0, "&": None, "é": None, "ab": None, "&quot;": None},
    "test": {"Z": 35, "b": 11, "!": None},
}


def write_characters(root: Path, part: str, form: str) -> None:
    """Two folders of images, as in ICDAR 2003 (entries in Latin-1), or side by side with a list of lines; brightness tells them apart."""
    folder = root / "icdar" / part
    labels = list(ENTRIES[part])
    names = [f"char/{1 + i // 4}/{i}.jpg" if form == "char.xml" else f"{i}.png" for i in range(len(labels))]
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (9, 14), 20 * i).save(folder / name)
    if form == "char.xml":
        escaped = [label.replace("&", "&amp;") if label == "&" else label for label in labels]
        lines = [f'  <image file="{name}" tag="{tag}" />' for name, tag in zip(names, escaped, strict=True)]
        text = "\n".join(['<?xml version="1.0" encoding="ISO-8859-1"?>', "<imagelist>", *lines, "</imagelist>"])
        (folder / form).write_bytes(text.encode("latin-1"))
    else:
        lines = [f'{name}, "{label}"' for name, label in zip(names, labels, strict=True)]
        (folder / form).write_text("\n".join(lines), encoding="utf-8")


@pytest.mark.parametrize("form", ["char.xml", "gt.txt"])
def test_the_characters_of_icdar_2003(form, tmp_path):
    for part in ENTRIES:
        write_characters(tmp_path, part, form)
    data = load_dataset("icdar", tmp_path, size=16)
    assert data.classes == 36
    for part, x, y in (("train", data.train_x, data.train_y), ("test", data.test_x, data.test_y)):
        kept = [(i, label) for i, label in enumerate(ENTRIES[part].values()) if label is not None]
        assert y.tolist() == [label for _, label in kept]
        brightness = (x[:] * data.train_x.std + data.train_x.mean).mean((1, 2, 3))
        torch.testing.assert_close(brightness, torch.tensor([20.0 * i for i, _ in kept]), atol=2, rtol=0)  # JPEG
    train, test = data.notes
    assert "train: 4 of 9 images left out" in train
    assert "'&'" in train
    assert "'ab', 'é'" in train
    assert test == "test: 1 of 3 images left out, which show no single letter or digit, but '!'"
    assert data.validation(0.4).notes == data.notes


def test_a_list_of_tags_makes_the_classes_of_a_folder_too(tmp_path):
    for part in ENTRIES:
        write_characters(tmp_path, part, "char.xml")
    files, tags = listed(tmp_path / "icdar" / "train")
    assert tags == ["1", "A", "a", "z", "0", "&", "é", "ab", '"']
    assert files[4] == tmp_path / "icdar" / "train" / "char" / "2" / "4.jpg"
    with pytest.raises(errors.InvalidValueError, match="!, Z, b not among the classes"):  # as they are
        load_dataset(str(tmp_path / "icdar"))


def test_what_was_left_out_is_said_and_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for part in ENTRIES:
        write_characters(tmp_path, part, "char.xml")
    Path("own.toml").write_text('task = "icdar"\nsize = 8\nwidths = [8]\nepochs = 1\nbatch_size = 4\nparams = 1.0\n')
    main(["train", "own.toml", "--data", ".", "--method", "dense", "--no-times", "--json", "--threads", "1"])
    told = capsys.readouterr()
    assert "test: 1 of 3 images left out" in json.loads(told.out)["notes"][1]
    assert "train: 4 of 9 images left out" in told.err


def test_a_network_trains_on_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "images", {"train": ["a", "b"] * 64, "test": ["a", "b"] * 4})
    recipe = 'task = "images"\nsize = 16\nmodel = "resnet"\ndepth = 8\nwidths = [4, 8, 8]\nepochs = 3\nbatch_size = 16\nparams = 0.5\n'
    Path("own.toml").write_text(recipe)
    main(["train", "own.toml", "--no-times", "--json", "--threads", "1"])
    result = json.loads(capsys.readouterr().out)
    assert result["metrics"]["accuracy"] > 0.8
    assert result["metrics"]["params"] <= 0.5 * 5000


BAD = {
    "no such folder": (lambda p: load_dataset("mnist", p), errors.DataNotFoundError, "mnist is not in"),
    "idx missing": (lambda p: (p / "mnist").mkdir() or load_dataset("mnist", p), errors.DataNotFoundError, "train-images-idx3-ubyte"),
    "idx cut short": (
        lambda p: write_mnist(p, b"\x00\x00\x08\x01\x00\x00\x00\x09abc"), errors.InvalidValueError, "3 bytes, but its header says 9",
    ),
    "not idx": (lambda p: write_mnist(p, b"hello"), errors.InvalidValueError, "not an idx file"),
    "npz without labels": (
        lambda p: np.savez(p / "x.npz", train_x=np.zeros((1, 2, 2))) or load_dataset(str(p / "x.npz")), errors.InvalidValueError, "train_y, test_x",
    ),
    "npz that is none": (lambda p: (p / "x.npz").write_bytes(b"junk") and load_dataset(str(p / "x.npz")), errors.InvalidValueError, "not an .npz archive"),
    "npz without images": (lambda p: write_npz(p, train_x=np.zeros((0, 4, 4))), errors.InvalidValueError, r"train_x is float64 of shape \(0, 4, 4\)"),
    "npz of rows": (lambda p: write_npz(p, test_x=np.zeros((6, 16))), errors.InvalidValueError, r"test_x is float64 of shape \(6, 16\): expected"),
    "npz with NaN": (lambda p: write_npz(p, train_x=np.full((6, 4, 4), np.nan)), errors.InvalidValueError, "train_x holds NaN"),
    "npz with too few labels": (lambda p: write_npz(p, train_y=np.arange(5)), errors.InvalidValueError, "the class of each of the 6 images"),
    "npz with broken labels": (lambda p: write_npz(p, train_y=np.arange(6) + 0.5), errors.InvalidValueError, "train_y is float64"),
    "npz with one-hot labels": (lambda p: write_npz(p, train_y=np.eye(6, dtype=int)), errors.InvalidValueError, r"train_y is int64 of shape \(6, 6\)"),
    "npz with a class -1": (lambda p: write_npz(p, test_y=np.arange(6) - 1), errors.InvalidValueError, "whole number from 0"),
    "npz with a class never seen": (lambda p: write_npz(p, test_y=np.arange(6) + 1), errors.InvalidValueError, "test_y has a class 6, but the highest in train_y is 5"),
    "npz with two sizes": (lambda p: write_npz(p, test_x=np.zeros((6, 5, 5))), errors.InvalidValueError, r"train_x has images of \(1, 4, 4\), test_x of"),
    "empty folder": (lambda p: load_dataset(str(p)), errors.DataNotFoundError, "a folder train and a folder test or val"),
    "no classes": (
        lambda p: [(p / n).mkdir() for n in ("train", "test")] and load_dataset(str(p)), errors.DataNotFoundError, "no images in subfolders",
    ),
    "unknown class": (
        lambda p: write_folder(p, {"train": ["a"], "test": ["b"]}) or load_dataset(str(p)), errors.InvalidValueError, "b not among the classes",
    ),
    "not an image": (lambda p: write_broken(p), errors.InvalidValueError, "not an image that can be read"),
    "line of another form": (lambda p: (p / "gt.txt").write_text("word_1.png") and listed(p), errors.InvalidValueError, "word_1.png.*expected lines"),
    "characters without a list": (
        lambda p: write_folder(p / "icdar", {"train": ["char"], "test": ["char"]}) or load_dataset("icdar", p),
        errors.DataNotFoundError, r"icdar/train: neither char\.xml nor gt\.txt",
    ),
    "no character": (lambda p: write_tags(p, '<i><image file="1.png" tag="ab"/></i>'), errors.InvalidValueError, "no image shows.*, but 'ab'"),
    "list of characters cut short": (lambda p: write_tags(p, '<i><image file="1.png"'), errors.InvalidValueError, r"char\.xml: not XML"),
    "list in an unknown encoding": (
        lambda p: write_tags(p, '<?xml version="1.0" encoding="nope"?><i/>'), errors.InvalidValueError, r"char\.xml: not XML",
    ),
    "list of nothing": (lambda p: write_tags(p, "<imagelist/>"), errors.InvalidValueError, "no entry: expected entries of the form <image"),
    "entry without a tag": (lambda p: write_tags(p, '<i><image file="1.png"/></i>'), errors.InvalidValueError, r"an entry with \{'file': '1.png'\}: expected"),
    "character missing": (
        lambda p: write_tags(p, '<i><image file="char/1/7.jpg" tag="a"/></i>'), errors.DataNotFoundError, "names char/1/7.jpg, which is not in",
    ),
    "text that is none": (
        lambda p: (p / "x.txt").write_bytes(b"\xff\xfe\x00") and load_dataset(str(p / "x.txt")), errors.InvalidValueError, r"x\.txt: not a text in UTF-8",
    ),
    "text that is not there": (
        lambda p: load_dataset(str(p / "x.txt")), errors.InvalidValueError, r"x\.txt' is unknown.*no \.npz or \.txt file or folder of images",
    ),
    "word missing": (lambda p: (p / "gt.txt").write_text('w.png, "x"') and listed(p), errors.DataNotFoundError, "names w.png"),
}  # fmt: skip


def write_npz(root: Path, **parts):
    x, y = np.zeros((6, 4, 4)), np.arange(6)
    np.savez(root / "x.npz", **({"train_x": x, "train_y": y, "test_x": x, "test_y": y} | parts))
    return load_dataset(str(root / "x.npz"))


def write_mnist(root: Path, raw: bytes):
    (root / "mnist").mkdir()
    (root / "mnist" / "train-images-idx3-ubyte").write_bytes(raw)
    return load_dataset("mnist", root)


def write_tags(root: Path, xml: str):
    for part in ("train", "test"):
        (root / "icdar" / part).mkdir(parents=True)
        (root / "icdar" / part / "char.xml").write_text(xml)
        Image.new("L", (9, 14)).save(root / "icdar" / part / "1.png")
    return load_dataset("icdar", root)


def write_broken(root: Path):
    write_folder(root, {"train": ["a"], "test": ["a"]})
    (root / "train" / "a" / "0.png").write_bytes(b"nothing")
    return load_dataset(str(root))


@pytest.mark.parametrize("case", BAD)
def test_bad_data_gets_one_clear_line(case, tmp_path):
    make, error, message = BAD[case]
    with pytest.raises(error, match=message) as caught:
        make(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_text_is_predicted_character_by_character(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "tinyshakespeare.txt").write_text("abcd" * 2000)
    data = load_dataset("tiny-shakespeare", tmp_path, size=8)
    assert data.train_x.shape == data.train_y.shape == (900, 8)  # 7,999 characters have a next one: 999 windows
    assert torch.equal(data.train_x[:, 1:], data.train_y[:, :-1])
    assert data.train_y[0, -1] == data.train_x[1, 0]
    assert len(data.test_x) == 99
    recipe = (
        'task = "tiny-shakespeare"\nsize = 8\nmodel = "gpt"\ndepth = 1\nheads = 2\nwidths = [16]\nepochs = 6\nlr = 1e-2\nparams = 0.6\n'
    )
    Path("own.toml").write_text(recipe)
    main(["train", "own.toml", "--data", ".", "--no-times", "--json", "--threads", "1"])
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    assert metrics["accuracy"] == 1.0  # each letter says the next one
    assert metrics["bits"] < 0.1


def test_a_text_of_ones_own_is_named_by_its_path(tmp_path):
    text = "".join("aé☺b"[i] for i in RNG.integers(0, 4, 8001))
    (tmp_path / "own.txt").write_text(text, encoding="utf-8")
    data = load_dataset(str(tmp_path / "own.txt"), size=8)
    assert data.classes == 4
    assert (len(data.train_x), len(data.test_x)) == (900, 100)  # the last tenth of a thousand windows
    numbers = ["abé☺".index(letter) for letter in text]  # in the order of their code points
    assert data.train_x.flatten().tolist() == numbers[:7200]
    assert data.test_y.flatten().tolist() == numbers[7201:]


def test_a_text_that_is_too_short_is_refused(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "tinyshakespeare.txt").write_text("abc" * 30)
    with pytest.raises(errors.InvalidValueError, match="90 characters are too few for ten windows of 32"):
        load_dataset("tiny-shakespeare", tmp_path)


@pytest.mark.parametrize("alike", [1, 4])
def test_neighbours_from_one_source_are_held_out_together(alike):
    x = torch.arange(42.0).view(-1, 1, 1, 1)
    data = Dataset("own", x, x.flatten().long(), x, x.flatten().long(), 42, alike=alike)
    held = data.validation(0.3)
    test, train = held.test_y.tolist(), held.train_y.tolist()
    assert sorted(test + train) == list(range(42))
    assert {i // alike for i in test}.isdisjoint(i // alike for i in train)
    assert len(test) == pytest.approx(0.3 * 42, abs=alike)
    assert held.test_x.flatten().tolist() == test
    assert sorted(test) != test  # at random
    assert data.validation(0.3, seed=1).test_y.tolist() != test


def test_passages_of_a_text_are_held_out_whole(tmp_path):
    text = "".join(chr(0x4E00 + i) for i in range(4001))  # each character once: they say where they stood
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    starts = load_dataset(str(tmp_path / "text.txt"), size=8).validation(0.15).test_x[:, 0].sort().values
    assert len(starts) == pytest.approx(0.15 * 450, abs=22)
    assert int((starts.diff() > 8).sum()) < 3  # of 66 windows
