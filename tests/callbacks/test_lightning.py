"""The callback of Lightning's Trainer: what it logs, refuses, and keeps with a checkpoint."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fqt
import fqt.callbacks

lightning = pytest.importorskip("lightning.pytorch", reason="pip install '.[lightning]'")
LightningCallback = fqt.callbacks.LightningCallback

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*Consider setting `persistent_workers"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class Net(lightning.LightningModule):
    def __init__(self, recipe: str | None = "psq4", factor: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
        self.factor = factor
        if recipe is not None:
            fqt.quantize_(self.net, recipe)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return {"loss": loss}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Log(lightning.loggers.logger.DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.lines.append((step or 0, dict(metrics)))


def data(count: int = 48) -> Any:
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(count, 8, generator=generator), torch.randint(3, (count,), generator=generator)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)


def trainer(folder: Path, *callbacks: Any, **options: Any) -> Any:
    settings = {
        "max_steps": 6,
        "accelerator": "cpu",
        "devices": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "log_every_n_steps": 1,
        "default_root_dir": folder,
        "logger": Log(),
    }
    return lightning.Trainer(callbacks=list(callbacks), **{**settings, **options})


def readings(found: Any) -> dict[int, dict[str, float]]:
    return {step: line for step, line in found.logger.lines if "rho" in line}


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"gradient_clip_val": 1e-3},
    "accumulated": {"accumulate_grad_batches": 2},
    "bf16": {"precision": "bf16-mixed"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_rho_is_logged(name: str, tmp_path: Path) -> None:
    model, found = Net(), trainer(tmp_path, LightningCallback(every=2), **SETTINGS[name])
    found.fit(model, data())
    logged = readings(found)
    assert list(logged) == [1, 2, 4, 6]
    assert all(set(line) == {"rho", "rho/net.0", "rho/net.3"} for line in logged.values())
    assert all(0 < line["rho"] < math.inf for line in logged.values())
    assert found.callback_metrics["rho"] == pytest.approx(logged[6]["rho"])
    assert "training_step" not in vars(model)
    assert not {"log", "log_dict"} & set(vars(model))


def test_training_and_its_logs_are_not_disturbed(tmp_path: Path) -> None:
    losses = []
    for callbacks in ([], [LightningCallback(every=1)]):
        torch.manual_seed(3)
        found = trainer(tmp_path, *callbacks)
        found.fit(Net(), data())
        losses.append([line["train_loss"] for _, line in found.logger.lines if "train_loss" in line])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6


def test_rho_is_the_monitors(tmp_path: Path) -> None:
    """The numbers of fqt.Monitor in a loop of one's own that draws the same masks and noise."""

    class Seeded(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            torch.manual_seed(batch_idx)

    found = trainer(tmp_path, LightningCallback(every=1), gradient_clip_val=1e-3)
    found.fit(Seeded(), data())
    model, values = Net(), []
    optimizer = model.configure_optimizers()
    loss_fn = lambda net, batch: nn.functional.cross_entropy(net(batch[0]), batch[1])
    monitor = fqt.Monitor(model.net, loss_fn, every=1)
    for index, batch in enumerate(data()):
        torch.manual_seed(index)
        optimizer.zero_grad()
        loss_fn(model.net, batch).backward()
        values.append(monitor.step(batch)["rho"])
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
    assert [line["rho"] for line in readings(found).values()] == pytest.approx(values, rel=1e-5)


def test_the_recipe_is_kept_and_given_back(tmp_path: Path) -> None:
    first = trainer(tmp_path, LightningCallback(every=2), max_steps=3)
    first.fit(Net(), data(24))
    path = tmp_path / "last.ckpt"
    first.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    assert fqt.nn.load_recipe(saved["fqt_recipe"]).grad_input == fqt.quantizer("psq4")
    model, again = Net(None), trainer(tmp_path, LightningCallback(every=2))
    again.fit(model, data(24), ckpt_path=path)
    assert fqt.recipe_of(model) == fqt.recipe_of(Net())
    assert list(readings(again)) == [4, 6]
    with pytest.warns(fqt.RecipeWarning):
        trainer(tmp_path, LightningCallback(every=None)).fit(Net("psq8"), data(24), ckpt_path=path)


def refused(folder: Path, model: Any, match: str, every: int | None = 2, **options: Any) -> None:
    found = trainer(folder, LightningCallback(every), **options)
    with pytest.raises(fqt.FqtError, match=match):
        found.fit(model, data())
    assert "training_step" not in vars(model)


def test_models_that_have_nothing_to_read(tmp_path: Path) -> None:
    refused(tmp_path, Net(None), "no converted layer: call fqt.quantize_")
    refused(tmp_path, Net(None), "no converted layer: call fqt.quantize_", every=None)
    refused(tmp_path, Net("qat"), "no layer quantizes its gradient")


def test_manual_optimization(tmp_path: Path) -> None:
    model = Net()
    model.automatic_optimization = False
    refused(tmp_path, model, "with manual optimization no callback knows")


def test_gradients_that_are_not_the_batchs(tmp_path: Path) -> None:
    class Scaled(Net):
        def on_after_backward(self) -> None:
            for p in self.parameters():
                p.grad.mul_(2.0)

    refused(tmp_path, Scaled(), "the gradients are 2 times those of this batch")


def test_a_later_refusal_is_a_warning(tmp_path: Path) -> None:
    class Later(Net):
        def on_after_backward(self) -> None:
            if self.trainer.global_step == 3:
                for p in self.parameters():
                    p.grad.mul_(20.0)

    found = trainer(tmp_path, LightningCallback(every=2))
    with pytest.warns(fqt.errors.FqtWarning, match="no reading of ρ at step 4: the gradients are 20 times"):
        found.fit(Later(), data())
    assert list(readings(found)) == [1, 2, 6]
