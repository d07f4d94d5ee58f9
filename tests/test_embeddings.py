"""`LowRank(embeddings=True)`: a table of r columns, then a linear layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import laconic
from laconic.compaction import surgery_error
from laconic.matricize import unfoldings
from laconic.measure import count_macs
from laconic.plan import make_plan
from laconic.report import render
from laconic.surgery.factorize import factorize, narrow, product

TABLES = laconic.LowRank(embeddings=True)


class Words(nn.Module):
    """The mean of the words' vectors through a small perceptron: classes are those of the first word's number."""

    def __init__(self, entries: int = 400, width: int = 32, **options: object) -> None:
        super().__init__()
        self.embed = nn.Embedding(entries, width, **options)  # type: ignore[arg-type]
        self.hidden, self.head = nn.Linear(width, 24), nn.Linear(24, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.hidden(self.embed(tokens).mean(1)).relu())


def batch(seed: int, entries: int = 400) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(entries, (64, 3), generator=torch.Generator().manual_seed(seed))
    return tokens, (tokens % 4).mode(1).values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("entries", "width"), [(50, 12), (7, 30)])
def test_pair_is_the_best_approximation(entries: int, width: int, dtype: torch.dtype) -> None:
    table = nn.Embedding(entries, width, padding_idx=2, dtype=dtype)
    (unfolding,) = unfoldings(table, embeddings=True)
    assert unfoldings(table) == []
    u, s, vh = np.linalg.svd(table.weight.detach().double().numpy(), full_matrices=False)
    pair = factorize(table, unfolding, 5)
    torch.testing.assert_close(
        product(pair, unfolding), torch.from_numpy((u[:, :5] * s[:5]) @ vh[:5]), rtol=0, atol=2e3 * torch.finfo(dtype).eps
    )
    assert [type(layer) for layer in pair] == [nn.Embedding, nn.Linear]
    assert pair[0].padding_idx == 2
    torch.testing.assert_close(pair(torch.arange(entries)), product(pair, unfolding).to(dtype), rtol=0, atol=2e3 * torch.finfo(dtype).eps)
    again = narrow(pair, unfolding, 3)
    assert (again[0].num_embeddings, again[0].embedding_dim, again[1].in_features, again[1].out_features) == (entries, 3, 3, width)
    torch.testing.assert_close(
        product(again, unfolding), torch.from_numpy((u[:, :3] * s[:3]) @ vh[:3]), rtol=0, atol=2e3 * torch.finfo(dtype).eps
    )


def test_error_of_surgery_sees_a_wrong_entry() -> None:
    model = Words()
    site = make_plan(model, [TABLES]).sites[0]
    pair = site.structure.cut(site, 8)[0]
    assert surgery_error(site, pair) < 1e-5
    with torch.no_grad():
        pair[0].weight[-1] += 0.1
    assert surgery_error(site, pair) > 1e-3


def test_only_where_asked_for() -> None:
    left = {weight.name: weight.reason for weight in make_plan(Words(), [laconic.LowRank()]).left_alone}
    assert left["embed.weight"] == "Embedding is cut by LowRank(embeddings=True)"
    assert [site.name for site in make_plan(Words(), [TABLES]).sites] == ["embed.weight", "hidden.weight", "head.weight"]


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}])
def test_what_acts_on_single_rows_is_left_alone(options: dict) -> None:
    (left,) = make_plan(Words(**options), [TABLES]).left_alone
    assert left.reason == "Embedding with max_norm, scale_grad_by_freq or sparse is not supported"


def test_tied_to_the_output_is_left_alone() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.body, self.out = nn.Embedding(40, 16), nn.Linear(16, 16), nn.Linear(16, 40, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.out(self.body(self.embed(tokens)))

    (left,) = make_plan(Tied(), [TABLES]).left_alone
    assert left.reason == "tied between an embedding and a layer"


@pytest.mark.parametrize(
    ("make", "steps"),
    [
        (lambda p: torch.optim.AdamW(p, lr=0.01), 600),
        pytest.param(lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9), 1500, marks=pytest.mark.slow),
    ],
    ids=["AdamW", "SGD"],
)
def test_trained_cut_saved_loaded(tmp_path: Path, make: Callable, steps: int) -> None:
    torch.manual_seed(0)
    model = Words()
    optimizer = make(model.parameters())
    compressor = laconic.Compressor(
        model,
        optimizer,
        [laconic.LowRank(embeddings=True), laconic.Channels()],
        budget=laconic.Budget(params=0.3),
        total_steps=steps,
        example_inputs=(batch(0)[0],),
    )
    for step in range(steps):
        tokens, labels = batch(step)
        F.cross_entropy(model(tokens), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    report = compressor.compact()
    assert report.params_after <= 0.3 * report.params_before
    assert [type(layer) for layer in model.embed] == [nn.Embedding, nn.Linear]
    tokens, labels = batch(10_000)
    outputs = model.eval()(tokens)
    assert (outputs.argmax(-1) == labels).double().mean() > 0.9
    laconic.save(model, tmp_path / "words")
    again = laconic.load(tmp_path / "words", Words()).eval()
    assert torch.equal(again(tokens), outputs)


def test_an_embedding_is_the_only_way_to_some_budgets() -> None:
    model = Words()
    with pytest.raises(laconic.InfeasibleBudgetError, match=r"embed\.weight"):
        laconic.compress(copy.deepcopy(model), [laconic.LowRank()], laconic.Budget(params=0.3))
    report = laconic.compress(model, [TABLES], laconic.Budget(params=0.3))
    assert report.params_after <= 0.3 * report.params_before


def test_operations_are_counted() -> None:
    """A table costs none, its pair some: with a bound on operations alone it stays."""
    tokens = batch(0)[0]
    model = Words()
    before = copy.deepcopy(model)
    macs = count_macs(model, (tokens,))
    report = laconic.compress(model, [TABLES], laconic.Budget(params=0.4, max_macs=int(2.5 * macs)), example_inputs=(tokens,))
    assert isinstance(model.embed, nn.Sequential)
    assert report.macs_after == count_macs(model, (tokens,)) <= 2.5 * macs
    laconic.compress(before, [TABLES], laconic.Budget(macs=0.5), example_inputs=(tokens,))
    assert isinstance(before.embed, nn.Embedding)
    assert count_macs(before, (tokens,)) <= 0.5 * macs


def test_times(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LACONIC_CACHE", str(tmp_path))
    tokens = batch(0)[0]
    model = Words(width=128)
    report = laconic.compress(model, [TABLES], laconic.Budget(params=0.5), example_inputs=(tokens,), only_faster=True)
    assert report.params_after <= 0.5 * report.params_before


def test_a_cut_table_under_another_compressor() -> None:
    """Its pair keeps its width there, and may be cut further."""
    tokens, labels = batch(0)
    model = Words()
    laconic.compress(model, [TABLES], laconic.Budget(params=0.6))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    compressor = laconic.Compressor(model, optimizer, budget=laconic.Budget(params=0.9), total_steps=20, example_inputs=(tokens,))
    assert "embedding's pair" in compressor.plan.whole["embed"]
    for _ in range(20):
        F.cross_entropy(model(tokens), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    compressor.compact()
    assert model(tokens).isfinite().all()


def test_milliseconds_of_a_cut_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LACONIC_CACHE", str(tmp_path))
    model = nn.Sequential(nn.Embedding(4000, 64), nn.Flatten(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    entries = torch.randint(4000, (64, 8))
    report = laconic.compress(model, [TABLES], laconic.Budget(latency=1.0, params=0.3), example_inputs=(entries,))
    assert report.params_after <= 0.3 * report.params_before
    assert isinstance(model[0], nn.Sequential)


class Factors(nn.Module):
    """Of a matrix: it multiplies entries of two tables, which no counter of operations counts."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.columns = nn.Embedding(60, 16), nn.Embedding(40, 16)

    def forward(self, at: Tensor) -> Tensor:
        return (self.rows(at[:, 0]) * self.columns(at[:, 1])).sum(1)


def test_a_network_without_counted_operations() -> None:
    torch.manual_seed(0)
    at = torch.randint(40, (32, 2))

    def compressor(budget: laconic.Budget) -> tuple[Factors, torch.optim.Optimizer, laconic.Compressor]:
        optimizer = torch.optim.AdamW((model := Factors()).parameters(), lr=0.01)
        return model, optimizer, laconic.Compressor(model, optimizer, TABLES, budget=budget, total_steps=10, example_inputs=(at,))

    model, optimizer, made = compressor(laconic.Budget(params=0.5))
    assert made.plan.macs == count_macs(model, (at,)) == 0
    for _ in range(10):
        model(at).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    report = made.compact()
    assert report.params_after <= 0.5 * 100 * 16
    assert "MACs" in render(report, title="factors")
    with pytest.raises(laconic.InvalidValueError, match=r"Budget\(macs=\): .* has none that are counted; bound params="):
        compressor(laconic.Budget(macs=0.5))
