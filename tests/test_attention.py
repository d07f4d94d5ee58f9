"""`laconic.unfuse`: the same function, from layers that can be cut."""

from __future__ import annotations

import copy
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import laconic
from laconic.attention import Attention
from laconic.plan import make_plan
from laconic.widths import choose_shapes


def padding(batch: int = 2, keys: int = 7) -> Tensor:
    mask = torch.zeros(batch, keys, dtype=torch.bool)
    mask[1, -3:] = True
    return mask


def triangle(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).triu(1)


FORMS = {
    "plain": ({}, {}),
    "sequence first": ({"batch_first": False}, {}),
    "no bias": ({"bias": False}, {}),
    "other widths of key and value": ({"kdim": 6, "vdim": 10}, {}),
    "no weights": ({}, {"need_weights": False}),
    "each head's weights": ({}, {"average_attn_weights": False}),
    "padding": ({}, {"key_padding_mask": padding()}),
    "padding, sequence first, no weights": ({"batch_first": False}, {"key_padding_mask": padding(), "need_weights": False}),
    "float padding": ({}, {"key_padding_mask": torch.randn(2, 7)}),
    "mask": ({}, {"attn_mask": torch.randn(5, 7) > 0.5}),
    "float mask for each head": ({}, {"attn_mask": torch.randn(8, 5, 7), "need_weights": False}),
    "mask and padding": ({}, {"attn_mask": torch.randn(5, 7) > 1, "key_padding_mask": padding()}),
}  # fmt: skip


@pytest.mark.parametrize(("built", "called"), FORMS.values(), ids=FORMS.keys())
def test_same_outputs_weights_and_gradients(built: dict, called: dict) -> None:
    fused = nn.MultiheadAttention(12, 4, **{"batch_first": True, **built}).double()
    for parameter in fused.parameters():
        nn.init.normal_(parameter, std=0.5)
    plain = laconic.unfuse(copy.deepcopy(fused))
    assert isinstance(plain, Attention)
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in fused.parameters())
    inputs = [torch.randn(2, n, fused_width, dtype=torch.double) for n, fused_width in ((5, 12), (7, fused.kdim), (7, fused.vdim))]
    if not fused.batch_first:
        inputs = [x.transpose(0, 1) for x in inputs]
    called = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in called.items()}
    results, gradients = [], []
    for module in (fused, plain):
        given = [x.clone().requires_grad_() for x in inputs]
        results.append(module(*given, **called))
        results[-1][0].square().sum().backward()
        gradients.append([x.grad for x in given])
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(gradients[1], gradients[0])
    assert (results[1][1] is None) == (not called.get("need_weights", True))


@pytest.mark.parametrize("need_weights", [True, False])
def test_causal_and_single(need_weights: bool) -> None:
    fused = nn.MultiheadAttention(8, 2)
    plain = laconic.unfuse(copy.deepcopy(fused))
    x = torch.randn(6, 8)
    options = {"attn_mask": triangle(6), "is_causal": True, "need_weights": need_weights}
    torch.testing.assert_close(plain(x, x, x, **options), fused(x, x, x, **options))
    hidden = torch.tensor([False] * 4 + [True] * 2)
    torch.testing.assert_close(plain(x, x, x, hidden, **options), fused(x, x, x, hidden, **options))
    with pytest.raises(ValueError, match="give the mask"):
        plain(x, x, x, is_causal=True)


def test_dropout_only_in_training() -> None:
    plain = laconic.unfuse(nn.MultiheadAttention(8, 2, dropout=0.5))
    x = torch.randn(20, 8)
    for need_weights in (True, False):
        assert not torch.equal(plain.train()(x, x, x, need_weights=need_weights)[0], plain(x, x, x, need_weights=need_weights)[0])
        assert torch.equal(plain.eval()(x, x, x, need_weights=need_weights)[0], plain(x, x, x, need_weights=need_weights)[0])


def encoder(layers: int = 2, **options: object) -> nn.Module:
    return nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 4, 32, **{"batch_first": True, "dropout": 0.0, **options}), layers, enable_nested_tensor=not options
    )


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"batch_first": False}], ids=str)
def test_encoder_computes_the_same(options: dict, grad: bool, training: bool) -> None:
    """With a padding mask, without gradients, in evaluation: the fused kernel on nested tensors before."""
    fused = encoder(**options).train(training)
    plain = laconic.unfuse(copy.deepcopy(fused))
    x, mask = torch.randn(2, 7, 16), padding()
    given = x if fused.layers[0].self_attn.batch_first else x.transpose(0, 1)
    with torch.set_grad_enabled(grad):
        want, got = fused(given, src_key_padding_mask=mask), plain(given, src_key_padding_mask=mask)
    if not fused.layers[0].self_attn.batch_first:
        want, got = want.transpose(0, 1), got.transpose(0, 1)
    torch.testing.assert_close(got[~mask], want[~mask])
    torch.testing.assert_close(plain(given), fused(given))


def test_encoder_of_an_unfused_layer() -> None:
    layer = laconic.unfuse(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True))
    whole = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    with torch.no_grad():
        assert whole(torch.randn(2, 7, 16), src_key_padding_mask=padding()).isfinite().all()


def test_encoder_and_decoder() -> None:
    fused = nn.Transformer(16, 2, 1, 1, 24, dropout=0.0, batch_first=True).eval()
    plain = laconic.unfuse(copy.deepcopy(fused))
    source, target = torch.randn(2, 5, 16), torch.randn(2, 4, 16)
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    torch.testing.assert_close(
        plain(source, target, tgt_mask=mask, tgt_is_causal=True), fused(source, target, tgt_mask=mask, tgt_is_causal=True)
    )
    assert not any(isinstance(m, nn.MultiheadAttention) for m in plain.modules())


class Tagger(nn.Module):
    """A usual encoder: does a sequence begin with the token that comes most often?"""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(8, 32), nn.Parameter(0.1 * torch.randn(1, 9, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, **{"batch_first": True, "dropout": 0.0, **options})
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(32, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position
        return self.head(
            (self.encoder(x) if self.encoder.layers[0].self_attn.batch_first else self.encoder(x.transpose(0, 1)).transpose(0, 1))[:, 0]
        )


def batch(seed: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(8, (64, 9), generator=torch.Generator().manual_seed(seed))
    return tokens, tokens[:, 3]


def test_everything_is_taken() -> None:
    model = laconic.unfuse(Tagger())
    compressor = laconic.Compressor(
        model, torch.optim.AdamW(model.parameters()), budget=laconic.Budget(params=0.5), total_steps=10, example_inputs=(batch(0)[0],)
    )
    assert compressor.plan.left_alone == []
    groups = {neurons.name: neurons.group.units for neurons in compressor.plan.neurons}
    assert groups["embed"] == 32
    assert compressor.plan.whole.keys() == {"head"}
    for i in range(2):
        assert groups[f"encoder.layers.{i}.linear1"] == 64
        assert any(name.startswith(f"encoder.layers.{i}.self_attn.") and units == 8 for name, units in groups.items())


@pytest.mark.slow
def test_trained_cut_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = laconic.unfuse(Tagger())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    compressor = laconic.Compressor(model, optimizer, budget=laconic.Budget(params=0.3), total_steps=300, example_inputs=(batch(0)[0],))
    for step in range(300):
        tokens, labels = batch(step)
        F.cross_entropy(model(tokens), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    report = compressor.compact()
    assert report.params_after <= 0.3 * report.params_before
    tokens, labels = batch(1000)
    model.eval()
    with torch.inference_mode():
        outputs = model(tokens)
        assert (outputs.argmax(-1) == labels).double().mean() > 0.9
    assert isinstance(model.encoder.layers[0].self_attn, Attention)
    laconic.save(model, tmp_path / "compact")
    again = laconic.load(tmp_path / "compact", laconic.unfuse(Tagger())).eval()
    with torch.inference_mode():
        assert torch.equal(again(tokens), outputs)
    with pytest.raises(laconic.ArchitectureMismatchError, match=r"the saved one was unfused, laconic.unfuse\(model\) first"):
        laconic.load(tmp_path / "compact", Tagger())


@pytest.mark.parametrize(
    "options", [{"batch_first": False}, {"activation": F.silu}, {"bias": False}], ids=["sequence first", "SiLU", "no bias"]
)
def test_mlp_of_a_layer_that_never_fuses_is_taken(options: dict) -> None:
    """The default of PyTorch, sequences first, among them: there `linear1` and `linear2` are only called."""
    model = Tagger(**options)
    compressor = laconic.Compressor(model, torch.optim.SGD(model.parameters(), lr=0.1), [laconic.LowRank(strength=0.1)])
    left = {weight.name: weight.reason for weight in compressor.plan.left_alone}
    assert not any("linear" in name for name in left)
    assert "laconic.unfuse" in left["encoder.layers.0.self_attn.in_proj_weight"]
    laconic.compress(model, [laconic.LowRank()], laconic.Budget(params=0.8))
    assert isinstance(model.encoder.layers[0].linear1, nn.Sequential)
    with torch.no_grad():
        assert model.eval()(batch(0)[0]).isfinite().all()


def test_what_stays_is_named() -> None:
    class Mine(nn.MultiheadAttention):
        pass

    hooked = nn.MultiheadAttention(8, 2)
    hooked.register_forward_hook(lambda *_: None)
    tied, other = nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2)
    other.in_proj_weight = tied.in_proj_weight
    model = nn.ModuleDict(
        {
            "mine": Mine(8, 2),
            "extra": nn.MultiheadAttention(8, 2, add_bias_kv=True),
            "hooked": hooked,
            "tied": tied,
            "other": other,
            "good": nn.MultiheadAttention(8, 2),
        }
    )
    with pytest.warns(UserWarning, match="stays as it is") as caught:
        laconic.unfuse(model)
    words = " ".join(str(w.message) for w in caught)
    for name, reason in {
        "mine": "Mine is a class",
        "extra": "add_bias_kv",
        "hooked": "hooks",
        "tied": "another module",
        "other": "another module",
    }.items():
        assert f"laconic: {name} stays as it is: " in words
        assert reason in words
        assert isinstance(model[name], nn.MultiheadAttention)
    assert isinstance(model["good"], Attention)
    with pytest.warns(UserWarning, match="nothing was changed"):
        laconic.unfuse(nn.Linear(2, 2))
    with pytest.raises(laconic.InvalidTypeError, match="class Linear itself"):
        laconic.unfuse(nn.Linear)  # type: ignore[arg-type]


def test_shared_frozen_and_in_other_precision() -> None:
    attention = nn.MultiheadAttention(8, 2, dtype=torch.bfloat16).requires_grad_(False).eval()
    model = nn.ModuleDict({"a": attention, "b": attention})
    with warnings.catch_warnings(action="error"):
        laconic.unfuse(model)
    assert model["a"] is model["b"]
    assert not model["a"].training
    assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(torch.bfloat16, False)}


def encoders(width: int = 32, hidden: int = 32, heads: int = 8) -> nn.Module:
    layer = nn.TransformerEncoderLayer(width, heads, hidden, batch_first=True, norm_first=True, dropout=0.0)
    return laconic.unfuse(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


@pytest.mark.parametrize("share", [0.2, 0.5])
@pytest.mark.parametrize("structures", [[laconic.Channels()], [laconic.Channels(), laconic.LowRank()]], ids=["neurons", "both"])
def test_operations_of_attention_go_with_heads(structures: list, share: float) -> None:
    """At 256 tokens most are products between activations."""
    model, x = encoders(), torch.randn(2, 256, 32)
    report = laconic.compress(model, structures, laconic.Budget(macs=share), example_inputs=(x,))
    assert report.macs_after == laconic.profile(model, (x,), latency=False).macs
    assert share - 0.03 < report.macs_after / report.macs_before <= share


@pytest.mark.parametrize(("loss", "heads"), [(0.02, [7, 8]), (0.04, [8, 8])])
def test_a_head_goes_where_it_loses_less_than_what_is_needed_would(loss: float, heads: list[int]) -> None:
    """It saves 528 parameters, a hidden unit 65: for 195 parameters three units lose 0.024, although each parameter of the head's is cheaper."""
    plan = make_plan(encoders(hidden=128), [laconic.Channels()], (torch.randn(2, 5, 32),))
    importances = {group.name: np.full(len(group.kept), 1 / len(group.kept)) for group in plan.neurons}
    importances[plan.neurons[0].name] = np.array([loss] + [(1 - loss) / 7] * 7)
    assert [len(group.kept) for group in plan.neurons] == [8, 128, 8, 128]
    walk = choose_shapes(plan, {}, importances, ["params"], np.array([plan.params - 195.0]))
    units = [walk.units[group.name] for group in plan.neurons]
    assert units[0::2] == heads
    assert sum(units[1::2]) == (256 if heads[0] < 8 else 253)


@pytest.mark.parametrize(("hidden", "share"), [(96, 0.4), pytest.param(96, 0.3, marks=pytest.mark.slow)])
def test_a_budget_is_used_although_heads_go_whole(hidden: int, share: float) -> None:
    """A head is a tenth of what is left here: hidden units that went before it, in its place, would leave that unused."""
    torch.manual_seed(0)
    model, x = encoders(48, hidden, 3), torch.randn(8, 5, 48)
    y = torch.randn_like(model(x))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    budget = laconic.Budget(params=share)
    compressor = laconic.Compressor(model, optimizer, [laconic.Channels()], budget=budget, total_steps=40, example_inputs=(x,))
    for _ in range(20):
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    report = compressor.compact()
    assert 0.98 * share < report.params_after / report.params_before <= share


@pytest.mark.parametrize("options", [{}, {"need_weights": False}, {"average_attn_weights": False}], ids=str)
def test_heads_go_where_the_weights_are_thrown_away(options: dict) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.attention, self.head = nn.LayerNorm(32), nn.MultiheadAttention(32, 4, batch_first=True), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return self.head(x + self.attention(y, y, y, **options)[0])

    model = laconic.unfuse(Block())
    laconic.compress(model, [laconic.Channels()], laconic.Budget(params=0.5), example_inputs=(torch.randn(3, 5, 32),))
    assert model.attention.num_heads == 1


def test_heads_stay_where_their_mean_is_used() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.hidden, self.head = nn.MultiheadAttention(32, 4, batch_first=True), nn.Linear(32, 64), nn.Linear(64, 5)

        def forward(self, x: Tensor) -> Tensor:
            y, weights = self.attention(x, x, x)
            return self.head(self.hidden(y).relu()) * weights.square().sum((1, 2))[:, None, None]

    model = laconic.unfuse(Block())
    plan = make_plan(model, [laconic.Channels()], (torch.randn(3, 5, 32),))
    assert "off by" not in plan.whole["attention.q_proj"]  # seen in the trace, not by the trial
    laconic.compress(model, [laconic.Channels()], laconic.Budget(params=0.7), example_inputs=(torch.randn(3, 5, 32),))
    assert model.attention.num_heads == 4
    assert model.hidden.out_features < 64


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # once in a process
def test_padding_in_the_example_inputs_of_a_fused_encoder() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)
    inputs = (torch.randn(2, 7, 32), None, padding())
    compressor = laconic.Compressor(
        model, torch.optim.SGD(model.parameters(), lr=0.1), budget=laconic.Budget(params=0.8), total_steps=10, example_inputs=inputs
    )
    assert [neurons.name for neurons in compressor.plan.neurons] == ["layers.0.linear1", "layers.1.linear1"]


def test_masks_are_checked() -> None:
    plain, x = laconic.unfuse(nn.MultiheadAttention(32, 4, batch_first=True)), torch.randn(3, 5, 32)
    with pytest.raises(ValueError, match=r"key_padding_mask of torch.uint8: must be bool"):
        plain(x, x, x, torch.zeros(3, 5, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"key_padding_mask of shape \(3, 1\): expected \(3, 5\)"):
        plain(x, x, x, torch.zeros(3, 1, dtype=torch.bool), need_weights=False)
    with pytest.raises(ValueError, match=r"attn_mask of shape \(24, 5, 5\): expected \(12, 5, 5\) \(4 heads now\)"):
        plain(x, x, x, attn_mask=torch.randn(24, 5, 5))


def test_a_layer_with_attention_of_its_own_may_be_a_subclass_of_pytorchs() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return self.out(F.scaled_dot_product_attention(q, k, v))

    class Layer(nn.TransformerEncoderLayer):
        def __init__(self) -> None:
            super().__init__(32, 4, 64, batch_first=True)
            self.self_attn = Own()  # type: ignore[assignment]

        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            x = x + self.self_attn(x)
            return x + self._ff_block(x)

    plan = make_plan(Layer(), [laconic.LowRank()], (torch.randn(2, 6, 32),))
    assert {site.name for site in plan.sites} == {"self_attn.qkv.weight", "self_attn.out.weight"}


def test_ranks_alone_need_no_copy_of_the_model() -> None:
    """Some cannot be copied: a lock, sharded parameters."""
    model = nn.Sequential(encoders(), nn.Linear(32, 4))
    model.lock = threading.Lock()
    x = torch.randn(2, 5, 32)
    report = laconic.compress(model, [laconic.LowRank()], laconic.Budget(macs=0.5), example_inputs=(x,))
    assert report.macs_after <= 0.5 * report.macs_before


def test_what_leaves_a_model_by_an_attribute_holds_its_units() -> None:
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.free, self.head = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.hidden(x).relu()
            self.beside = y.softmax(-1).mean(0).square().sum() * 16
            codes = torch.zeros(len(x), 1, dtype=torch.long)
            codes[:, 0] = y.argmax(1)
            return self.head(self.free(y).relu()), codes

    plan = make_plan(Router(), [laconic.Channels()], (torch.randn(5, 8),))
    assert [neurons.name for neurons in plan.neurons] == ["free"]
    assert "over the units" in plan.whole["hidden"] or "mixes" in plan.whole["hidden"]


def test_unfused_after_the_optimizer_was_built_is_noted() -> None:
    model = Tagger()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    laconic.unfuse(model)
    with pytest.warns(UserWarning, match="was it unfused, moved or rebuilt"):
        compressor = laconic.Compressor(model, optimizer, [laconic.LowRank(strength=0.1)])
    note = next(note for note in compressor.plan.notes if "none of the optimizers" in note)
    assert note.startswith("12 parameters that ask for gradients")  # weights and biases of three projections in two layers
    assert "encoder.layers.0.self_attn.q_proj.weight" in note


def test_unfused_twice_is_said() -> None:
    model = laconic.unfuse(Tagger())
    with pytest.warns(UserWarning, match="is unfused already: nothing was changed"):
        laconic.unfuse(model)
