"""Converted layers whose parameters `fully_shard` deals out, in two processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fqt

from .worker import RECIPES, batch, net


@pytest.mark.parametrize("when", [1, 2], ids=["converted before", "converted after"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_are_the_mean_of_the_processes_own(ranks: list[dict[str, Any]], recipe: str, when: int) -> None:
    """The same draws as plain layers make on each process: other noise on each, averaged, equal on both."""
    plain = ranks[0]["fsdp"][recipe][0]
    first, second = (rank["fsdp"][recipe][when] for rank in ranks)
    for name, gradient in plain.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], gradient, rtol=1e-6, atol=1e-8)


def test_a_checkpoint_is_one_processs(ranks: list[dict[str, Any]]) -> None:
    """The whole state dict loads into a model that is not sharded, and computes the same."""
    found = ranks[0]["fsdp"]
    model = fqt.quantize_(net(), "psq4").eval()
    model.load_state_dict(found["weights"])
    assert not torch.equal(model[1].weight, net()[1].weight)
    torch.testing.assert_close(model(batch(0)), found["output"], rtol=1e-6, atol=1e-7)


def test_mixed_precision(ranks: list[dict[str, Any]]) -> None:
    """Computed in bfloat16, parameters and their gradients in float32."""
    assert ranks[0]["fsdp"]["dtypes"] == (torch.bfloat16, torch.float32)


def test_a_monitor_refuses_and_layers_are_restored(ranks: list[dict[str, Any]]) -> None:
    assert "sharded over processes (DTensor)" in ranks[0]["fsdp"]["refused"]
    assert "\n" not in ranks[0]["fsdp"]["refused"]
    assert ranks[0]["fsdp"]["restored"][1] == "FSDPLinear"
