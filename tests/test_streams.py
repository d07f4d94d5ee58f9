"""Residual streams of transformers: channels that go from embeddings, norms and all blocks at once; and all widths by the same part."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import laconic
from laconic.graph import find_groups
from laconic.measure import count_macs, count_params
from laconic.models import GPT, ViT
from laconic.plan import make_plan
from laconic.slimming import importances_of, watch_inputs
from laconic.walk import Walk
from laconic.widths import choose_shapes, fine, narrowed

from .architectures import CASES
from .models import assert_same, set_clock, slow_but_for, snapshot

BUDGET = laconic.Budget(params=0.4)


def gpt() -> nn.Module:
    torch.manual_seed(0)
    return GPT(20, context=12, layers=2, width=32, heads=4)


NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=20, n_positions=12, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0, **NO_DROPOUT)
    )


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, tie_word_embeddings=True, **sizes))


class Seq2Seq(nn.Module):
    """An encoder-decoder that reads and writes the same text; of Hugging Face, with one table for encoder, decoder and output."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(input_ids=x, decoder_input_ids=x).logits


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    return Seq2Seq(T5ForConditionalGeneration(T5Config(vocab_size=20, decoder_start_token_id=0, **sizes)))


def bart() -> nn.Module:
    """Its embeddings are of its own classes: scaled, and of positions with an offset."""
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    of_both = {"layers": 1, "attention_heads": 4, "ffn_dim": 48}
    sizes = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in of_both.items()}
    special = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "forced_eos_token_id": None}
    return Seq2Seq(
        BartForConditionalGeneration(BartConfig(vocab_size=20, max_position_embeddings=16, d_model=32, dropout=0.0, **special, **sizes))
    )


def bert() -> nn.Module:
    """For masked words: the bias of its output layer is one of its head's, too."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertForMaskedLM(BertConfig(vocab_size=20, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes))


def tokens(batch: int = 8, seed: int = 0) -> Tensor:
    return torch.randint(20, (batch, 12), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return y if isinstance(y, Tensor) else y.logits


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = tokens(seed=step)
        F.cross_entropy(logits(model, x)[:, :-1].flatten(0, 1), x[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


MODELS = {
    "GPT": (gpt, "token"),
    "GPT-2, tied": (gpt2, "transformer.wte"),
    "Llama, tied": (llama, "model.embed_tokens"),
    "T5, tied": (t5, "inner.shared"),
    "BART, tied": (bart, "inner.model.shared"),
    "BERT, tied, and the bias too": (bert, "bert.embeddings.word_embeddings"),
}
models = pytest.mark.parametrize(("build", "stream"), slow_but_for([MODELS["GPT-2, tied"]], MODELS.values()), ids=MODELS)


@models
def test_a_stream_narrows_while_it_trains_and_costs_are_exact(build, stream, tmp_path):
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    compressor = laconic.Compressor(model, optimizer, laconic.Channels(), budget=BUDGET, total_steps=20, example_inputs=(tokens(),))
    limit = int(0.4 * compressor.plan.params)
    names = {n: g.group.units for g in compressor.plan.neurons for n in [g.name]}
    assert names[stream] >= 31  # BART looks at one channel, to see how long its input is
    train(model, optimizer, range(20))
    report = compressor.compact()
    assert report.params_after == count_params(model) <= limit
    assert report.macs_after == count_macs(model, (tokens(),))
    assert report.params_after > 0.95 * limit  # a head of Llama's is a twentieth
    kept = {g.name: g.kept for g in report.groups}
    assert kept[stream] < 32
    assert {id(p) for p in model.parameters()} == {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert all(s["exp_avg"].shape == p.shape for p, s in optimizer.state.items())
    fresh = laconic.load(laconic.save(model, tmp_path / "m", report), build())
    assert_same(snapshot(fresh), snapshot(model))
    assert count_params(fresh) == count_params(model)  # what was tied is tied
    torch.testing.assert_close(logits(fresh.eval(), tokens()), logits(model.eval(), tokens()), rtol=0, atol=0)


@pytest.mark.slow
def test_what_an_encoder_hands_on_beside_the_output_may_be_narrower():
    """Encoder-decoders of Hugging Face return it, too. What they are asked for keeps its width, and they generate as before when loaded."""
    model, x = t5().inner.eval(), tokens()
    inputs = {"input_ids": x, "decoder_input_ids": x, "use_cache": False}
    groups, _ = find_groups(model, inputs)
    assert {g.name: g.units for g in groups}["shared"] == 32
    report = laconic.compress(model, laconic.Channels(even=True), laconic.Budget(params=0.5), example_inputs=inputs)
    y = model(**inputs)
    assert report.params_after == count_params(model)
    assert y.encoder_last_hidden_state.shape[-1] == model.shared.embedding_dim < 32
    assert y.logits.shape[-1] == 20
    assert model.generate(x, max_new_tokens=4, do_sample=False).shape == (len(x), 5)


@models
def test_a_run_with_a_stream_is_resumed_bit_for_bit(build, stream):
    def start() -> tuple[nn.Module, torch.optim.Optimizer, laconic.Compressor]:
        model = build().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        return model, optimizer, laconic.Compressor(
            model, optimizer, laconic.Channels(), budget=BUDGET, total_steps=20, example_inputs=(tokens(),)
        )  # fmt: skip

    model, optimizer, compressor = start()
    train(model, optimizer, range(6))
    saved = copy.deepcopy((compressor.state_dict(), model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(6, 20))
    other, again, resumed = start()
    resumed.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    again.load_state_dict(saved[2])
    train(other, again, range(6, 20))
    assert_same(snapshot(other), snapshot(model))
    assert resumed.compact().params_after == compressor.compact().params_after


@pytest.mark.parametrize("name", slow_but_for(["vit"], ["vit", "bert", "convnext"]))
def test_costs_of_other_streams_are_exact(name):
    model, inputs = CASES[name].build(), CASES[name].inputs()
    dense = count_params(model)
    for share in (0.7, 0.4):
        cut = copy.deepcopy(model)
        report = laconic.compress(cut, laconic.Channels(even=True), laconic.Budget(params=share), example_inputs=inputs)
        assert 0.9 * share * dense < report.params_after == count_params(cut) <= share * dense
        assert report.macs_after == count_macs(cut, inputs)


def test_without_a_budget_channels_that_nothing_reads_stay():
    """They count in the statistics of the norms."""
    model, x = gpt(), tokens()
    (stream, *_), _ = find_groups(model, (x,))
    with torch.no_grad():
        for end in stream.consumers:
            model.get_submodule(end.path).weight[:, :4] = 0
    wanted = model.eval()(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    compressor = laconic.Compressor(model, optimizer, laconic.Channels(strength=1.0), example_inputs=(x,))
    train(model.train(), optimizer, range(1))
    report = compressor.compact()
    assert {g.name: g.kept for g in report.groups}["token"] == 32
    torch.testing.assert_close(model.eval()(x), wanted)


class Translator(nn.Module):
    """Two streams and an output layer, all with one table; a third embedding that has it, too, is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.spare, self.source, self.target = (nn.Embedding(20, 16) for _ in range(3))
        self.read, self.up, self.back = nn.Linear(16, 12), nn.Linear(16, 12), nn.Linear(12, 16)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 20, bias=False)
        self.spare.weight = self.source.weight = self.target.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        read = self.read(self.source(x)).mean(1, keepdim=True)
        y = self.target(x)
        return self.head(self.norm(y + self.back(F.relu(self.up(y) + read))))


def test_embeddings_that_share_a_table_keep_the_same_channels():
    torch.manual_seed(0)
    model = Translator().eval()
    plan = make_plan(model, [laconic.Channels()], (tokens(),))
    stream = plan.neurons[0]
    table = model.head.weight
    assert (stream.name, len(stream.kept)) == ("spare", 16)
    assert {p for p in stream.weights if p.ndim == 2} == {table, model.back.weight}
    torch.testing.assert_close(
        stream.structure.values(stream) ** 2, (table**2).sum(0) + (model.back.weight**2).sum(1) + model.back.bias**2, check_dtype=False
    )
    other = Translator()
    other.head.weight = nn.Parameter(other.head.weight.detach().clone())  # the table of the embeddings alone
    for counted in (model, other):
        layers = make_plan(counted, [laconic.Channels()], (tokens(),)).layers
        assert sum(x.params_at(*x.dense) for x in layers) == count_params(counted)
    report = laconic.compress(model, laconic.Channels(even=True), laconic.Budget(params=0.5), example_inputs=(tokens(),))
    assert report.params_after == count_params(model)
    assert model.spare.weight is model.source.weight is model.target.weight is model.head.weight
    assert model.spare.weight.shape[1] == {g.name: g.kept for g in report.groups}["spare"] < 16


class TiedTable(nn.Module):
    """A table that is the output layer, too, and two layers for what is between."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.back = nn.Embedding(20, 16), nn.Linear(16, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight

    def project(self, x: Tensor) -> Tensor:
        return self.back(self.up(x).relu())


def test_a_table_whose_output_layer_reads_what_is_not_followed_keeps_its_width():
    class Recurrent(TiedTable):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(self.project(self.embed(x)))[0])

    groups, reasons = find_groups(Recurrent(), (tokens(),))
    assert {g.name: g.units for g in groups} == {"up": 24}
    assert reasons["embed"] == "embed and head share their weight, but not the same units"


def test_the_entries_of_a_table_stay_though_its_output_layer_is_read():
    class Reader(TiedTable):
        """What the tied layer puts out is read by another: entries, which the table has as rows."""

        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(20, 8)

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            return self.out(self.head(h + self.project(h)).relu())

    groups, reasons = find_groups(Reader(), (tokens(),))
    assert {g.name: g.units for g in groups} == {"embed": 16, "up": 24}
    assert reasons["head"] == "it says which entry of embed is meant"


def test_a_table_that_does_more_than_look_up_is_shared_by_no_group():
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.doc = nn.Embedding(20, 16), nn.Embedding(20, 16, scale_grad_by_freq=True)
            self.doc.weight = self.query.weight
            self.first, self.second = (nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.first(self.query(x)).mean(1) @ self.second(self.doc(x)).mean(1).T

    groups, reasons = find_groups(Towers(), (tokens(),))
    assert {g.name: g.units for g in groups} == {"first.0": 32, "second.0": 32}
    assert reasons["query"] == "its weight is shared with doc"


def test_an_embedding_with_a_layer_within_is_followed_inside():
    class Factorised(nn.Embedding):
        def __init__(self) -> None:
            super().__init__(20, 8)
            self.project = nn.Linear(8, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.project(super().forward(x))

    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.up, self.back, self.out = Factorised(), nn.Linear(32, 48), nn.Linear(48, 32), nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            return self.out(h + self.back(self.up(h).relu()))

    groups, _ = find_groups(Stream(), (tokens(),))
    assert {g.name: g.units for g in groups} == {"embed.project": 32, "up": 48}


def test_a_table_with_a_layer_that_nothing_calls_keeps_its_width():
    class Reader(Translator):
        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.norm(self.target(x) + self.back(F.relu(self.read(self.source(x))))))

    groups, reasons = find_groups(Reader(), (tokens(),))
    assert {g.name: g.units for g in groups} == {"read": 12}
    assert reasons["target"] == "head has the same weight, and is not followed"


def test_a_table_goes_with_what_its_output_layer_reads():
    class Projected(TiedTable):
        """The head reads a projection: as many channels as the table has that it shares, and those of the same numbers."""

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.project(self.embed(x)))

    groups, _ = find_groups(Projected(), (tokens(),))
    assert {g.name: g.units for g in groups} == {"embed": 16, "up": 24}
    assert {(e.path, e.side) for e in groups[0].ends} == {("embed", "out"), ("back", "out"), ("up", "in"), ("head", "in")}


def test_a_table_whose_weight_is_computed_keeps_its_width():
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Embedding(20, 16)), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4))
    groups, reasons = find_groups(model, (tokens(),))
    assert {g.name: g.units for g in groups} == {"1": 24}
    assert reasons["0"].startswith("parametrized")


def test_a_table_that_becomes_a_smaller_one_keeps_its_width():
    plan = make_plan(gpt(), [laconic.LowRank(embeddings=True), laconic.Channels()], (tokens(),))
    assert plan.whole["token"] == "token becomes a smaller table by LowRank(embeddings=True): its width stays"


def evenly(model: nn.Module, inputs: tuple, share: float, structure: laconic.Channels | None = None):
    """A plan, the importances, and the widths that a budget leaves."""
    plan = make_plan(model, [structure or laconic.Channels(even=True, principal=False, multiple=1)], inputs)
    importances = importances_of(plan, watch_inputs(model, plan, [inputs]))
    budget = laconic.Budget(params=share)
    return plan, importances, choose_shapes(plan, {}, importances, budget.currencies, budget.limits(plan))


def widths_by_size(walk: Walk) -> dict[int, int]:
    """What groups of so many units keep, which is the same number in all of them."""
    found = {}
    for group in walk.plan.neurons:
        assert found.setdefault(group.group.units, walk.units[group.name]) == walk.units[group.name]
    return found


@pytest.mark.parametrize(("principal", "of_attention"), [(True, "8 dimensions of each head"), (False, "4 heads")])
def test_the_plan_and_the_report_say_what_the_units_are(principal, of_attention):
    structure = laconic.Channels(even=True, principal=principal)
    model, inputs = gpt(), (tokens(),)
    kinds = {row[0]: row[3] for row in make_plan(model, [structure], inputs).rows() if row[1] == "Channels"}
    assert kinds == {
        "token": "32 channels of the stream",
        **{f"blocks.{i}.{name}": what for i in range(2) for name, what in (("query", of_attention), ("up", "128 units"))},
    }
    report = laconic.compress(model, structure, laconic.Budget(params=0.5), example_inputs=inputs, calibration=[tokens()])
    for group in report.groups:
        assert f"  {group.name}: {group.kept} of {kinds[group.name]}, share" in str(report)
    assert laconic.CompactReport.from_json(report.to_json()).groups == report.groups


def test_hidden_units_before_a_norm_are_no_stream():
    model = nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 4))
    (group,) = make_plan(model, [laconic.Channels()], (torch.randn(2, 8),)).neurons
    assert group.kind == "units"


def test_even_neurons_go_by_their_importance():
    plan, importances, walk = evenly(gpt(), (tokens(),), 0.5)
    for group in plan.neurons:
        stay = np.isin(np.arange(group.group.units), walk.kept()[group.name])
        assert not stay.all()
        assert importances[group.name][stay].min() >= importances[group.name][~stay].max()


@pytest.mark.parametrize(
    ("share", "stream", "heads"),
    [
        (0.6, 24, 3),  # as wide as the heads
        (0.25, 16, 2),
        (0.12, 10, 1),  # 8 or 16 would leave the hidden layers too narrow, or too wide
        (0.8, 27, 4),
    ],
)
def test_even_neurons_keep_the_same_part_of_every_group(share, stream, heads):
    _, _, walk = evenly(gpt(), (tokens(),), share)
    widths = widths_by_size(walk)
    assert (widths[32], widths[4]) == (stream, heads)
    tied = stream * 4 == heads * 32
    assert 3 / 4 <= widths[128] / 128 / (stream / 32) <= 4 / 3 if tied else abs(widths[128] / 128 - stream / 32) <= 2 / 32
    assert walk.spent <= walk.limits
    for units in [128] if tied else [32, 128]:  # one more of each of these is too much
        more = walk.copy()
        for group in walk.plan.neurons:
            if group.group.units == units:
                more.go(group, (widths[units] + 1, 0))
        assert more.spent > more.limits


@pytest.mark.parametrize(
    ("width", "hidden", "share", "kept"),
    [
        (128, 512, 0.5, (96, 24, 304)),
        (128, 512, 0.125, (48, 12, 136)),  # of the 32 places within a head multiples of 4
        (128, 512, 0.0625, (32, 8, 104)),
        (32, 128, 0.3, (16, 4, 68)),  # multiples of 8 would leave more than three hundredths of the budget
        (128, 512, 0.123, (40, 10, 202)),  # and here a stream of another width than its heads, or hidden layers far from them
        (32, 128, 0.15, (12, 3, 34)),
        (32, 128, 0.06, (6, 2, 23)),
        (32, 128, 0.015, (2, 1, 12)),
    ],
)
def test_multiples_that_nobody_asked_for_are_as_large_as_the_budget_allows(width, hidden, share, kept):
    model, inputs = GPT(65, 64, layers=4, width=width, heads=4, hidden=hidden), (torch.randint(0, 65, (2, 64)),)
    _, _, walk = evenly(model, inputs, share, laconic.Channels(even=True))
    widths = widths_by_size(walk)
    assert tuple(widths[units] for units in (width, width // 4, hidden)) == kept
    assert 0.97 * walk.limits <= walk.spent <= walk.limits


def test_a_multiple_that_nobody_asked_for_is_at_most_a_sixth_of_a_group():
    assert [fine(units, 8) for units in (512, 48, 47, 32, 23, 12, 11, 1)] == [8, 8, 4, 4, 2, 2, 1, 1]
    assert [fine(512, lanes) for lanes in (8, 4, 2, 1)] == [8, 4, 2, 1]


def test_no_part_of_a_budget_is_left_where_the_stream_could_be_as_wide_as_fewer_heads():
    """Of four heads at eight tenths: three, and the stream of three, would leave the hidden layers whole and an eighth of the budget over."""
    torch.manual_seed(0)
    model = ViT((3, 8, 8), 5, layers=2, width=32, heads=4)
    _, _, walk = evenly(model, (torch.randn(2, 3, 8, 8),), 0.8)
    assert widths_by_size(walk)[4] == 4
    assert walk.spent > 0.99 * walk.limits


def test_widths_that_went_on_the_way_end_where_the_others_do():
    """The hidden layers came down first: the stream is as wide as its heads all the same."""
    plan, importances, walk = evenly(gpt(), (tokens(),), 0.25)
    again = Walk(plan, {}, importances, walk.currencies, walk.limits, frozenset())
    for group in plan.neurons:
        if group.group.units == 128:
            again.go(group, (walk.units[group.name], 0))
    assert narrowed(again).units == walk.units


@pytest.mark.parametrize("share", slow_but_for([0.4], [0.7, 0.4, 0.12]))
def test_a_run_that_looks_again_and_again_ends_where_a_cut_at_once_does(share):
    model = gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    structure = laconic.Channels(even=True, principal=False, multiple=1)  # cut on the way
    compressor = laconic.Compressor(
        model, optimizer, structure, budget=laconic.Budget(params=share), total_steps=100, example_inputs=(tokens(),), every=1
    )
    train(model, optimizer, range(100))
    report = compressor.compact()
    assert {g.name: g.kept for g in report.groups} == evenly(gpt(), (tokens(),), share)[2].units


def convolutions(*widths: int) -> nn.Module:
    torch.manual_seed(0)
    layers = [m for i, o in zip((3, *widths), widths, strict=False) for m in (nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU())]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 5))


@pytest.mark.parametrize(("widths", "share", "multiple"), [((16, 24, 40, 80), 0.5, 8), ((16, 8, 32, 32), 0.264, 4)])
def test_a_run_without_heads_ends_where_a_cut_at_once_does(widths, share, multiple):
    x, structure = torch.randn(8, 3, 6, 6), laconic.Channels(even=True, multiple=multiple)
    model = convolutions(*widths)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    compressor = laconic.Compressor(
        model, optimizer, structure, budget=laconic.Budget(params=share), total_steps=100, example_inputs=(x[:1],), every=1
    )
    for _ in range(100):
        F.cross_entropy(model(x), torch.arange(8) % 5).backward()
        optimizer.step()
        optimizer.zero_grad()
    report = compressor.compact()
    assert {g.name: g.kept for g in report.groups} == evenly(convolutions(*widths), (x[:1],), share, structure)[2].units


def test_a_layer_of_fewer_channels_than_a_multiple_is_counted_as_it_is():
    report = laconic.compress(
        convolutions(4, 10, 12),
        laconic.Channels(even=True, multiple=8),
        laconic.Budget(params=0.829),
        example_inputs=(torch.randn(1, 3, 6, 6),),
    )
    assert [g.kept for g in report.groups] == [4, 8, 12]
    with pytest.raises(laconic.errors.InfeasibleBudgetError, match=r"smallest feasible: params=0\.\d+"):
        evenly(convolutions(4, 10), (torch.randn(1, 3, 6, 6),), 0.7, laconic.Channels(even=True, multiple=8))


def test_channels_in_front_of_a_flatten_are_no_heads():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))
    plan, _, _ = evenly(model, (torch.randn(2, 3, 6, 6),), 0.5)
    assert [g.of_heads for g in plan.neurons] == [False]
    plan, _, _ = evenly(gpt(), (tokens(),), 0.5)
    assert {g.group.units for g in plan.neurons if g.of_heads} == {4}


def test_gated_hidden_units_in_one_piece_are_no_heads():
    import transformers as hf

    torch.manual_seed(0)
    special = {f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")}
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 12}
    model = hf.ModernBertForMaskedLM(hf.ModernBertConfig(vocab_size=20, **sizes, **special)).eval()
    _, _, walk = evenly(model, (tokens(2),), 0.3)
    widths = widths_by_size(walk)
    assert widths[48] == 4 * widths[12]
    assert walk.spent > 0.98 * walk.limits


def test_even_neurons_of_few_heads_keep_the_nearer_number_of_them():
    """Of two heads for all queries, at six tenths: both, and not one."""
    _, _, walk = evenly(llama(), (tokens(),), 0.6)
    widths = widths_by_size(walk)
    assert widths[2] == 2
    assert abs(widths[32] / 32 - widths[48] / 48) < 0.04


def test_a_stream_is_as_wide_as_its_heads_only_in_multiples_that_allow_it():
    _, _, walk = evenly(gpt(), (tokens(),), 0.6, laconic.Channels(even=True, multiple=16, principal=False))
    widths = widths_by_size(walk)
    assert widths[32] == 16
    assert widths[128] % 16 == 0
    assert widths[4] % 2 == 0  # of 8 channels each


def test_an_even_budget_out_of_reach_says_what_is_within():
    with pytest.raises(laconic.errors.InfeasibleBudgetError, match=r"smallest feasible: params=0\.0\d+"):
        evenly(gpt(), (tokens(),), 0.001)


@models
def test_by_default_a_transformer_becomes_narrower_evenly_and_that_is_said(build, stream):
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    compressor = laconic.Compressor(model, optimizer, budget=BUDGET, total_steps=20, example_inputs=(tokens(),))
    assert not compressor.plan.sites
    assert {g.structure for g in compressor.plan.neurons} == {laconic.Channels(even=True)}
    assert stream in {g.name for g in compressor.plan.neurons}
    assert any("shrink by the same part" in note for note in compressor.plan.notes)
    train(model, optimizer, range(20))
    report = compressor.compact()
    assert report.params_after <= 0.4 * report.params_before
    assert len({(g.units, g.kept) for g in report.groups}) == len({g.units for g in report.groups})
    parts = [g.kept / g.units for g in report.groups if g.units > 4]
    assert max(parts) / min(parts) <= 1.4  # 4 / 3, and what rounding has left over
    assert any("were to shrink by the same part" in note for note in report.notes)


def test_where_milliseconds_count_even_neurons_are_in_multiples(monkeypatch, empty_table):
    set_clock(monkeypatch, lambda model: count_params(model) / 1000)
    model = gpt()
    compressor = laconic.Compressor(
        model, torch.optim.SGD(model.parameters(), lr=0.1), budget=laconic.Budget(latency=0.9), total_steps=20, example_inputs=(tokens(),)
    )
    assert {g.structure for g in compressor.plan.neurons} == {laconic.Channels(even=True, multiple=8)}
    assert any("in multiples of 8, and no rank" in note for note in compressor.plan.notes)


def test_where_all_widths_shrink_evenly_they_are_done_early():
    def schedule(model: nn.Module, x: Tensor, *structures: laconic.Channels, **options) -> laconic.Schedule:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return laconic.Compressor(
            model, optimizer, list(structures) or None, budget=laconic.Budget(params=0.7), total_steps=100, example_inputs=(x,), **options
        ).schedule  # fmt: skip

    early, own = laconic.Schedule(warmup=0.05, settle=0.2), laconic.Schedule(warmup=0.3, settle=0.6)
    assert schedule(gpt(), tokens()) == laconic.Schedule(warmup=0.01, settle=0.02)  # turned, and cut at once
    assert schedule(gpt(), tokens(), laconic.Channels(even=True, principal=False)) == early
    assert schedule(gpt(), tokens(), schedule=own) == own
    assert schedule(gpt(), tokens(), laconic.Channels()) == laconic.Schedule()
    perceptron = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    assert schedule(perceptron, torch.randn(4, 8), laconic.Channels(even=True)) == early


@pytest.mark.parametrize("layers", [1, 3])
def test_a_norm_behind_each_layer_is_no_stream(layers):
    hidden = [m for _ in range(layers) for m in (nn.Linear(32, 32), nn.LayerNorm(32), nn.ReLU())]
    model = nn.Sequential(nn.Linear(8, 32), *hidden, nn.Linear(32, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compressor = laconic.Compressor(model, optimizer, budget=BUDGET, total_steps=20, example_inputs=(torch.randn(4, 8),))
    assert compressor.plan.sites


def test_a_stream_counts_as_often_as_it_is_normalised_and_each_of_its_readers_the_same():
    model, x = gpt(), tokens()
    plan = make_plan(model, [laconic.Channels()], (x,))
    stream = plan.neurons[0]
    before = importances_of(plan, watch_inputs(model, plan, [(x,)]))
    walk = Walk(plan, {}, before, ("params",), np.array([1.0]), frozenset())
    assert walk.counted(stream) == 2 * 2 + 1
    assert {walk.counted(group) for group in plan.neurons[1:]} == {1}
    with torch.no_grad():
        model.head.weight.mul_(100.0)
    after = importances_of(plan, watch_inputs(model, plan, [(x,)]))
    np.testing.assert_allclose(after[stream.name], before[stream.name], rtol=1e-6)
