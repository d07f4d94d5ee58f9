"""Principal axes: what is turned computes what it did, and what stays of it holds most."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import laconic
from laconic import axes
from laconic.axes import covariances, head_axes, stream_axes
from laconic.graph import across_the_mean, find_groups, free_bases, gap, outputs, random_rotation
from laconic.models.transformers import GPT, ViT
from laconic.plan import make_plan
from laconic.slimming import importances_of, slim_neurons
from laconic.surgery.basis import Heads, Stream, flatten, turn_heads, turn_stream

from .models import assert_same, snapshot

EVEN = laconic.Channels(even=True)


def tokens(count: int = 4) -> torch.Tensor:
    return torch.randint(0, 20, (count, 10), generator=torch.Generator().manual_seed(0))


def shaken(model: nn.Module) -> nn.Module:
    """No parameter is a zero or a one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model.eval()


def gpt(width: int = 32, heads: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return shaken(GPT(20, context=10, layers=2, width=width, heads=heads))


def vit() -> nn.Module:
    torch.manual_seed(0)
    return shaken(ViT((3, 8, 8), 5, layers=2, width=24, heads=3))


def llama() -> nn.Module:
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return shaken(hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=20, **sizes)))


def unfused() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(24, 3, 32, dropout=0.0, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(24), enable_nested_tensor=False)
    return shaken(nn.Sequential(laconic.unfuse(nn.Sequential(nn.Linear(5, 24), encoder)), nn.Linear(24, 3)))


MODELS = {
    "GPT": (gpt, (tokens(),), 3),
    "ViT": (vit, (torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)),), 3),
    "Llama": (llama, (tokens(),), 1),
    "unfused": (unfused, (torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0)),), 3),
}


def free(model: nn.Module, inputs: tuple):
    groups, _ = find_groups(model, inputs)
    return free_bases(model, groups, inputs)


def turn_all(model: nn.Module, inputs: tuple, optimizers=()) -> int:
    """Every group by a random matrix; how many there are."""
    groups, bases, _ = free(model, inputs)
    for group in groups:
        basis = bases.get(group.name)
        if isinstance(basis, Stream):
            turn_stream(model, group, basis, random_rotation(group.units, basis.centred, 3), optimizers)
        elif isinstance(basis, Heads):
            count = basis.query.index.shape[1]
            noise = torch.randn(2, count, group.units, group.units, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
            some, other = torch.eye(group.units) + 0.2 * noise
            turn_heads(model, group, basis, some, other, optimizers)
    return len(bases)


@pytest.mark.parametrize("name", MODELS)
def test_a_turned_model_computes_what_it_did(name):
    build, inputs, expected = MODELS[name]
    model = build().double()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    before = outputs(model, inputs)
    weights = [p.detach().clone() for p in model.parameters()]
    assert turn_all(model, inputs) == expected
    assert sum(gap(a, b.detach()) > 0.01 for a, b in zip(weights, model.parameters(), strict=True)) > len(weights) // 2
    assert max(map(gap, before, outputs(model, inputs))) < (1e-4 if name == "Llama" else 1e-9)  # whose norms compute in 32 bits


@pytest.mark.parametrize("name", ["GPT", "ViT"])
def test_gradients_and_their_moments_turn_as_the_weights_do(name):
    """The first moments, set to the gradient, are the gradient of the turned model; the second moments stay above zero."""
    build, inputs, _ = MODELS[name]
    model = build().double()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.0, 0.999), weight_decay=0.0)

    def gradients() -> None:
        optimizer.zero_grad()
        model(*inputs).square().mean().backward()

    gradients()
    optimizer.step()  # with betas of 0 the first moment is the gradient
    turn_all(model, inputs, [optimizer])
    kept = {n: p.grad.clone() for n, p in model.named_parameters()}
    gradients()
    scale = max(float(p.grad.abs().max()) for p in model.parameters())
    for n, p in model.named_parameters():
        if "norm" in n and n.endswith("weight"):
            assert (optimizer.state[p]["exp_avg"] == 0).all()  # of one number for all channels
            continue
        assert gap(optimizer.state[p]["exp_avg"], p.grad) <= 1e-9 * scale, n
        assert gap(kept[n], p.grad) <= 1e-9 * scale, n
        assert (optimizer.state[p]["exp_avg_sq"] >= 0).all()


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("keep", [2, 5, 11])
def test_the_rows_that_stay_hold_most(centred, keep):
    generator = torch.Generator().manual_seed(keep)
    x = torch.randn(400, 12, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, 12, dtype=torch.float64)
    x = x @ random_rotation(12, False, 5).T
    x = x - x.mean(1, keepdim=True) if centred else x
    gram = x.T @ x

    def held(rotation: torch.Tensor) -> float:
        """What a norm sees of the channels that are left."""
        y = x @ rotation[:keep].T
        y = y - y.mean(1, keepdim=True) if centred else y
        return float(y.square().sum() / x.square().sum())

    rotation, share = stream_axes(gram, keep, centred)
    identity = torch.eye(12, dtype=torch.float64)
    assert gap(rotation @ rotation.T, identity) < 1e-12
    if centred:
        assert gap(rotation.sum(1), torch.ones(12, dtype=torch.float64)) < 1e-12
    best = torch.linalg.eigvalsh(gram).flip(0)[: keep - centred].sum() / gram.trace()
    assert held(rotation) == pytest.approx(float(best), rel=1e-9)
    assert share[:keep].sum() == pytest.approx(float(best), rel=1e-9)
    assert share.sum() == pytest.approx(1)
    assert all(held(random_rotation(12, centred, seed)) < held(rotation) for seed in range(20))


def test_across_the_mean_is_orthonormal():
    basis = across_the_mean(7)
    assert gap(basis.T @ basis, torch.eye(6, dtype=torch.float64)) < 1e-12
    assert float(basis.sum(0).abs().max()) < 1e-12


def test_places_that_stay_make_the_least_error_of_products_and_of_values():
    """Eckart and Young in the metric of what runs through: what is lost is the sum of the squares of the singular values that go."""
    model, inputs = gpt().double(), (tokens(64),)
    plan = make_plan(model, [EVEN], inputs)
    group = next(g for g in plan.neurons if isinstance(g.basis, Heads))
    sums = covariances(model, plan.neurons, [inputs])
    keep = 3
    queries, values, share = head_axes(model, group, sums, keep)
    assert share.sum() == pytest.approx(1)
    assert (np.diff(share) <= 1e-12).all()
    inner = torch.eye(8, dtype=torch.float64)
    inner[keep:] = 0
    out = model.blocks[0].attention_back.weight.detach()
    for h in range(4):
        gram = {side: sums[f"{group.name} {side}"][h] / sums[f"{group.name} {side}"][h, -1, -1] for side in ("query", "key", "value")}
        query, key = gram["query"][:-1, :-1], gram["key"][:-1, :-1]
        lost = torch.eye(8, dtype=torch.float64) - queries[h].T @ inner @ torch.linalg.inv(queries[h]).T
        error = torch.trace(lost.T @ query @ lost @ key)
        root = torch.linalg.svdvals(torch.linalg.cholesky(query).T @ torch.linalg.cholesky(key))
        assert float(error) == pytest.approx(float(root[keep:].square().sum()), rel=1e-3)
        mean = gram["value"][:-1, -1]
        spread = gram["value"][:-1, :-1] - torch.outer(mean, mean)
        lost = out[:, 8 * h : 8 * h + 8] @ (torch.eye(8, dtype=torch.float64) - torch.linalg.inv(values[h]) @ inner @ values[h])
        sizes = torch.linalg.svdvals(out[:, 8 * h : 8 * h + 8] @ torch.linalg.cholesky(spread))
        assert float(torch.trace(lost @ spread @ lost.T)) == pytest.approx(float(sizes[keep:].square().sum()), rel=1e-3)


def narrow_in_disguise() -> nn.Module:
    """A GPT of width 32 whose stream has 15 directions, and whose heads of 8 places have 4; its hidden layers are as they are."""
    model = gpt()
    generator = torch.Generator().manual_seed(7)
    basis = torch.linalg.qr(across_the_mean(32) @ torch.randn(31, 15, generator=generator, dtype=torch.float64))[0]
    project = (basis @ basis.T).float()
    with torch.no_grad():
        for table in (model.token, model.position):
            table.weight.copy_(table.weight @ project)
        for block in model.blocks:
            for layer in (block.attention_back, block.back):
                layer.weight.copy_(project @ layer.weight)
                layer.bias.copy_(project @ layer.bias)
            for layer in (block.query, block.value):
                for head in range(4):
                    half = torch.linalg.qr(torch.randn(8, 4, generator=generator))[0]
                    rows = slice(8 * head, 8 * head + 8)
                    layer.weight[rows] = half @ half.T @ layer.weight[rows]
                    layer.bias[rows] = half @ half.T @ layer.bias[rows]
        model.norm.bias.zero_()  # the head has no bias to take it over
        for norm in (model.norm, *(n for b in model.blocks for n in b.norms)):
            norm.eps = 1e-12  # which would be felt: the variance is over fewer channels
    return model


def test_a_network_that_is_narrower_than_it_looks_is_found():
    model, inputs = narrow_in_disguise(), (tokens(64),)
    before = outputs(model, inputs)
    plain = copy.deepcopy(model)
    structure = laconic.Channels(even=True, exclude="*up*")
    report = laconic.compress(model, structure, laconic.Budget(params=0.44), example_inputs=(tokens(),), calibration=[inputs])
    widths = {g.name: g.kept for g in report.groups}
    assert widths["token"] == 16
    assert {v for k, v in widths.items() if k.endswith("query")} == {4}
    scale = float(before[0].abs().max())
    assert gap(before[0], outputs(model, inputs)[0]) < 1e-3 * scale
    assert any("turned to principal axes before channels went" in note for note in report.notes)
    structure = laconic.Channels(even=True, exclude="*up*", principal=False)
    laconic.compress(plain, structure, laconic.Budget(params=0.44), example_inputs=(tokens(),), calibration=[inputs])
    assert gap(before[0], outputs(plain, inputs)[0]) > 0.1 * scale


def test_a_cut_without_a_sight_of_data_takes_channels_and_whole_heads_and_says_so():
    one, other = gpt(), gpt()
    report = laconic.compress(one, EVEN, laconic.Budget(params=0.5), example_inputs=(tokens(),))
    assert any("heads as a whole: principal axes would need batches of inputs, as calibration=" in note for note in report.notes)
    laconic.compress(other, laconic.Channels(even=True, principal=False), laconic.Budget(params=0.5), example_inputs=(tokens(),))
    assert_same(snapshot(one), snapshot(other))


def tied(spread: float) -> nn.Module:
    model = gpt()
    model.head.weight = model.token.weight
    with torch.no_grad():
        model.norm.weight.copy_(1.5 + spread * torch.randn(32, generator=torch.Generator().manual_seed(3)))
    return model


def test_a_table_that_is_the_output_layer_too_turns_as_one_once_the_gains_before_it_are_one_number():
    model, inputs = tied(0.3).double(), (tokens(64),)
    group = next(g for g in make_plan(model, [EVEN], inputs).neurons if g.name == "token")
    assert group.basis.flat == ("norm",)
    dense = outputs(model, inputs)
    flatten(model, group.basis)
    assert (model.norm.weight == model.norm.weight[0]).all()
    assert model.norm.weight[0].item() == pytest.approx(tied(0.3).norm.weight.square().mean().sqrt().item())
    flat = outputs(model, inputs)
    assert gap(dense[0], flat[0]) > 0.01
    table = model.token.weight.detach().clone()
    turn_all(model, inputs)
    assert model.head.weight is model.token.weight
    assert gap(table, model.token.weight.detach()) > 0.1
    assert gap(flat[0], outputs(model, inputs)[0]) < 1e-9


def test_a_tied_head_may_read_the_last_norm_times_a_number():
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}
    model = shaken(hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=20, **sizes)))
    plan = make_plan(model, [EVEN], {"input_ids": tokens(), "decoder_input_ids": tokens()})
    assert next(g for g in plan.neurons if g.name == "shared").basis.flat == ("decoder.final_layer_norm",)


@pytest.mark.parametrize(("spread", "turned"), [(0.05, True), (0.8, False)])
def test_where_one_gain_changes_too_much_a_tied_table_keeps_its_axes_and_either_is_said(spread, turned):
    model = tied(spread)
    report = laconic.compress(model, EVEN, laconic.Budget(params=0.5), example_inputs=(tokens(),), calibration=[tokens(64)])
    assert model.head.weight is model.token.weight
    assert any(note.startswith("norm: one gain for all channels, since a tied head reads them") for note in report.notes) is turned
    assert any("the stream before norm keeps its axes: a tied head reads it" in note for note in report.notes) is not turned
    assert any("turned to principal axes" in note and "token" in note for note in report.notes) is turned
    assert any("turned to principal axes" in note and "query" in note for note in report.notes)  # heads are, either way
    gains = model.norm.weight.detach()
    assert (gap(gains, gains[:1].expand_as(gains)) == 0) is turned


class Written(nn.Module):
    """Attention whose code has the size of a head, and the number that products are multiplied by: as attributes, or as they are."""

    def __init__(self, attributes=True):
        super().__init__()
        self.embed, self.norm = nn.Linear(5, 32), nn.LayerNorm(32)
        self.query, self.key, self.value = (nn.Linear(32, 32) for _ in range(3))
        self.back, self.head = nn.Linear(32, 32), nn.Linear(32, 3)
        if attributes:
            self.size, self.scaling, self.layers = 8, 8**-0.5, 2
            self.num_heads, self.attention_dropout = 8, 8**-0.5  # which have nothing to do with it
        self.attributes = attributes

    def forward(self, x):
        x = self.embed(x)
        size, scaling = (self.size, self.scaling) if self.attributes else (8, 8**-0.5)
        y = self.norm(x)
        q, k, v = (layer(y).unflatten(-1, (-1, size)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        mixed = (q @ k.mT * scaling).softmax(-1) @ v
        return self.head(x + self.back(mixed.transpose(1, 2).flatten(2)))


def test_the_size_of_a_head_and_the_scaling_of_products_follow_where_they_are_attributes(tmp_path):
    torch.manual_seed(0)
    model, fresh = Written(), Written()
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        model.query.weight *= 4  # attention that is far from even
    x = torch.randn(16, 9, 5)
    plan = make_plan(model, [EVEN], (x,))
    group = next(g for g in plan.neurons if g.name == "query")
    assert isinstance(group.basis, Heads)
    assert {count.name: count.dense for count in group.group.counts} == {"size": 8, "scaling": 8**-0.5}
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for layer in (twin.query, twin.key, twin.value):
            for places in (layer.weight.view(4, 8, 32), layer.bias.view(4, 8)):
                places[:, 3:] = 0
    slim_neurons(model, plan, importances_of(plan, {}), {"query": [0, 1, 2]}, example_inputs=(x,))
    torch.testing.assert_close(model(x), twin(x))
    assert (model.size, model.layers, model.num_heads, model.attention_dropout) == (3, 2, 8, 8**-0.5)
    assert model.scaling == pytest.approx(3**-0.5)
    laconic.save(model, tmp_path / "cut")
    again = laconic.load(tmp_path / "cut", fresh)
    assert again.scaling == model.scaling
    assert torch.equal(again(x), model(x))


def test_heads_get_narrower_again_in_a_second_cut():
    torch.manual_seed(0)
    model, x = Written(), torch.randn(64, 9, 5)
    kept = []
    for _ in range(2):
        report = laconic.compress(model, EVEN, laconic.Budget(params=0.6), example_inputs=(x[:2],), calibration=[x])
        kept.append(next(g.kept for g in report.groups if g.name == "query"))
    assert 8 > kept[0] > kept[1] == model.size
    assert model.query.out_features == 4 * model.size


def test_where_a_turn_fails_the_optimizer_has_its_moments_and_the_model_its_gradients(monkeypatch):
    model, inputs = tied(0.05), (tokens(64),)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model(*inputs).square().mean().backward()
    optimizer.step()
    plan = make_plan(model, [EVEN], inputs)
    before, gradients = copy.deepcopy(snapshot(model, optimizer)), [p.grad.clone() for p in model.parameters()]
    monkeypatch.setattr(axes, "TOLERANCE", -1.0)
    kept = {g.name: g.kept[: len(g.kept) // 2].tolist() for g in plan.neurons if g.basis is not None}
    done = axes.turn(model, plan.neurons, kept, covariances(model, plan.neurons, [inputs]), {}, inputs, [optimizer])
    assert done.failed
    assert_same(snapshot(model, optimizer), before)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


def test_a_basis_is_free_in_16_bits_too():
    plan = make_plan(gpt().bfloat16(), [EVEN], (tokens(),))
    assert [type(g.basis) for g in plan.neurons if g.norms or g.group.queries] == [Stream, Heads, Heads]


def test_heads_whose_number_of_places_is_written_down_go_as_a_whole():
    plan = make_plan(Written(attributes=False), [EVEN], (torch.randn(2, 9, 5),))
    assert {g.group.units for g in plan.neurons if g.of_heads} == {4}
    assert any("query" in note and "heads as a whole" in note for note in plan.notes)


def test_heads_that_get_narrower_keep_a_multiple_of_their_places():
    torch.manual_seed(0)
    model = GPT(20, context=12, layers=2, width=128, heads=4)
    structure = laconic.Channels(even=True, multiple=8)
    report = laconic.compress(model, structure, laconic.Budget(params=0.3), example_inputs=(tokens(),), calibration=[tokens(64)])
    kept = [g.kept for g in report.groups if g.name.endswith("query")]
    assert kept == [16, 16]  # four heads of 18 would have a multiple of 8 channels
    assert {model.token.weight.shape[1] % 8, model.blocks[0].up.out_features % 8} == {0}


class Rotary(nn.Module):
    """Queries and keys are turned by angles of their own after the layers: their basis is not free."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Linear(5, 16), nn.LayerNorm(16)
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
        self.back, self.head = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        x = self.embed(x)
        y = self.norm(x)
        q, k, v = (layer(y).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        angle = torch.linspace(0, 1, x.shape[1])[:, None]
        q, k = (torch.cat([z[..., 1::2] * angle.sin(), z[..., ::2] * angle.cos()], -1) for z in (q, k))
        return self.head(x + self.back(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))


def test_turned_queries_are_tried_not_assumed():
    torch.manual_seed(0)
    model, inputs = shaken(Rotary()), (torch.randn(2, 6, 5),)
    _, bases, reasons = free(model, inputs)
    assert "query" not in bases
    assert "change the outputs" in reasons.get("query", "change the outputs")
    assert isinstance(bases["embed"], Stream)


def train(model: nn.Module, steps: int = 60, **options):
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    x = tokens(16)
    compressor = laconic.Compressor(
        model, optimizer, budget=laconic.Budget(params=0.3), total_steps=steps, example_inputs=(x[:1],), **options
    )
    for _ in range(steps):
        F.cross_entropy(model(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield compressor


def test_a_run_turns_cuts_at_once_and_fits(tmp_path):
    model = gpt()
    steps = [(c, sum(p.numel() for p in model.parameters())) for c in train(model)]
    sizes = [size for _, size in steps]
    assert len(set(sizes)) == 2
    assert sizes.index(sizes[-1]) == 1  # after the second of sixty steps, the first that can be seen
    report = steps[-1][0].compact()
    assert any("turned to principal axes" in note for note in report.notes)
    assert any("layers were fitted" in note for note in report.notes)
    assert {b.heads for b in model.blocks} == {4}
    laconic.save(model, tmp_path / "compact", report=report)
    loaded = laconic.load(tmp_path / "compact", gpt())
    assert gap(*(outputs(m, (tokens(),))[0] for m in (model, loaded))) == 0


def test_the_shortest_run_waits_until_it_has_seen_a_batch():
    *_, (compressor, _) = [(c, None) for c in train(gpt(), steps=3)]
    notes = compressor.compact().notes
    assert any("turned to principal axes" in note for note in notes)
    assert any("layers were fitted" in note for note in notes)


def test_a_run_whose_optimizers_take_turns_waits_until_it_has_seen_a_batch():
    """A round is done after the last of them, and only then is it known that the next batch is to be watched."""
    model, x = gpt().train(), tokens(16)
    matrices, rest = ([p for p in model.parameters() if (p.ndim > 1) is matrix] for matrix in (True, False))
    optimizers = [torch.optim.AdamW(some, lr=1e-3) for some in (matrices, rest)]
    compressor = laconic.Compressor(model, optimizers, budget=laconic.Budget(params=0.3), total_steps=100, example_inputs=(x[:1],))
    for step in range(100):
        F.cross_entropy(model(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten()).backward()
        for optimizer in optimizers[: 2 if step % 4 == 3 else 1]:
            optimizer.step()
            optimizer.zero_grad()
    notes = compressor.compact().notes
    assert any("turned to principal axes" in note for note in notes)
    assert not any("nothing was seen" in note for note in notes)


def test_a_model_that_a_turn_would_change_is_cut_as_it_is(monkeypatch):
    monkeypatch.setattr(axes, "TOLERANCE", -1.0)
    models = gpt(), gpt()
    options = {"example_inputs": (tokens(),), "calibration": [(tokens(16),)]}
    report = laconic.compress(models[0], EVEN, laconic.Budget(params=0.5), **options)
    assert any(note.startswith("channels keep their axes: turned to principal axes in ") for note in report.notes)
    kept = {g.name: g.kept for g in report.groups}
    assert kept["token"] < 32
    # Its table has columns of the table as it was.
    left = [column.tolist() for column in models[0].token.weight.T]
    assert all(column in [whole.tolist() for whole in models[1].token.weight.T] for column in left)


def test_a_state_that_cannot_be_turned_starts_anew_and_that_is_said():
    model = gpt().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x = tokens(16)
    compressor = laconic.Compressor(model, optimizer, budget=laconic.Budget(params=0.3), total_steps=60, example_inputs=(x[:1],))
    for step in range(60):
        F.cross_entropy(model(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten()).backward()
        optimizer.step()
        if step == 0:  # the cut is after the next one
            for p in model.parameters():
                optimizer.state[p]["riddle"] = torch.ones_like(p)
        optimizer.zero_grad()
    report = compressor.compact()
    assert any("token" in note and "could not be turned with the channels, and starts anew" in note for note in report.notes)


class Holds(GPT):
    compressor = None


def test_a_copy_made_while_a_batch_is_watched_goes_on():
    """The model holds its compressor, and is not whole yet when that is copied."""
    torch.manual_seed(0)
    model = Holds(20, context=10, layers=2, width=32, heads=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    x = tokens(16)
    model.compressor = laconic.Compressor(
        model, optimizer, budget=laconic.Budget(params=0.3), total_steps=60, example_inputs=(x[:1],), every=1
    )

    def step(m) -> None:
        F.cross_entropy(m(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten()).backward()
        m.compressor.optimizers[0].step()
        m.compressor.optimizers[0].zero_grad()

    step(model)
    twin = copy.deepcopy(model)
    for _ in range(59):
        step(twin)
    assert twin.compressor.compact().params_after <= 0.3 * sum(p.numel() for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in twin.modules())
