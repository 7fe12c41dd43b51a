"""The callbacks in two processes, each with the whole model: one reading, of the averaged gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import multiprocessing

pytest.importorskip("accelerate", reason="pip install '.[hf]'")
pytest.importorskip("lightning.pytorch", reason="pip install '.[lightning]'")

from tests.callbacks.worker import HUGGING_FACE, LIGHTNING, main


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process saw."""
    folder = tmp_path_factory.mktemp("callbacks")
    multiprocessing.spawn(main, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize(
    ("trainer", "setting"),
    [
        (trainer, name)
        for trainer, names in (("hugging face", HUGGING_FACE), ("lightning", LIGHTNING))
        for name in names
    ],
)
def test_rho_is_the_monitors(trainer: str, setting: str, ranks: list[dict[str, Any]]) -> None:
    """The numbers of fqt.Monitor called by hand before clipping, the same on both processes."""
    (logged, by_hand), (others, other) = (rank[trainer][setting] for rank in ranks)
    assert list(logged) == [1, 2, 3]
    rho = [line["rho"] for line in logged.values()]
    assert rho == pytest.approx(by_hand, rel=1e-3)
    assert all(value > 0 for value in rho)
    assert by_hand == other
    assert [line["rho"] for line in others.values()] in ([], rho)  # Lightning writes logs on the first alone


def test_training_is_not_disturbed(ranks: list[dict[str, Any]]) -> None:
    without, read = ranks[0]["undisturbed"]
    assert all(map(torch.equal, without, read))
    assert all(map(torch.equal, read, ranks[1]["undisturbed"][1]))


def test_a_step_that_one_process_cannot_read(ranks: list[dict[str, Any]]) -> None:
    """It is left out on both, with a warning; none waits for the other, and training goes on."""
    for rank in ranks:
        steps, (said,) = rank["refused"]["hugging face"]
        assert steps == [1, 3, 4]
        assert "no reading of ρ at step 2, but at the next: fewer than two of its samples have labels" in said
    (steps, (own,)), (_, (other,)) = (rank["refused"]["lightning"] for rank in ranks)
    assert steps == [1, 3, 4]
    assert "no reading of ρ at step 2: a batch of one sample has no halves" in own
    assert "no reading of ρ at step 2: another process refused its part" in other


def test_models_that_are_spread(ranks: list[dict[str, Any]]) -> None:
    for kind, message in zip(("FSDP", "DeepSpeedStrategy"), ranks[0]["spread"], strict=True):
        assert f"not under {kind}: pass every=None" in message
        assert "\n" not in message
