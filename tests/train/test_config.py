import warnings

import pytest

from fqt.errors import FqtError, FqtWarning
from fqt.records import read_toml, write_toml
from fqt.train import TrainConfig, preset_names, resolve
from fqt.train.config import differing, tell_of_presets

PAPER_CIFAR = {
    "task": "cifar10", "model": "preact-resnet56", "batch_size": 128, "epochs": 200, "lr": 0.1, "momentum": 0.9,
    "nesterov": False, "weight_decay": 1e-4, "norm_weight_decay": 0.0, "schedule": "cosine",
    "schedule_unit": "epoch", "warmup_epochs": 0, "label_smoothing": 0.0, "drop_last": True, "augment": True,
}  # fmt: skip
PAPER_IMAGENET = {
    "task": "imagefolder", "batch_size": 400, "epochs": 90, "lr": 0.4, "momentum": 0.875, "nesterov": False,
    "weight_decay": 3.0517578125e-05, "norm_weight_decay": 0.0, "schedule": "cosine", "schedule_unit": "epoch",
    "warmup_epochs": 4, "label_smoothing": 0.1, "augment": True, "image_size": 224,
}  # fmt: skip
SPEEDRUN = {  # published: lr 11.5·(1 − 0.85)/(2 − 0.85), from 0.2 to 0.07 of it; decay 0.0153/11.5, norms' over 64
    "batch_size": 1024, "steps": 475, "lr": 1.5, "min_lr": 0.105, "momentum": 0.85,
    "nesterov": True, "norm_lr_factor": 64.0, "schedule": "linear", "warmup_start": 0.2, "label_smoothing": 0.2,
    "average": 0.95, "average_power": 3.0, "lookahead": 5, "flip": "alternating", "shift": 2, "padding": "reflect",
    "test_views": True, "weight_decay": 1.33e-3, "norm_weight_decay": 2.08e-5,
}  # fmt: skip
PAPER = {
    "cifar10-resnet56": PAPER_CIFAR,
    "cifar10-speedrun": {**SPEEDRUN, "model": "speedrun"},
    "cifar10-speedrun-small": {**SPEEDRUN, "model": "speedrun-small"},
    "imagenet-resnet18": {**PAPER_IMAGENET, "model": "resnet18"},
    "imagenet-resnet50": {**PAPER_IMAGENET, "model": "resnet50"},
}


@pytest.mark.parametrize("name", PAPER)
def test_presets_have_the_papers_numbers(name):
    config = resolve(None, name, {})
    assert {key: getattr(config, key) for key in PAPER[name]} == PAPER[name]


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_and_survives_toml(name, tmp_path):
    config = resolve(None, name, {})
    write_toml(tmp_path / "c.toml", config.to_dict())
    assert TrainConfig.from_dict(read_toml(tmp_path / "c.toml")) == config


def test_flags_override_the_preset_and_the_preset_the_task(tmp_path):
    (tmp_path / "p.toml").write_text('task = "digits"\nlr = 0.5\nepochs = 3\n')
    config = resolve("digits", str(tmp_path / "p.toml"), {"epochs": 7, "momentum": None})
    assert (config.epochs, config.lr, config.batch_size) == (7, 0.5, 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"adapt": True, "accumulate": 2}, "leave accumulate at 1"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"epochs": 1.5}, "epochs must be an integer"),
        ({"epochs": True}, "epochs must be an integer"),
        ({"lr": 0}, "lr must be positive"),
        ({"lr": float("nan")}, "lr must be finite"),
        ({"lr": "fast"}, "lr must be a number"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\)"),
        ({"momentum": 0.0, "nesterov": True}, "nesterov needs"),
        ({"weight_decay": -1}, "weight_decay must not be negative"),
        ({"label_smoothing": 1.0}, "label_smoothing must lie"),
        ({"schedule": "step"}, "unknown schedule 'step'; known: cosine, onecycle, constant"),
        ({"schedule_unit": "hour"}, "unknown schedule_unit"),
        ({"flip": "always"}, "unknown flip 'always'; known: random, alternating"),
        ({"padding": "wrap"}, "unknown padding 'wrap'; known: zeros, reflect"),
        ({"shift": -1}, "shift must not be negative"),
        ({"lookahead": 5}, "lookahead and average_power need an average above 0"),
        ({"warmup_start": 1.0}, "warmup_start must lie"),
        ({"model": ""}, "model must not be empty"),
        ({"amp": 1}, "amp must be true or false"),
    ],
)
def test_senseless_values_are_refused(changes, message):
    with pytest.raises(FqtError, match=message):
        TrainConfig(task="digits", **changes)


def test_integers_given_for_floats_become_floats():
    assert isinstance(TrainConfig(task="digits", lr=1).lr, float)


def test_unknown_names_list_the_known_ones(tmp_path):
    with pytest.raises(FqtError, match=r"unknown preset 'x'; known: .*cifar10-resnet56"):
        resolve("digits", "x", {})
    with pytest.raises(FqtError, match="preset cifar10-resnet56 is for the task cifar10, not digits"):
        resolve("digits", "cifar10-resnet56", {})
    (tmp_path / "p.toml").write_text("learning_rate = 0.5\n")
    with pytest.raises(FqtError, match=r"unknown keys learning_rate; known: .*\blr\b"):
        resolve("digits", str(tmp_path / "p.toml"), {})
    (tmp_path / "p.toml").write_text("lr = = 0.5\n")
    with pytest.raises(FqtError, match="not a TOML file"):
        resolve("digits", str(tmp_path / "p.toml"), {})


def test_a_configuration_saved_before_a_field_existed_is_of_the_same_run():
    now = resolve("digits", None, {}).to_dict()
    before = {name: value for name, value in now.items() if name not in ("adapt", "rho", "adapt_every")}
    assert differing(before, now) == []
    assert differing(before, {**now, "adapt": True, "data": "elsewhere"}) == ["adapt"]
    assert differing({**now, "steps": 5}, before) == ["steps"]


def test_a_model_without_its_preset_is_said():
    with pytest.warns(FqtWarning, match="trained as cifar10 is by default; .* --preset cifar10-speedrun$"):
        tell_of_presets(resolve("cifar10", None, {"model": "speedrun"}))
    for task, given in (
        ("cifar10", {"model": "preact-resnet20"}),
        ("cifar10", {}),
        ("shakespeare", {"model": "mine:model"}),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tell_of_presets(resolve(task, None, given))
