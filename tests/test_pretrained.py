"""Cut models of transformers as ordinary ones of another configuration."""

import copy

import pytest
import torch
import transformers as hf

import laconic
from laconic import errors
from laconic.integrations.pretrained import reconfigured

from .models import assert_same, slow_but_for, snapshot
from .test_streams import tokens

SIZES = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 12}
POSITIONS = {"max_position_embeddings": 12}
GROUPED = SIZES | {"num_attention_heads": 6, "num_key_value_heads": 2}
WORDS = {"input_ids": tokens(2)}
PIXELS = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}


def gpt2(heads=12, **options):
    torch.manual_seed(0)
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=20, n_positions=12, n_embd=48, n_layer=2, n_head=heads, bos_token_id=0, eos_token_id=0, **options)
    )


def of(kind, **options):
    torch.manual_seed(0)
    config = {"vocab_size": 20} | options
    return getattr(hf, kind)(getattr(hf, kind).config_class(**config))


CASES = {
    "GPT-2": (gpt2, WORDS, {"n_embd": 24, "n_head": 6}),
    "GPT-2, hidden width said": (lambda: gpt2(n_inner=100), WORDS, {"n_embd": 24, "n_head": 6}),
    "Llama": (lambda: of("LlamaForCausalLM", **GROUPED), WORDS, {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8}),
    "Qwen, the size of a head not said": (lambda: of("Qwen2ForCausalLM", **GROUPED), WORDS, {"num_key_value_heads": 1}),
    "BERT": (lambda: of("BertForSequenceClassification", **SIZES, **POSITIONS), WORDS, {"hidden_size": 24, "num_attention_heads": 6}),
    "BERT for masked words": (lambda: of("BertForMaskedLM", **SIZES, **POSITIONS), WORDS, {"hidden_size": 24, "num_attention_heads": 6}),
    "DistilBERT": (lambda: of("DistilBertForSequenceClassification", dim=48, hidden_dim=96, n_layers=2, n_heads=12, **POSITIONS), WORDS, {"dim": 24, "n_heads": 6}),
    "ViT": (lambda: of("ViTForImageClassification", image_size=16, patch_size=4, **SIZES), PIXELS, {"hidden_size": 24, "num_attention_heads": 6}),
}  # fmt: skip


@pytest.mark.parametrize(("build", "inputs", "sizes"), slow_but_for([CASES["GPT-2"], CASES["Llama"]], CASES.values()), ids=CASES)
def test_a_cut_model_is_an_ordinary_one_of_another_configuration(build, inputs, sizes, tmp_path):
    model = build().eval()
    report = laconic.compress(model, laconic.Channels(even=True), laconic.Budget(params=0.3), example_inputs=inputs)
    config, state = model.config.to_dict(), copy.deepcopy(snapshot(model))
    small = reconfigured(model, inputs)
    assert {name: getattr(small.config, name) for name in sizes} == sizes
    assert sum(p.numel() for p in small.parameters()) == report.params_after
    assert model.config.to_dict() == config
    assert_same(snapshot(model), state)
    small.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs)[0], model(**inputs)[0], rtol=0, atol=1e-6)


WITHIN = ("GPT-2", "BERT", "DistilBERT", "ViT")


@pytest.mark.parametrize("case", slow_but_for(["GPT-2", "ViT"], WITHIN))
def test_heads_get_narrower_where_batches_are_seen_and_the_size_in_the_code_follows(case, tmp_path):
    build, inputs, sizes = CASES[case]
    model, dense = build().eval(), build().eval()
    many = torch.randn(64, 3, 16, 16) if case == "ViT" else torch.randint(20, (64, 10))
    report = laconic.compress(
        model, laconic.Channels(even=True), laconic.Budget(params=0.3), example_inputs=inputs, calibration=[many], refit=True
    )
    assert [g.kept for g in report.groups if "q" in g.name.rpartition(".")[2] or "c_attn" in g.name] == [
        2,
        2,
    ]  # of the 4 places of 12 heads
    laconic.save(model, tmp_path / "kept", report=report)
    loaded = laconic.load(tmp_path / "kept", dense)
    small = reconfigured(model, inputs)
    small.save_pretrained(tmp_path / "small")
    heads = "n_head" if case == "GPT-2" else "n_heads" if case == "DistilBERT" else "num_attention_heads"
    assert {name: getattr(small.config, name) for name in sizes} == sizes | {heads: 12}
    with torch.no_grad():
        for again in (loaded.eval(), type(model).from_pretrained(tmp_path / "small").eval()):
            torch.testing.assert_close(again(**inputs)[0], model(**inputs)[0], rtol=0, atol=1e-6)


def cut(model, inputs=WORDS, share=0.3, structures=None):
    laconic.compress(model, structures or laconic.Channels(even=True), laconic.Budget(params=share), example_inputs=inputs)
    return model


def test_each_part_of_a_configuration_has_its_own_sizes():
    vision, text = of("ViTModel", image_size=16, patch_size=4, **SIZES), of("BertModel", **SIZES | {"intermediate_size": 80}, **POSITIONS)
    inputs = WORDS | PIXELS
    model = hf.VisionTextDualEncoderModel(vision_model=vision, text_model=text)
    cut(model, inputs, 0.8, laconic.Channels(even=True, exclude="*attention*", multiple=1))
    small = reconfigured(model, inputs)
    parts = small.config.vision_config, small.config.text_config
    assert [part.hidden_size for part in parts] == [48, 48]
    vision, text = small.config.vision_config.intermediate_size / 96, small.config.text_config.intermediate_size / 80
    assert vision == pytest.approx(text, abs=0.02)
    assert vision < 0.5


def test_the_size_of_a_head_is_said_where_the_stream_is_of_another_width():
    model = cut(of("Qwen2ForCausalLM", **GROUPED), share=0.6)
    small = reconfigured(model, WORDS)
    assert small.config.head_dim == 8
    assert small.config.hidden_size != 8 * small.config.num_attention_heads


def test_narrower_heads_in_a_stream_that_stays_are_said_by_the_size_of_a_head():
    model = of("ViTForImageClassification", image_size=16, patch_size=4, **SIZES).eval()
    structure, many = laconic.Channels(even=True, exclude="vit.embeddings*"), torch.randn(64, 3, 16, 16)
    laconic.compress(model, structure, laconic.Budget(params=0.6), example_inputs=PIXELS, calibration=[many])
    small = reconfigured(model, PIXELS)
    assert (small.config.hidden_size, small.config.num_attention_heads, small.config.head_dim) == (
        48,
        12,
        model.vit.layers[0].attention.head_dim,
    )
    assert small.config.head_dim < 4


def test_a_model_in_another_precision_in_training_stays_so():
    model = cut(gpt2()).to(torch.bfloat16).train()
    small = reconfigured(model, WORDS)
    assert small.training
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert small.lm_head.weight is small.transformer.wte.weight


def test_what_a_model_keeps_in_float32_stays_so(tmp_path):
    """Rotary frequencies are no parameters, and are not saved."""
    of("LlamaForCausalLM", **SIZES).save_pretrained(tmp_path)
    model = cut(hf.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval())
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    inputs = {"input_ids": torch.randint(20, (2, 256))}
    small = reconfigured(model, inputs)
    assert small.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(small(**inputs).logits, model(**inputs).logits)


def test_what_is_frozen_in_eval_mode_or_set_stays_so_and_no_random_number_is_drawn():
    model = of("BertForSequenceClassification", attn_implementation="eager", **SIZES, **POSITIONS)
    cut(model).train()
    model.bert.embeddings.requires_grad_(False).eval()
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    small = reconfigured(model, WORDS)
    assert torch.equal(torch.rand(1), expected)
    assert {n: p.requires_grad for n, p in small.named_parameters()} == {n: p.requires_grad for n, p in model.named_parameters()}
    assert {n: m.training for n, m in small.named_modules()} == {n: m.training for n, m in model.named_modules()}
    assert len(small(**WORDS, output_attentions=True).attentions) == 2


class Own(hf.BertPreTrainedModel):
    """Cannot be built from its configuration alone."""

    def __init__(self, config, classes):
        super().__init__(config)
        self.bert, self.head = hf.BertModel(config, add_pooling_layer=False), torch.nn.Linear(config.hidden_size, classes)

    def forward(self, input_ids):
        return self.head(self.bert(input_ids).last_hidden_state)


def test_it_generates_as_the_cut_model_does():
    model = cut(gpt2()).eval()
    model.generation_config.max_new_tokens = 3
    small = reconfigured(model, WORDS)
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(small.generate(tokens(1)[:, :4], **options), model.generate(tokens(1)[:, :4], **options))
    assert small.generation_config.max_new_tokens == 3


def test_after_training_with_the_trainer(tmp_path):
    from laconic.integrations.transformers import CompressionCallback

    ids = tokens(32)
    arguments = hf.TrainingArguments(str(tmp_path), num_train_epochs=2, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True)
    callback = CompressionCallback(budget=laconic.Budget(params=0.3), example_inputs=WORDS)
    model = gpt2()
    hf.Trainer(model, arguments, train_dataset=[{"input_ids": x, "labels": x} for x in ids], callbacks=[callback]).train()
    small = reconfigured(model, WORDS)
    assert sum(p.numel() for p in small.parameters()) == callback.report.params_after
    assert small.config.n_embd == 24


REFUSED = {
    "no model of transformers": (lambda: torch.nn.Linear(3, 3), errors.InvalidTypeError, r"Linear is no model of transformers: laconic\.save"),
    "layers that became two": (
        lambda: cut(gpt2(), share=0.5, structures=laconic.LowRank()), errors.InvalidValueError,
        r"^transformer\.h\.0\.\S+ has become two layers, which no configuration says: keep the model by laconic\.save, or train it with Channels",
    ),
    "blocks of different widths": (
        lambda: cut(gpt2(), structures=[laconic.Channels(include="transformer.h.0.mlp.c_fc")], share=0.9), errors.InvalidValueError,
        r"no GPT2Config describes this model: with n_embd = 48, n_inner = \d+, n_head = 12 transformer\.h\.\d\.mlp\.c_fc\.weight would be",
    ),
    "a stream of another width than its heads": (
        lambda: cut(gpt2(heads=3)), errors.InvalidValueError, r"no GPT2Config describes this model: .*; laconic\.save and laconic\.load keep it",
    ),
    "a number that goes by the width": (
        lambda: cut(of("Gemma2ForCausalLM", head_dim=4, **SIZES | {"num_key_value_heads": 12})), errors.InvalidValueError,
        r"no Gemma2Config describes this model: with hidden_size = 24.* its outputs would be off by",
    ),
    "sizes that the class refuses": (
        lambda: cut(of("LlamaForCausalLM", **GROUPED), share=0.75), errors.InvalidValueError, r"no LlamaConfig describes this model: hidden_size = \d+.*is not a multiple of the number of attention heads",
    ),
    "a class that wants more than a configuration": (
        lambda: cut(Own(hf.BertConfig(vocab_size=20, **SIZES, **POSITIONS), 3)), errors.InvalidValueError,
        r"^Own cannot be built from its configuration alone \(TypeError: .*\): laconic\.save and laconic\.load keep it$",
    ),
    "wrong example inputs": (lambda: cut(gpt2()), errors.InvalidTypeError, r"example_inputs: strange: not among the arguments"),
}  # fmt: skip


@pytest.mark.parametrize(("build", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_what_no_configuration_describes_is_refused_in_one_line(build, kind, message):
    model = build()
    state = copy.deepcopy(snapshot(model))
    with pytest.raises(kind, match=message) as caught:
        reconfigured(model, {"strange": 1} if "strange" in message else WORDS)
    assert "\n" not in str(caught.value)
    assert_same(snapshot(model), state)
