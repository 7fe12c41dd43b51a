"""The speedrun net, and what its recipe has of the task and the optimizer."""

import shutil

import pytest
import torch
from torch import nn

import fqt
from fqt.errors import FqtError
from fqt.train import Interrupted, build_model, resolve, train
from fqt.train.average import Average
from fqt.train.config import TrainConfig
from fqt.train.images import views
from fqt.train.models.speedrun import Whitening
from fqt.train.tasks import load_task
from fqt.train.trainer import Trainer

from .test_loaders import write_cifar


def _smooth_images(count=64, channels=3, side=12):
    """Neighbours and channels alike, as in photographs: components' deviations differ a hundredfold."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 1, 1, 1, generator=generator) + 0.1 * torch.randn(
        count, 1, side, side, generator=generator
    )
    return x + 0.05 * torch.randn(count, channels, side, side, generator=generator)


def test_whitened_patches_have_the_identity_for_second_moments():
    images = 10 * _smooth_images()
    with torch.no_grad():
        y = Whitening(3, images)(images).transpose(0, 1).flatten(1)
    assert y.shape[0] == 24
    torch.testing.assert_close(y[:12] @ y[:12].T / y.shape[1], torch.eye(12), rtol=0, atol=0.06)
    torch.testing.assert_close(y[12:], -y[:12])


def test_eight_bits_keep_every_component():
    images = _smooth_images()
    exact = Whitening(3, images)
    folded = nn.Conv2d(3, 24, 2, bias=False)
    with torch.no_grad():
        folded.weight.copy_(exact.filters.weight * exact.scale.view(-1, 1, 1, 1))
        y = exact(images)
        estimates = (fqt.quantize_(module, "ptq8")(images) for module in (Whitening(3, images), folded))
        apart, together = ((e - y).square().mean((0, 2, 3)) / y.square().mean((0, 2, 3)) for e in estimates)
    assert float(apart.max()) < 0.1
    assert float(together[0]) > 100 * float(apart[0])


def test_only_the_bias_of_the_whitening_is_learned():
    model = build_model("speedrun-small", in_channels=3, num_classes=10)
    model(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))).sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without == ["features.0.filters.weight", *(f"features.{i}.weight" for i in (4, 7, 11, 14, 18, 21))]


def test_convolutions_hand_on_their_input():
    convolution = build_model("speedrun-small", in_channels=3, num_classes=10).get_submodule("features.6")
    x = torch.randn(2, 32, 5, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(convolution(x), x)


def test_images_too_small(small):
    with pytest.raises(
        FqtError, match="take images of 9×9 pixels at least, these have 8×8: choose another --model"
    ):
        Trainer(small(model="speedrun"))


@pytest.fixture
def config(tmp_path):
    """A few steps of the speedrun's recipe on random images."""
    write_cifar(tmp_path / "data")
    shutil.copy(tmp_path / "data" / "data_batch_2", tmp_path / "data" / "test_batch")

    def make(**changes):
        few = {"batch_size": 8, "steps": 6, "warmup_steps": 2, "lookahead": 2, "data": str(tmp_path / "data")}
        return resolve("cifar10", "cifar10-speedrun-small", {**few, "device": "cpu", **changes})

    return make


def test_the_net_starts_from_the_data_and_runs_on_integers(config):
    trainer = Trainer(config(recipe="default"))
    again = Trainer(config(recipe="none", seed=0))
    scale = trainer.model.get_buffer("features.0.scale")
    assert torch.equal(scale, again.model.get_buffer("features.0.scale"))
    assert float(scale.max()) < 1  # uniform pixels, divided by a quarter, have a deviation above one
    batch = next(trainer.batches())
    trainer.train_step(batch)
    report = str(fqt.explain(trainer.model, batch[0]))
    assert "100 % integer" in report
    assert "cannot see" not in report


def test_an_interrupted_run_continues_to_the_same_numbers(config, tmp_path, metrics, interruption):
    train(config(recipe="bhq5"), tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(config(recipe="bhq5"), tmp_path / "cut", observer=interruption(3))
    train(config(recipe="bhq5"), tmp_path / "cut", resume=True)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    evaluations = [line["metrics"] for line in metrics(tmp_path / "whole") if line["kind"] == "eval"]
    assert ["accuracy of views" in values for values in evaluations] == [False, False, True]


def test_six_views_of_an_image():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    found = views(x, mirror=True)
    assert [share for share, _ in found] == [0.25, 0.25, 0.125, 0.125, 0.125, 0.125]
    assert torch.equal(found[0][1], x)
    assert torch.equal(found[2][1][..., 1:, 1:], x[..., :-1, :-1])
    assert torch.equal(found[4][1][..., :-1, :-1], x[..., 1:, 1:])
    for (_, view), (_, flipped) in zip(found[::2], found[1::2], strict=True):
        assert torch.equal(view.flip(-1), flipped)
    assert [share for share, _ in views(x, mirror=False)] == [0.5, 0.25, 0.25]


class Corner(nn.Module):
    """Says class 1 where the first pixel is above zero."""

    def forward(self, x):
        first = x[:, :1, 0, 0]
        return torch.cat([-first, first], 1)


def test_views_are_judged_together(small):
    task = load_task(small(test_views=True), torch.device("cpu"))
    images = torch.tensor([[-3.0, 0, 2], [0, 4, 0], [0, 0, 0]]).view(1, 1, 3, 3)
    task.eval = lambda: iter([(images, torch.tensor([1]))])
    # The first pixel of the six: -3, 2 (twice a quarter); 4 in all others (an eighth each).
    assert task.score(Corner(), amp=False) == {"accuracy of views": 1.0}
    assert [metric.name for metric in task.metrics] == ["accuracy", "accuracy of views"]


@pytest.mark.parametrize("every", [0, 3])
def test_averages_are_those_of_a_loop(every):
    config = TrainConfig(task="digits", average=0.9, average_power=2, lookahead=every)
    model = nn.BatchNorm1d(2)
    average = Average(model, config, 12)
    weight = buffer = None
    for step in range(1, 13):
        with torch.no_grad():
            model.weight += step
            model.running_mean += 2 * step
        now = model.weight.clone(), model.running_mean.clone()
        average.update(model, step)
        if every and step % every:
            assert torch.equal(model.weight, now[0])
            continue
        keep = 0.9 ** max(every, 1) * (step / 12) ** 2
        weight = now[0] if weight is None else keep * weight + (1 - keep) * now[0]
        buffer = now[1] if buffer is None else keep * buffer + (1 - keep) * now[1]
        torch.testing.assert_close(average.model.weight, weight)
        torch.testing.assert_close(average.model.running_mean, buffer)
        assert torch.equal(model.weight, average.model.weight if every else now[0])
        assert torch.equal(model.running_mean, now[1])


def test_folders_of_images_refuse_what_they_do_not_have(tmp_path):
    with pytest.raises(FqtError, match="leave --flip, --shift and --padding out"):
        load_task(resolve("imagefolder", None, {"flip": "alternating", "data": str(tmp_path)}), torch.device("cpu"))
