"""For two processes: a Lightning run with DistributedDataParallel, whole and resumed after a cut. `net`, `fit` are the tests' too."""

import logging
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import laconic

with warnings.catch_warnings():  # of the packages that it imports
    warnings.simplefilter("ignore")
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint

    from laconic.integrations.lightning import CompressionCallback

EPOCHS, BATCH = 8, 16
SCHEDULE = laconic.Schedule(warmup=0.15, settle=0.5)
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)).double()


def examples() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(256, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x, x[:, :3].argmax(1)


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = net()
        self.example_input_array = torch.zeros(1, 20, dtype=torch.float64)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit(callback, directory, module=None, ckpt_path=None, every_epoch=False, more=(), **trainer):
    module = module or Module()
    callbacks = [callback, *more, *([ModelCheckpoint(dirpath=directory, filename="{epoch}", save_top_k=-1)] if every_epoch else [])]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": every_epoch}
    options = {"max_epochs": EPOCHS, "accelerator": "cpu", "devices": 1, "default_root_dir": directory} | quiet | trainer
    size = BATCH // options["devices"]
    loader = DataLoader(TensorDataset(*examples()), batch_size=size, shuffle=False)
    pl.Trainer(callbacks=callbacks, **options).fit(module, loader, ckpt_path=ckpt_path)
    return module


def compression(**keywords) -> CompressionCallback:
    """Of a run that is dense for more than an epoch, cut on the way, and settled after the fourth."""
    return CompressionCallback(**({"budget": laconic.Budget(params=0.25), "schedule": SCHEDULE} | keywords))


def main(folder: str) -> None:
    out, found = Path(folder), {}
    for name, ckpt_path in (("whole", None), ("resumed", out / "epoch=5.ckpt")):
        callback = compression(directory=out / name)
        module = fit(
            callback, out, ckpt_path=ckpt_path, every_epoch=name == "whole", devices=2, strategy="ddp", use_distributed_sampler=True
        )
        found[name] = {"state": module.state_dict(), "cuts": callback.compressor.metrics()["laconic/cuts"]}
    torch.save(found, out / f"rank{torch.distributed.get_rank()}.pt")
