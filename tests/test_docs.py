"""README and docs tell the truth: their Python blocks run, their commands exist, their numbers come from result files."""

import contextlib
import io
import json
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from laconic.cli import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)


def blocks(page: Path, language: str) -> list[str]:
    return [body for found, body in FENCE.findall(page.read_text()) if found == language]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_the_python_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch, recwarn):  # which puts the filters back
    if page.name in ("trainers.md", "deploy.md"):  # their own packages warn of each other
        warnings.simplefilter("ignore")
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for body in blocks(page, "python"):
        exec(compile(body, page.name, "exec"), namespace)


def test_the_quick_start_is_at_most_thirty_lines():
    code = blocks(ROOT / "README.md", "python")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 30


def test_commands_in_the_readme_exist():
    text = "\n".join(blocks(ROOT / "README.md", "sh"))
    targets = set(re.findall(r"^make (\w+)", text, re.M))
    assert targets
    assert all(re.search(rf"^{t}:", (ROOT / "Makefile").read_text(), re.M) for t in targets)
    used = set(re.findall(r"^laconic (\w+)", text, re.M))
    assert used
    assert used <= COMMANDS.keys()


def test_every_picture_that_a_page_shows_exists():
    pictures = [(page, name) for page in PAGES for name in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text())]
    assert pictures
    missing = [f"{page.name}: {name}" for page, name in pictures if "://" not in name and not (page.parent / name).is_file()]
    assert missing == []


NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


@pytest.fixture
def experiment(monkeypatch):
    """Runs a script of the experiments as its own process would: by its file, with these arguments; returns its exit status."""
    import matplotlib as mpl

    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT / "experiments")
    before = set(sys.modules)

    def start(name: str, *arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", [f"experiments/{name}", *arguments])
        try:
            runpy.run_path(f"experiments/{name}", run_name="__main__")
        except SystemExit as stopped:
            return int(stopped.code or 0)
        return 0

    with mpl.rc_context():
        yield start
    for name in set(sys.modules) - before:
        if str(ROOT / "experiments") in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_drawn_pictures_are_up_to_date(tmp_path, experiment):
    """Up to a thousandth of a point, which rounding elsewhere may move."""
    assert experiment("plots.py", "--out", str(tmp_path)) == 0
    drawn = {path.name: path.read_text() for path in tmp_path.glob("*.svg")}
    assert drawn.keys() == {path.name for path in (ROOT / "docs" / "images").glob("*.svg")}
    for name, text in drawn.items():
        committed = (ROOT / "docs" / "images" / name).read_text()
        assert re.sub(r'"[^"]*"', "", text) == re.sub(r'"[^"]*"', "", committed), name  # labels
        numbers = [[float(x) for x in NUMBER.findall(" ".join(re.findall(r' (?:d|x|y)="([^"]*)"', t)))] for t in (text, committed)]
        assert numbers[0] == pytest.approx(numbers[1], abs=1e-3), name


def test_the_p_of_a_table_are_corrected_for_their_number(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    holm = runpy.run_path(str(ROOT / "experiments" / "render.py"))["holm"]
    assert holm({"a": 0.02, "b": 0.9, "c": 0.001, "d": 0.025}) == pytest.approx({"c": 0.004, "a": 0.06, "d": 0.06, "b": 0.9})


def test_rendered_tables_are_up_to_date(experiment):
    assert experiment("render.py", "--check") == 0


REBUILD = """
import sys
sys.modules["laconic"] = None  # `import laconic` fails from here on
try:
    import laconic
except ImportError:
    pass
else:
    raise SystemExit("laconic could be imported")
import torch
from torch import nn
torch.set_num_threads({threads})  # the same sums in the same order
{loader}
{model}
model = rebuild("compact", Net()).eval()
torch.testing.assert_close(model(torch.load("x.pt")), torch.load("y.pt"), rtol=0, atol=0)
print("rebuilt")
"""

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.stem = nn.Sequential(nn.Conv2d(12, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32), nn.ReLU())
        self.conv = nn.Conv2d(32, 64, 3, padding=2, dilation=2, groups=4, bias=False)
        self.few = nn.Conv2d(64, 48, 3, padding=1)
        self.head = nn.Linear(48, 60)
        self.to(torch.DTYPE)

    def forward(self, x):
        return self.head(self.few(self.conv(self.stem(self.first(x)))).mean((2, 3)))
"""


def in_a_process(folder: Path, script: str, monkeypatch) -> None:
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "rebuilt", done.stderr


def in_this_process(folder: Path, script: str, monkeypatch) -> None:
    """As there, without the seconds that it takes to import PyTorch, or Transformers."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "laconic"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.chdir(folder)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()) as shown:
        warnings.simplefilter("ignore", ResourceWarning)  # a file that it leaves to the interpreter to close
        exec(script, {"__name__": "rebuilding"})
    assert shown.getvalue().strip() == "rebuilt"


def rebuilt(folder: Path, model: str, monkeypatch, run=in_this_process) -> None:
    """The saved model in `compact` gives `y.pt` for `x.pt`, rebuilt where laconic cannot be imported."""
    import torch

    (loader,) = blocks(ROOT / "docs" / "rebuild.md", "python")
    assert len([line for line in loader.splitlines() if line.strip()]) <= 30
    run(folder, REBUILD.format(loader=loader, model=model, threads=torch.get_num_threads()), monkeypatch)


@pytest.mark.parametrize(("dtype", "run"), [("float32", in_a_process), ("float64", in_this_process)], ids=["float32", "float64"])
def test_the_example_rebuilds_a_saved_model_where_laconic_cannot_be_imported(tmp_path, dtype, run, monkeypatch):
    import torch

    import laconic
    from laconic.graph import find_groups
    from laconic.surgery.channels import slim

    namespace: dict = {}
    exec(code := MODEL.replace("DTYPE", dtype), namespace)
    model, x = namespace["Net"]().eval(), torch.randn(2, 3, 9, 9, dtype=getattr(torch, dtype))
    few = model.few.weight.data[:, :3]  # three directions are read: the pair is cut again
    model.few.weight.data = torch.einsum("ojkl,ij->oikl", few, torch.randn(64, 3, dtype=x.dtype)).contiguous()
    groups, _ = find_groups(model, (x,))
    slim(model, groups, {"first": [0, 2, *range(4, 12)], "stem.0": [1, 2]})
    report = laconic.compress(model, laconic.LowRank(), budget=laconic.Budget(params=0.4), example_inputs=(x,))
    assert {layer.kind for layer in report.layers if layer.rank} >= {"Conv2d", "Linear"}
    assert {layer.name for layer in report.layers if layer.inputs} == {"few"}
    record = json.loads((laconic.save(model, tmp_path / "compact") / "laconic.json").read_text())
    assert {s["names"][0] for s in record["slims"]} == {"first", "stem.0", "stem.1", "conv", "few"}
    torch.save(x, tmp_path / "x.pt")
    torch.save(model(x).detach(), tmp_path / "y.pt")
    rebuilt(tmp_path, code, monkeypatch, run)


GPT2 = """
from transformers import GPT2Config, GPT2LMHeadModel

class Net(GPT2LMHeadModel):
    def __init__(self):
        super().__init__(GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=40, n_positions=16, use_cache=False))

    def forward(self, ids):
        return super().forward(ids).logits
"""


def test_the_example_rebuilds_a_tied_language_model_of_transformers(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    import torch

    import laconic
    from laconic.graph import find_groups
    from laconic.surgery.channels import slim

    namespace: dict = {}
    exec(GPT2, namespace)
    model, x = namespace["Net"]().eval(), torch.randint(0, 40, (2, 7))
    groups, _ = find_groups(model, (x,))
    slim(model, groups, {"transformer.h.0.mlp.c_fc": list(range(100)), "transformer.h.0.attn.c_attn": [0, 2, 3]})
    report = laconic.compress(model, laconic.LowRank(), budget=laconic.Budget(params=0.7), example_inputs=(x,))
    assert {layer.kind for layer in report.layers if layer.rank} >= {"Conv1D"}
    record = json.loads((laconic.save(model, tmp_path / "compact") / "laconic.json").read_text())
    assert record["aliases"]
    torch.save(x, tmp_path / "x.pt")
    torch.save(model(x).detach(), tmp_path / "y.pt")
    rebuilt(tmp_path, GPT2, monkeypatch)
