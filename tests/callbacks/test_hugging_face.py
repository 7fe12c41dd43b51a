"""The callback of transformers' Trainer: what it logs, refuses, and keeps with a checkpoint."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fqt
import fqt.callbacks
from fqt.errors import FqtWarning
from tests.hugging_face import IDS, MODELS, VOCABULARY, transformers

pytest.importorskip("accelerate", reason="pip install '.[hf]'")
HuggingFaceCallback = fqt.callbacks.HuggingFaceCallback

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument"),  # accelerate's, without a GPU
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
TEXTS = torch.randint(3, VOCABULARY, (64, 6), generator=torch.Generator().manual_seed(7))


class Data(torch.utils.data.Dataset):
    def __init__(self, count: int = 64) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": TEXTS[index], "labels": TEXTS[index]}


def trainer(folder: Path, model: nn.Module, *callbacks: Any, count: int = 64, **options: Any) -> Any:
    settings = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
    }
    args = transformers.TrainingArguments(str(folder), **{**settings, **options})
    found = transformers.Trainer(model, args, train_dataset=Data(count), callbacks=list(callbacks))
    found.remove_callback(transformers.PrinterCallback)
    return found


def llama(recipe: str | None = "psq4") -> nn.Module:
    model = MODELS["llama"]()[0]
    return model if recipe is None else fqt.quantize_(model, recipe)


def readings(found: Any) -> dict[int, dict[str, float]]:
    return {entry["step"]: entry for entry in found.state.log_history if "rho" in entry}


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped hard": {"max_grad_norm": 1e-3},
    "not clipped": {"max_grad_norm": 0.0},
    "accumulated": {"gradient_accumulation_steps": 2},
    "bf16": {"bf16": True},
    "checkpoints": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_rho_is_logged(name: str, tmp_path: Path) -> None:
    model = llama()
    found = trainer(tmp_path, model, HuggingFaceCallback(every=2), **SETTINGS[name])
    found.train()
    logged = readings(found)
    assert list(logged) == [2, 4, 6]
    assert all(0 < entry["rho"] < math.inf for entry in logged.values())
    layers = {key.removeprefix("rho/") for key in logged[6]} - {"rho"}
    assert "model.layers.0.mlp.down_proj" in layers
    assert layers & set(dict(model.named_modules())) >= {"lm_head", "model.layers.0.self_attn.q_proj"}
    assert not model._forward_pre_hooks
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.parametrize("recipe", ["default", "shq8"])
def test_clipping_under_recipes_that_choose(recipe: str, tmp_path: Path) -> None:
    """Another last bit may choose another quantizer: no loss may be rescaled to make up for clipping."""
    found = trainer(tmp_path, llama(recipe), HuggingFaceCallback(every=1), max_grad_norm=1e-3, max_steps=2)
    found.train()
    assert list(readings(found)) == [2]


def test_rho_is_the_monitors(tmp_path: Path) -> None:
    """The numbers of fqt.Monitor called by hand before clipping; and training is not disturbed."""
    losses = []
    for callbacks in ([], [HuggingFaceCallback(every=1)]):
        found = trainer(tmp_path, llama(), *callbacks, max_grad_norm=1e-2, logging_steps=1, max_steps=3)
        found.train()
        losses.append([entry["loss"] for entry in found.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]

    by_hand = trainer(tmp_path, llama(), max_grad_norm=1e-2, max_steps=3)
    half = lambda batch: ({key: value[:2] if value.ndim else value / 2 for key, value in batch.items()}, 0.5)
    monitor = fqt.Monitor(by_hand.model, lambda model, batch: model(**batch).loss, every=1, half=half)
    clip, seen, real = by_hand._clip_grad_norm, [], by_hand.compute_loss

    def compute(model: nn.Module, inputs: Any, **more: Any) -> Any:
        seen[:] = [{**inputs, **more}]
        return real(model, inputs, **more)

    values: list[float] = []

    def clipped(model: nn.Module) -> Any:
        values.append(monitor.step(seen[0])["rho"])
        return clip(model)

    by_hand.compute_loss, by_hand._clip_grad_norm = compute, clipped
    by_hand.train()
    logged = [entry["rho"] for entry in readings(found).values()]
    assert logged == pytest.approx(values, rel=1e-3)


def test_a_smaller_last_batch_waits(tmp_path: Path) -> None:
    """10 samples in batches of 4: the third step of an epoch has 2, and its reading is that of the next."""
    found = trainer(tmp_path, llama(), HuggingFaceCallback(every=3), count=10, max_steps=5, logging_steps=1)
    found.train()
    assert list(readings(found)) == [1, 4]


def test_writers_before_it_see_rho_if_it_is_put_first(tmp_path: Path) -> None:
    class Writer(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.seen: list[bool] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
            self.seen += ["rho" in logs] if "loss" in logs else []

    writers = []
    for first in (False, True):
        writer, callback = Writer(), HuggingFaceCallback(every=2)
        found = trainer(tmp_path, llama(), writer, callback, max_steps=2)
        if first:
            assert callback.put_first(found) is callback
        found.train()
        writers.append(writer.seen)
    assert writers == [[False], [True]]


def test_the_recipe_is_kept_and_given_back(tmp_path: Path) -> None:
    """A float model that goes on from a checkpoint is converted, with an optimizer that was made before."""
    first = trainer(
        tmp_path, llama(), HuggingFaceCallback(every=2), max_steps=2, save_strategy="steps", save_steps=2
    )
    first.train()
    written = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text(encoding="utf-8"))
    saved = written["stateful_callbacks"]["HuggingFaceCallback"]["attributes"]["saved"]
    assert saved["readings"]["quantization"]["weight"] == 1.7  # of readings at steps 1 and 2
    assert saved["fqt_recipe"]["grad_input"] == "psq4"
    again = trainer(tmp_path, llama(None), HuggingFaceCallback(every=2), max_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    recipes = {m.fqt_recipe for m in again.model.modules() if "fqt_recipe" in m.__dict__}
    assert {recipe.grad_input for recipe in recipes} == {fqt.quantizer("psq4")}
    resumed = readings(again)
    assert sorted(resumed) == [2, 4]
    assert 0 < resumed[4]["rho"] < math.inf
    other = trainer(tmp_path, llama("psq8"), HuggingFaceCallback(every=None), max_steps=3)
    with pytest.warns(fqt.RecipeWarning, match="was trained with psq4, and the model has psq8"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_part_that_was_restored_is_float_again(tmp_path: Path) -> None:
    """A part has no configuration of its own, and the model's does not hear of it; the checkpoint does."""
    model = llama()
    fqt.restore_(model.lm_head)
    with pytest.warns(FqtWarning, match="float, though the recipe means them: lm_head"):
        trainer(
            tmp_path, model, HuggingFaceCallback(None), max_steps=1, save_strategy="steps", save_steps=1
        ).train()
    again = trainer(tmp_path, llama(None), HuggingFaceCallback(None), max_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert type(again.model.lm_head) is nn.Linear
    assert type(again.model.model.layers[0].mlp.up_proj) is not nn.Linear


def refused(folder: Path, model: nn.Module, match: str, every: int | None = 2, **options: Any) -> None:
    found = trainer(folder, model, HuggingFaceCallback(every), **options)
    with pytest.raises(fqt.FqtError, match=match) as error:
        found.train()
    assert "\n" not in str(error.value)
    assert every is None or "converted" in match or "every=None" in str(error.value)


def test_a_model_without_converted_layers(tmp_path: Path) -> None:
    refused(tmp_path, llama(None), "no converted layer: call fqt.quantize_")
    refused(tmp_path, llama(None), "no converted layer: call fqt.quantize_", every=None)


def test_a_recipe_without_gradient_quantizers(tmp_path: Path) -> None:
    refused(tmp_path, llama("qat"), "no layer quantizes its gradient")
    trainer(tmp_path, llama("qat"), HuggingFaceCallback(every=None), max_steps=1).train()


def test_label_smoothing(tmp_path: Path) -> None:
    refused(tmp_path, llama(), "label smoothing outside the model", label_smoothing_factor=0.1)


def test_a_batch_of_one_sample(tmp_path: Path) -> None:
    refused(tmp_path, llama(), "no halves .* accumulate several", per_device_train_batch_size=1)
    found = trainer(
        tmp_path, llama(), HuggingFaceCallback(2), per_device_train_batch_size=1, gradient_accumulation_steps=2
    )
    found.train()
    assert readings(found)


def test_reentrant_checkpoints(tmp_path: Path) -> None:
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    refused(tmp_path, llama(), "pass use_reentrant=False", **options)


def test_rho_of_the_whole_alone(tmp_path: Path) -> None:
    found = trainer(tmp_path, llama(), HuggingFaceCallback(2, layers=False), max_steps=2)
    found.train()
    assert {key for key in readings(found)[2] if key.startswith("rho")} == {"rho"}


def test_a_loss_outside_the_model(tmp_path: Path) -> None:
    found = trainer(tmp_path, llama(), HuggingFaceCallback(every=2))
    found.compute_loss_func = lambda outputs, labels, num_items_in_batch: outputs["logits"].square().mean()
    with pytest.raises(fqt.FqtError, match=r"the model returns no loss.*pass every=None"):
        found.train()


def test_another_loss_than_the_models(tmp_path: Path) -> None:
    found = trainer(tmp_path, llama(), HuggingFaceCallback(every=2), max_grad_norm=0.0)
    own = found.compute_loss
    found.compute_loss = lambda *args, **more: own(*args, **more) * 3
    with pytest.raises(
        fqt.FqtError, match=r"the gradients are 3 times those of this batch.*overridden compute_loss"
    ):
        found.train()


def test_several_gpus_in_one_process(tmp_path: Path) -> None:
    found = trainer(tmp_path, llama(), HuggingFaceCallback(every=None))
    found.args._n_gpu = 2
    with pytest.raises(fqt.FqtError, match="DataParallel, whose copies draw noise in no order"):
        found.callback_handler.on_train_begin(found.args, found.state, found.control)


@pytest.mark.parametrize("every", [0, -1, 2.5, True, "10"])
def test_odd_intervals(every: Any) -> None:
    with pytest.raises(fqt.FqtError, match="every must be at least 1 step"):
        HuggingFaceCallback(every)


def test_layers_that_came_after_conversion(tmp_path: Path) -> None:
    model = llama()
    model.set_output_embeddings(nn.Linear(16, VOCABULARY, bias=False))
    with pytest.warns(FqtWarning, match="float, though the recipe means them: lm_head"):
        trainer(tmp_path, model, HuggingFaceCallback(every=None), max_steps=1).train()


def test_accelerate_needs_nothing() -> None:
    """Prepared before conversion or after it: the plain loop's numbers, bit for bit."""
    from accelerate import Accelerator

    def run(prepare: str) -> tuple[list[Tensor], int]:
        torch.manual_seed(8)
        model = llama(None)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        accelerator = Accelerator(cpu=True)
        if prepare == "before":
            model, optimizer = accelerator.prepare(model, optimizer)
        fqt.quantize_(model, "psq4")
        if prepare == "after":
            model, optimizer = accelerator.prepare(model, optimizer)
        backward = accelerator.backward if prepare != "never" else Tensor.backward
        for _ in range(3):
            optimizer.zero_grad()
            backward(model(input_ids=IDS, labels=IDS).loss)
            optimizer.step()
        return [p.detach() for p in model.parameters()], sum("fqt_recipe" in m.__dict__ for m in model.modules())

    plain, layers = run("never")
    for when in ("before", "after"):
        found, count = run(when)
        assert count == layers
        assert all(map(torch.equal, found, plain))


def test_no_warning_of_ours(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FqtWarning)
        trainer(tmp_path, fqt.quantize_(MODELS["mixtral"]()[0], "psq8"), HuggingFaceCallback(every=1)).train()


class Masked(Data):
    """Texts of whose labels only those of every fourth one count in the first batch, and half of them later."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        counts = index % 4 == 0 if index < 4 else index % 4 > 1
        return {
            "input_ids": TEXTS[index],
            "labels": TEXTS[index] if counts else torch.full_like(TEXTS[index], -100),
        }


@pytest.mark.parametrize("in_batch", [True, False])
def test_samples_without_labels(in_batch: bool, tmp_path: Path) -> None:
    """Parts have as many labels; where only one sample has any, the next step is read."""
    found = trainer(tmp_path, llama(), HuggingFaceCallback(every=2), max_steps=3, logging_steps=1)
    found.train_dataset = Masked()
    found._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(found.train_dataset)
    found.model_accepts_loss_kwargs = in_batch
    with pytest.warns(FqtWarning, match="step 1, but at the next: fewer than two of its samples have labels"):
        found.train()
    assert list(readings(found)) == [2]
    assert 0 < readings(found)[2]["rho"] < math.inf


def test_nothing_is_computed_between_readings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []
    monkeypatch.setattr("fqt.callbacks.hugging_face.energy", lambda g: computed.append(g) or g.square().sum())
    model = llama()
    found = trainer(tmp_path, model, HuggingFaceCallback(every=4), max_steps=3)
    found.train()
    assert len(computed) == 2 * len(list(model.parameters()))  # of the first step, before clipping and after
