import math

import pytest
import torch
from torch import nn

from fqt.errors import FqtError
from fqt.train import TrainConfig, resolve
from fqt.train.optim import learning_rate, make_optimizer, set_rate


def test_the_papers_imagenet_schedule():
    config = resolve(None, "imagenet-resnet50", {})
    per_epoch = 10
    for epoch in range(90):
        expected = 0.4 * (epoch + 1) / 4 if epoch < 4 else 0.2 * (1 + math.cos(math.pi * (epoch - 4) / 86))
        for step in (0, per_epoch - 1):
            rate = learning_rate(config, epoch * per_epoch + step, per_epoch, 90 * per_epoch)
            assert rate == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("total", [10, 97])
def test_one_cycle_is_pytorchs(total):
    config = TrainConfig(task="digits", lr=0.3, schedule="onecycle")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    oracle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=total, cycle_momentum=False)
    for step in range(total):
        assert learning_rate(config, step, 5, total) == pytest.approx(oracle.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        if step < total - 1:
            oracle.step()


@pytest.mark.parametrize("schedule", ["cosine", "onecycle", "constant", "linear", "inverse-sqrt"])
@pytest.mark.parametrize("unit", ["step", "epoch"])
@pytest.mark.parametrize("warmup", [0, 2])
@pytest.mark.parametrize("total", [1, 2, 3, 7, 12])
def test_rates_are_positive_and_never_above_the_peak(schedule, unit, warmup, total):
    config = TrainConfig(task="digits", lr=0.5, schedule=schedule, schedule_unit=unit, warmup_epochs=warmup)
    rates = [learning_rate(config, step, 3, total) for step in range(total)]
    assert all(0 < rate <= 0.5 for rate in rates)


def test_the_rate_ends_where_it_is_asked_to():
    for schedule, at_half in (("cosine", 0.55), ("linear", 0.55)):
        config = TrainConfig(task="digits", lr=1.0, min_lr=0.1, warmup_steps=10, schedule=schedule)
        assert learning_rate(config, 4, 5, 110) == pytest.approx(0.5)
        assert learning_rate(config, 60, 5, 110) == pytest.approx(at_half)
        assert learning_rate(config, 109, 5, 110) == pytest.approx(0.1, abs=0.02)


def test_warm_up_rises_from_its_start():
    config = TrainConfig(task="digits", lr=2.0, warmup_steps=10, warmup_start=0.2, schedule="linear")
    rates = [learning_rate(config, step, 5, 110) for step in range(12)]
    assert rates[:10] == pytest.approx([0.4 + 0.16 * (i + 1) for i in range(10)])
    assert rates[10:] == pytest.approx([2.0, 1.98])


def test_norms_have_a_rate_of_their_own():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    optimizer = make_optimizer(model, TrainConfig(task="digits", norm_lr_factor=64))
    set_rate(optimizer, 0.5)
    assert {group["lr"]: len(group["params"]) for group in optimizer.param_groups} == {0.5: 2, 32.0: 2}


def test_the_inverse_square_root_is_vaswanis():
    config = TrainConfig(task="digits", lr=5e-4, warmup_steps=4000, schedule="inverse-sqrt")
    for step in (0, 100, 3999, 4000, 20_000):
        expected = 5e-4 * 4000**0.5 * min((step + 1) ** -0.5, (step + 1) * 4000**-1.5)
        assert learning_rate(config, step, 100, 50_000) == pytest.approx(expected, rel=1e-12)


def test_optimizers_get_what_they_take():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    config = TrainConfig(
        task="digits", optimizer="adamw", beta1=0.8, beta2=0.95, decay_biases=False, weight_decay=0.1
    )
    optimizer = make_optimizer(model, config)
    assert isinstance(optimizer, torch.optim.AdamW)
    others, norms = optimizer.param_groups
    assert [id(p) for p in others["params"]] == [id(model[0].weight)]
    assert len(norms["params"]) == 3
    assert (others["betas"], others["weight_decay"], norms["weight_decay"]) == ((0.8, 0.95), 0.1, 0.0)
    assert isinstance(make_optimizer(model, config.replace(optimizer="torch.optim:RMSprop")), torch.optim.RMSprop)


def test_a_shorter_run_still_ends_its_schedule():
    config = TrainConfig(task="digits", lr=1.0)
    assert learning_rate(config, 19, 100, 20) < 0.01


def test_only_normalization_layers_are_exempt_from_weight_decay():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.GroupNorm(1, 2), nn.LayerNorm(4), nn.Linear(4, 3, bias=True)
    )
    model[4].weight.requires_grad_(False)
    config = TrainConfig(task="digits", weight_decay=0.01, momentum=0.8, nesterov=True)
    others, norms = make_optimizer(model, config).param_groups
    assert [id(p) for p in others["params"]] == [id(p) for p in (model[0].weight, model[0].bias, model[4].bias)]
    assert len(norms["params"]) == 6
    assert (others["weight_decay"], norms["weight_decay"]) == (0.01, 0.0)
    assert (others["momentum"], others["nesterov"]) == (0.8, True)


def test_a_shared_parameter_is_stepped_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    (group,) = make_optimizer(model, TrainConfig(task="digits")).param_groups
    assert len(group["params"]) == 3


def test_an_optimizer_without_a_readable_signature_is_refused():
    with pytest.raises(FqtError, match=r"optimizer torch:relu: cannot be made \(no signature"):
        make_optimizer(nn.Linear(1, 1), TrainConfig(task="digits", optimizer="torch:relu"))
