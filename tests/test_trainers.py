"""The callbacks do what a loop of one's own does, and a run that is resumed ends as the one that was not stopped."""

import json
import shutil
import subprocess
import sys
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import laconic
from laconic.integrations import shared
from laconic.integrations.accelerate import register_for_checkpointing

from . import lightning_worker
from .lightning_worker import BATCH, EPOCHS, SCHEDULE, Module, compression, examples, fit, net
from .models import assert_same
from .processes import POSSIBLE, two_processes

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import accelerate
    import transformers
    from lightning.pytorch import Callback
    from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint, StochasticWeightAveraging
    from lightning.pytorch.strategies import SingleDeviceStrategy
    from lightning.pytorch.tuner import Tuner
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    from laconic.integrations import transformers as hugging_face

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the trainers; what laconic says is looked for where it is due
STEPS = EPOCHS * len(examples()[0]) // BATCH


def end(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.state_dict())


# ---- Lightning ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was not stopped: the module, its callback, and where a checkpoint of every epoch is."""
    place = tmp_path_factory.mktemp("lightning")
    callback = compression(directory=place / "compact")
    return fit(callback, place, every_epoch=True), callback, place


def test_lightning_does_what_a_loop_of_ones_own_does(whole):
    module, callback, _ = whole
    plain = Module()
    optimizer = plain.configure_optimizers()
    compressor = laconic.Compressor(
        plain,
        optimizer,
        budget=laconic.Budget(params=0.25),
        total_steps=STEPS,
        example_inputs=(plain.example_input_array,),
        schedule=SCHEDULE,
    )
    x, y = examples()
    for _ in range(EPOCHS):
        for i in range(0, len(x), BATCH):
            cross_entropy(plain(x[i : i + BATCH]), y[i : i + BATCH]).backward()
            optimizer.step()
            optimizer.zero_grad()
    report = compressor.compact()
    assert_same(end(module), end(plain))
    assert report.params_after == callback.report.params_after <= 0.25 * report.params_before
    assert callback.compressor.steps == STEPS


def test_lightning_saves_the_compact_model(whole):
    module, callback, place = whole
    assert_same(end(laconic.load(place / "compact", Module())), end(module))
    assert callback.report.params_after == sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("epoch", [0, 3, 5, 7])  # before the first cut, between cuts, when settled, at the end
def test_lightning_goes_on_from_a_checkpoint_exactly(whole, epoch, tmp_path):
    module, first, place = whole
    callback = compression()
    assert_same(end(fit(callback, tmp_path, ckpt_path=place / f"epoch={epoch}.ckpt")), end(module))
    assert callback.report.params_after == first.report.params_after


def test_the_checkpoints_of_lightning_are_of_a_network_before_and_after_cuts(whole):
    sizes = [sum(x.numel() for x in torch.load(whole[2] / f"epoch={e}.ckpt", weights_only=True)["state_dict"].values()) for e in (0, 7)]
    assert sizes[0] == sum(p.numel() for p in net().parameters())
    assert sizes[1] <= 0.25 * sizes[0]


def test_a_part_of_the_lightning_module(tmp_path):
    callback = compression(module="net", example_inputs=examples()[0][:1], directory=tmp_path / "compact")
    module = fit(callback, tmp_path)
    assert callback.compressor.model is module.net
    assert_same(end(laconic.load(tmp_path / "compact", net())), end(module.net))


def test_lightning_logs_the_numbers_of_the_compressor(tmp_path):
    seen = {}

    class Look(Callback):
        def on_train_end(self, trainer, pl_module):
            seen.update(trainer.callback_metrics)

    look = Look()
    callback = compression()
    lightning_worker.pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False, callbacks=[callback, look], default_root_dir=tmp_path
    ).fit(Module(), DataLoader(TensorDataset(*examples()), batch_size=BATCH))  # fmt: skip
    assert seen["laconic/step"] == STEPS / EPOCHS
    assert "laconic/rank/net.0.weight" in seen


def test_example_inputs_are_taken_in_the_precision_of_the_model(tmp_path):
    callback = compression(module="net", example_inputs=examples()[0][:1])  # float64
    fit(callback, tmp_path, precision="bf16-true", max_epochs=2)
    assert callback.compressor.example_inputs[0].dtype == torch.bfloat16
    assert callback.report.params_after <= 0.25 * callback.report.params_before


def test_a_strength_and_an_energy_in_place_of_a_budget(tmp_path):
    callback = lightning_worker.CompressionCallback([laconic.LowRank(strength=0.5)], energy=0.9)
    module = fit(callback, tmp_path)
    assert callback.report.params_after == sum(p.numel() for p in module.parameters()) < sum(p.numel() for p in net().parameters())


def test_a_lightning_run_that_fails_to_start_sets_no_weights_aside(tmp_path):
    module = Module()
    with pytest.raises(FileNotFoundError):
        fit(compression(), tmp_path, module, ckpt_path=tmp_path / "none.ckpt")
    with pytest.raises(RuntimeError, match="Missing key"):
        module.load_state_dict({})


class Shards(SingleDeviceStrategy):
    restore_checkpoint_after_setup = True


def refused_by_lightning(case, place, tmp_path):
    if case == "without":
        fit(Callback(), tmp_path, every_epoch=True, max_epochs=1)
        fit(compression(), tmp_path, ckpt_path=tmp_path / "epoch=0.ckpt")
    if case == "twice":
        callback = compression()
        fit(callback, tmp_path, max_epochs=1)
        fit(callback, tmp_path, max_epochs=1)
    if case == "other budget":
        fit(compression(budget=laconic.Budget(params=0.5)), tmp_path, ckpt_path=place / "epoch=5.ckpt")
    if case == "endless":
        fit(compression(), tmp_path, max_epochs=-1)
    if case == "shards":
        fit(compression(), tmp_path, strategy=Shards(device=torch.device("cpu"), accelerator=None))
    if case == "module":
        fit(compression(module="nett", example_inputs=examples()[0][:1]), tmp_path)
    if case == "energy":
        compression(energy=0.9)
    if case == "keyword":
        compression(cut="ende")
    if case == "nothing asked":
        lightning_worker.CompressionCallback()
    if case == "average":
        fit(compression(), tmp_path, more=[StochasticWeightAveraging(1e-2)])
    if case == "finder":
        fit(compression(), tmp_path, more=[LearningRateFinder()])
    if case == "directory":
        (tmp_path / "mine").write_text("mine")
        compression(directory=tmp_path / "mine")


LIGHTNING_REFUSES = {
    "without": "was saved without CompressionCallback",
    "twice": "this callback has had its run",
    "other budget": "saved with other settings",
    "endless": "a budget needs total_steps=",
    "shards": "Shards shards the model",
    "module": "module = 'nett': the model has no such part; did you mean 'net'",
    "energy": "energy = 0.9: the budget rules here",
    "keyword": "cut = 'ende' is unknown; did you mean 'end'",
    "nothing asked": "Compressor needs a budget=",
    "average": "StochasticWeightAveraging averages weights of different steps",
    "finder": "LearningRateFinder takes back the steps that it trains",
    "directory": "is not a saved model",
}


@pytest.mark.parametrize("case", LIGHTNING_REFUSES)
def test_lightning_is_refused_what_cannot_work(case, whole, tmp_path):
    with pytest.raises(laconic.LaconicError) as refusal:
        refused_by_lightning(case, whole[2], tmp_path)
    assert LIGHTNING_REFUSES[case] in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_lightning_tuner_leaves_nothing_on_the_module(tmp_path):
    module = Module()
    module.lr = 1e-2
    trainer = lightning_worker.pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False, callbacks=[compression()], default_root_dir=tmp_path
    )  # fmt: skip
    loader = DataLoader(TensorDataset(*examples()), batch_size=BATCH)
    Tuner(trainer).lr_find(module, loader, num_training=3)
    trainer.fit(module, loader)
    with pytest.raises(RuntimeError, match="Missing key"):
        module.load_state_dict({})


def test_the_best_checkpoint_of_lightning_from_before_a_cut_is_refused_in_one_line(tmp_path):
    class Tested(Module):
        def test_step(self, batch, index):
            self.log("loss", cross_entropy(self.net(batch[0]), batch[1]))

    module, loader = Tested(), DataLoader(TensorDataset(*examples()), batch_size=BATCH)
    trainer = lightning_worker.pl.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path,
        callbacks=[compression(), ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)],
    )  # fmt: skip
    trainer.fit(module, loader)
    assert trainer.test(module, loader)[0]["loss"] < 1
    with pytest.raises(laconic.CheckpointError, match=r"which has been cut since.* without ckpt_path"):
        trainer.test(module, loader, ckpt_path=tmp_path / "epoch=0.ckpt")
    with pytest.raises(RuntimeError, match="Missing key"):  # torch's own again
        module.load_state_dict({})


def test_each_part_of_a_lightning_module_has_a_callback_of_its_own(tmp_path):
    """Two optimizers by hand: a part's steps are those of the optimizer that holds it, which here steps every second time."""

    class Two(Module):
        def __init__(self):
            super().__init__()
            self.other = net()
            self.automatic_optimization = False

        def training_step(self, batch, index):
            for optimizer, part in zip(self.optimizers(), (self.other, self.net), strict=True):
                if part is self.net or index % 2:
                    optimizer.zero_grad()
                    self.manual_backward(cross_entropy(part(batch[0]), batch[1]))
                    optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.AdamW(part.parameters(), lr=1e-2) for part in (self.other, self.net)]

    x = examples()[0][:1]
    callbacks = [compression(module="net", example_inputs=x), compression(module="other", example_inputs=x, total_steps=STEPS // 2)]
    module = Two()
    lightning_worker.pl.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False, callbacks=[*callbacks], default_root_dir=tmp_path
    ).fit(module, DataLoader(TensorDataset(*examples()), batch_size=BATCH))  # fmt: skip
    assert [c.compressor.steps for c in callbacks] == [STEPS, STEPS // 2]
    assert [c.compressor.model for c in callbacks] == [module.net, module.other]
    dense = sum(p.numel() for p in net().parameters())
    assert all(sum(p.numel() for p in part.parameters()) <= 0.25 * dense for part in (module.net, module.other))


@pytest.mark.slow
@pytest.mark.skipif(not POSSIBLE, reason="needs torch.distributed with gloo, and fork")
def test_two_processes_of_lightning_end_alike_and_resume(tmp_path):
    two_processes("lightning_worker", str(tmp_path))
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert_same(first, second)
    assert_same(first["resumed"], first["whole"])
    assert_same(end(laconic.load(tmp_path / "whole", Module())), dict(first["whole"]["state"]))
    assert sum(p.numel() for p in laconic.load(tmp_path / "resumed", Module()).parameters()) <= 0.25 * sum(
        p.numel() for p in net().parameters()
    )


# ---- The Hugging Face Trainer ---------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """What the Trainer expects of a model."""

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x, labels=None):
        logits = self.net(x)
        return {"loss": cross_entropy(logits, labels), "logits": logits} if labels is not None else logits


def hf_callback(**keywords) -> hugging_face.CompressionCallback:
    """Of a run that is dense for more than an epoch, and settled after the fourth."""
    settings = {"budget": laconic.Budget(params=0.25), "schedule": SCHEDULE, "example_inputs": examples()[0][:1]}
    return hugging_face.CompressionCallback(**(settings | keywords))


def in_float() -> list[dict[str, torch.Tensor]]:
    return [{"x": x.float(), "labels": y} for x, y in zip(*examples(), strict=True)]


def hf_trainer(callback, place, model=None, data=None, optimizers=(None, None), **options) -> Trainer:
    defaults = {"num_train_epochs": EPOCHS, "per_device_train_batch_size": BATCH, "save_strategy": "epoch", "logging_strategy": "epoch"}
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "log_level": "error", "learning_rate": 1e-2, "weight_decay": 0.01}
    arguments = TrainingArguments(output_dir=str(place), **(defaults | quiet | options))
    data = data or [{"x": x, "labels": y} for x, y in zip(*examples(), strict=True)]
    return Trainer(model or Classifier(), arguments, train_dataset=data, callbacks=[callback], optimizers=optimizers)


@pytest.fixture(scope="module")
def hf_whole(tmp_path_factory):
    place = tmp_path_factory.mktemp("trainer")
    callback = hf_callback(directory=place / "compact")
    trainer = hf_trainer(callback, place)
    trainer.train()
    return trainer, callback, place


def test_the_trainer_meets_the_budget_and_saves(hf_whole):
    trainer, callback, place = hf_whole
    assert callback.report.params_after <= 0.25 * callback.report.params_before
    assert callback.report.params_after == sum(p.numel() for p in trainer.model.parameters())
    assert callback.compressor.steps == trainer.state.global_step == STEPS
    assert_same(end(laconic.load(place / "compact", Classifier())), end(trainer.model))
    logged = [entry for entry in trainer.state.log_history if "laconic/params_fraction" in entry]
    assert [entry["laconic/step"] for entry in logged[:3]] == [16, 32, 48]


def test_the_trainer_does_what_a_loop_of_ones_own_does(tmp_path):
    options = {"lr_scheduler_type": "constant", "max_grad_norm": 0, "save_strategy": "no"}
    trainer = hf_trainer(hf_callback(), tmp_path, **options)
    trainer.train()
    model = Classifier()
    groups = [{"params": [p for p in model.parameters() if (p.ndim > 1) == yes], "weight_decay": 0.01 * yes} for yes in (True, False)]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=True)
    compressor = laconic.Compressor(
        model, optimizer, budget=laconic.Budget(params=0.25), total_steps=STEPS, schedule=SCHEDULE, example_inputs=examples()[0][:1]
    )
    batches = hf_trainer(hf_callback(), tmp_path, **options).get_train_dataloader()
    for epoch in range(EPOCHS):
        batches.set_epoch(epoch)
        for batch in batches:
            model(**batch)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
    compressor.compact()
    assert_same(end(trainer.model), end(model))


@pytest.mark.parametrize("step", [16, 64, 96, 128])  # before the first cut, between cuts, when settled, at the end
def test_the_trainer_goes_on_from_a_checkpoint_exactly(hf_whole, step, tmp_path):
    whole, _, place = hf_whole
    checkpoint = str(place / f"checkpoint-{step}")
    callback = hf_callback(resume_from_checkpoint=checkpoint)
    trainer = hf_trainer(callback, tmp_path)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert_same(end(trainer.model), end(whole.model))
    assert callback.report.params_after == sum(p.numel() for p in whole.model.parameters())


def test_a_language_model_with_tied_weights_goes_on_exactly(tmp_path):
    ids = torch.randint(0, 30, (64, 12), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": x, "labels": x} for x in ids]
    ends = []
    for place, checkpoint in ((tmp_path / "whole", None), (tmp_path / "resumed", str(tmp_path / "whole/checkpoint-15"))):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=16, n_embd=32, n_layer=1, n_head=4))
        callback = hf_callback(budget=laconic.Budget(params=0.5), example_inputs=(ids[:2],), resume_from_checkpoint=checkpoint)
        trainer = hf_trainer(callback, place, model, data, max_steps=20, save_strategy="steps", save_steps=15)
        trainer.train(resume_from_checkpoint=checkpoint)
        assert callback.report.params_after <= 0.5 * callback.report.params_before
        ends.append(end(model))
    assert_same(*ends)


def test_callbacks_after_this_one_get_its_numbers(tmp_path):
    seen = {}

    class Later(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.update(logs)

    trainer = hf_trainer(hf_callback(), tmp_path, max_steps=20, save_strategy="no")
    trainer.add_callback(Later())
    trainer.train()
    assert seen["laconic/step"] == 20


def test_the_newest_checkpoint_is_found_as_the_trainer_finds_it(tmp_path):
    hf_trainer(hf_callback(), tmp_path, max_steps=20, save_steps=8, save_strategy="steps").train()
    shutil.rmtree(tmp_path / "checkpoint-20")
    callback = hf_callback(resume_from_checkpoint=True)
    trainer = hf_trainer(callback, tmp_path, max_steps=20, save_strategy="no")
    assert callback.compressor.steps == 16
    trainer.train(resume_from_checkpoint=True)
    assert callback.compressor.steps == 20


def test_the_trainer_takes_an_optimizer_that_is_given_with_more_in_it(hf_whole, tmp_path):
    ends = []
    for place, checkpoint in ((tmp_path / "whole", None), (tmp_path / "resumed", str(tmp_path / "whole/checkpoint-96"))):
        model, temperature = Classifier(), nn.Parameter(torch.ones(1))
        optimizer = torch.optim.AdamW([*model.parameters(), temperature], lr=1e-2)
        trainer = hf_trainer(hf_callback(resume_from_checkpoint=checkpoint), place, model, optimizers=(optimizer, None))
        trainer.train(resume_from_checkpoint=checkpoint)
        ends.append(end(model))
    assert_same(*ends)


@pytest.mark.usefixtures("another_accelerator")
def test_mixed_precision_of_the_trainer_is_planned_and_resumed_as_without(hf_whole, tmp_path):
    _, callback, _ = hf_whole
    x = examples()[0][:1].float()
    mixed = [hf_callback(example_inputs=x), hf_callback(example_inputs=x, resume_from_checkpoint=str(tmp_path / "checkpoint-96"))]
    first = hf_trainer(mixed[0], tmp_path, Classifier().float(), in_float(), bf16=True)
    first.train()
    again = hf_trainer(mixed[1], tmp_path, Classifier().float(), in_float(), bf16=True)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-96"))
    assert_same(end(again.model), end(first.model))
    assert [x.name for x in mixed[0].compressor._planned] == [x.name for x in callback.compressor._planned]
    assert len(callback.compressor.plan.neurons) == 2


def test_other_loads_before_the_trainer_starts_are_let_through(tmp_path):
    model = Classifier()
    hf_trainer(hf_callback(), tmp_path, model)
    missing = model.load_state_dict({**model.state_dict(), "extra": torch.zeros(1)}, strict=False)
    assert missing.unexpected_keys == ["extra"]


def refused_by_the_trainer(case, place, tmp_path, monkeypatch):
    checkpoint = str(place / "checkpoint-96")
    if case == "untold":
        hf_trainer(hf_callback(), tmp_path).train(resume_from_checkpoint=checkpoint)
    if case == "untold, dense":
        hf_trainer(hf_callback(), tmp_path).train(resume_from_checkpoint=str(place / "checkpoint-16"))
    told = partial(hf_callback, resume_from_checkpoint=checkpoint)
    if case == "another":
        hf_trainer(told(), tmp_path).train(resume_from_checkpoint=str(place / "checkpoint-112"))
    if case == "longer":
        hf_trainer(told(), tmp_path, num_train_epochs=9).train(resume_from_checkpoint=checkpoint)
    if case == "groups":
        trainer = hf_trainer(told(), tmp_path)
        monkeypatch.setattr(trainer, "get_decay_parameter_names", lambda model: ["net.4.weight"])
        monkeypatch.setattr(trainer, "_load_optimizer_and_scheduler", lambda checkpoint: None)
        trainer.train(resume_from_checkpoint=checkpoint)
    if case == "without":
        hf_trainer(transformers.TrainerCallback(), tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
        hf_trainer(hf_callback(resume_from_checkpoint=True), tmp_path)
    if case == "none there":
        hf_trainer(hf_callback(resume_from_checkpoint=True), tmp_path)
    if case == "damaged":
        (tmp_path / shared.STATE).write_bytes((place / "checkpoint-96" / shared.STATE).read_bytes()[:1000])
        hf_trainer(hf_callback(resume_from_checkpoint=str(tmp_path)), tmp_path)
    if case == "best":
        best = {"load_best_model_at_end": True, "eval_strategy": "no", "save_strategy": "best", "metric_for_best_model": "loss"}
        hf_trainer(hf_callback(), tmp_path, **best).train()
    if case == "batch size":
        hf_trainer(hf_callback(), tmp_path, auto_find_batch_size=True).train()
    if case == "shards":
        monkeypatch.setattr(hugging_face, "_distributed_kind", lambda: "FSDP")
        hf_trainer(hf_callback(), tmp_path).train()
    if case == "added":
        trainer = hf_trainer(transformers.TrainerCallback(), tmp_path)
        trainer.add_callback(hf_callback(resume_from_checkpoint=checkpoint))
        trainer.train()
    if case == "processes":
        monkeypatch.setattr(hugging_face, "world_size", lambda: 2)
        hf_trainer(hf_callback(), tmp_path).train()
    if case == "twice":
        trainer = hf_trainer(hf_callback(), tmp_path, max_steps=10, save_strategy="no")
        trainer.train()
        trainer.train()


TRAINER_REFUSES = {
    "untold": "pass CompressionCallback the same resume_from_checkpoint=",
    "untold, dense": "starts at step 16, and CompressionCallback was not told in time",
    "added": "starts at step 0, and CompressionCallback was not told in time",
    "batch size": "auto_find_batch_size starts the run again",
    "shards": "FSDP shards the model",
    "another": "another step than the checkpoint that CompressionCallback was given: 96 saved, 112 now",
    "longer": "another max_steps than the checkpoint that CompressionCallback was given: 128 saved, 144 now",
    "groups": "another parameters in the optimizer's groups",
    "without": "laconic.pt is missing",
    "none there": "there is no checkpoint in",
    "damaged": "cannot be read",
    "best": "load_best_model_at_end",
    "processes": "2 processes: the Trainer keeps its first DistributedDataParallel",
    "twice": "this callback has had its run",
}


@pytest.mark.parametrize("case", TRAINER_REFUSES)
def test_the_trainer_is_refused_what_cannot_work(case, hf_whole, tmp_path, monkeypatch):
    with pytest.raises(laconic.LaconicError) as refusal:
        refused_by_the_trainer(case, hf_whole[2], tmp_path, monkeypatch)
    assert TRAINER_REFUSES[case] in str(refusal.value)
    assert "\n" not in str(refusal.value)


# ---- Accelerate -----------------------------------------------------------------------------------------------------


def accelerated(place, resume_at=None, stop=STEPS):
    """A loop with Accelerate that saves after each epoch, and starts from a saved one."""
    accelerator = accelerate.Accelerator(cpu=True)
    model = net()
    x, y = examples()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(TensorDataset(x, y), batch_size=BATCH))
    compressor = laconic.Compressor(
        model, optimizer, budget=laconic.Budget(params=0.25), total_steps=STEPS, example_inputs=(x[:1],), schedule=SCHEDULE
    )
    register_for_checkpointing(accelerator, compressor)
    if resume_at is not None:
        accelerator.load_state(str(place / f"epoch-{resume_at}"))
    for epoch in range(0 if resume_at is None else resume_at + 1, EPOCHS):
        for inputs, labels in loader:
            accelerator.backward(cross_entropy(model(inputs), labels))
            optimizer.step()
            optimizer.zero_grad()
        if resume_at is None:
            accelerator.save_state(str(place / f"epoch-{epoch}"))
    return model, compressor


def test_accelerate_saves_and_goes_on_exactly(whole, tmp_path):
    model, compressor = accelerated(tmp_path)
    report = compressor.compact()
    assert_same(end(model), {name.removeprefix("net."): x for name, x in end(whole[0]).items()})
    for epoch in (0, 5):
        again, resumed = accelerated(tmp_path, resume_at=epoch)
        assert resumed.compact().params_after == report.params_after
        assert_same(end(again), end(model))


def test_two_compressors_of_one_accelerator_are_saved_together(tmp_path):
    def start():
        accelerator = accelerate.Accelerator(cpu=True)
        models = [accelerator.prepare(net()) for _ in range(2)]
        compressors = [laconic.Compressor(m, torch.optim.SGD(m.parameters(), lr=0.1), laconic.LowRank(strength=s)) for m, s in zip(models, (0.1, 0.2), strict=True)]  # fmt: skip
        return accelerator, compressors

    accelerator, compressors = start()
    register_for_checkpointing(accelerator, *compressors)
    with pytest.raises(laconic.InvalidValueError, match="register all of them in one call"):
        register_for_checkpointing(accelerator, compressors[0])
    accelerator.save_state(str(tmp_path))
    accelerator, compressors = start()
    register_for_checkpointing(accelerator, *compressors)
    accelerator.load_state(str(tmp_path))
    accelerator, compressors = start()
    register_for_checkpointing(accelerator, compressors[0])
    with pytest.raises(laconic.CheckpointError, match="the state of 2 compressors, 1 are registered"):
        accelerator.load_state(str(tmp_path))


@pytest.fixture
def another_accelerator():
    """Accelerate has one precision in a process."""
    accelerate.state.AcceleratorState._reset_state(True)
    yield
    accelerate.state.AcceleratorState._reset_state(True)


@pytest.mark.usefixtures("another_accelerator")
def test_a_model_under_mixed_precision_of_accelerate_is_planned_as_without():
    x, y = examples()[0].float(), examples()[1]
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = net().float()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    compressor = laconic.Compressor(model, optimizer, budget=laconic.Budget(params=0.25), total_steps=30, example_inputs=(x[:1],))
    assert [g.name for g in compressor.plan.neurons] == ["0", "2"]
    for _ in range(30):
        accelerator.backward(cross_entropy(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
    report = compressor.compact()
    assert report.params_after <= 0.25 * report.params_before
    assert model(x).shape == (len(x), 3)


def test_a_checkpoint_of_accelerate_without_laconic(tmp_path):
    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare(net())
    accelerator.save_state(str(tmp_path))
    compressor = laconic.Compressor(model, torch.optim.SGD(model.parameters(), lr=0.1), laconic.LowRank(strength=0.1))
    register_for_checkpointing(accelerator, compressor)
    with pytest.raises(laconic.CheckpointNotFoundError, match=r"laconic\.pt is missing"):
        accelerator.load_state(str(tmp_path))


# ---- What they share ------------------------------------------------------------------------------------------------


def test_another_optimizer_of_the_same_parameters_is_gone_over_to():
    x, y = examples()
    ends = []
    for moved in (False, True):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        compressor = laconic.Compressor(model, optimizer, budget=laconic.Budget(params=0.5), total_steps=30, example_inputs=(x[:1],))
        for step in range(30):
            if moved and step == 20:
                assert any(s.rank is not None for s in compressor.plan.sites) or any(len(g.kept) < 64 for g in compressor.plan.neurons)
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
                compressor.move_to(optimizer)
            cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert compressor.steps == 30
        compressor.compact()
        ends.append(end(model))
    assert_same(*ends)


def test_an_optimizer_of_other_parameters_is_refused():
    model = net()
    compressor = laconic.Compressor(model, torch.optim.SGD(model.parameters(), lr=0.1), laconic.LowRank(strength=0.1))
    with pytest.raises(laconic.OptimizerError, match=r"no longer holds 0\.weight"):
        compressor.move_to(torch.optim.SGD(net().parameters(), lr=0.1))
    with pytest.raises(laconic.OptimizerError, match="2 optimizers in the place of 1"):
        compressor.move_to([torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    other = laconic.Compressor(model, optimizer, laconic.LowRank(strength=0.1))
    with pytest.raises(laconic.OptimizerError, match="another Compressor is on this model and optimizer already"):
        compressor.move_to(optimizer)
    other.detach()
    compressor.move_to(optimizer)
    with pytest.raises(laconic.LaconicError, match="was detached"):
        other.move_to(optimizer)


ALONE = """
import importlib, json, sys
import laconic, laconic.integrations, laconic.report
found = {"imported": [n for n in ("lightning", "transformers", "accelerate", "matplotlib") if n in sys.modules]}
for name in ("lightning", "pytorch_lightning", "transformers"):
    sys.modules[name] = None  # an import fails
for name in ("lightning", "transformers"):
    try:
        importlib.import_module(f"laconic.integrations.{name}")
    except laconic.MissingExtraError as error:
        found[name] = str(error)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def alone() -> dict:
    """What a process that imports laconic has imported, and what it says where a package is missing."""
    return json.loads(subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("package", ["lightning", "transformers"])
def test_a_missing_package_is_named(package, alone):
    assert f"pip install 'laconic[{package}]'" in alone[package]


def test_laconic_itself_imports_no_trainer_and_nothing_that_draws(alone):
    assert alone["imported"] == []
