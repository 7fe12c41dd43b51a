"""Distributed data parallel: independent noise on every rank, equal gradients after the reduction."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import multiprocessing

import fqt
from fqt import Recipe
from fqt.nn import load_recipe

from .cases import parameter_gradients, small_batch, small_net
from .worker import main


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(main, args=(str(folder),), nprocs=2)
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("recipe", ["psq4", "default"])
def test_equal_seeds_on_both_ranks_give_different_noise(ranks: list[dict], recipe: str) -> None:
    """Uncorrelated errors: the mean inner product over 24 draws is zero (t-test at 6, false alarms 4e-6 a name).

    Entries of one draw are no sample: few noise numbers make many of them.
    """
    first, second = (rank[recipe][2] for rank in ranks)
    own = load_recipe(recipe)
    qat = Recipe(input=own.input, weight=own.weight)
    exact = parameter_gradients(fqt.quantize_(small_net(), qat), small_batch())
    for name in ("0.weight", "3.weight", "6.weight"):
        errors = [torch.stack([draw[name] - exact[name] for draw in draws]).flatten(1) for draws in (first, second)]
        assert all(e.any(1).all() for e in errors)
        products = (errors[0] * errors[1]).sum(1)
        same = errors[0].square().sum(1)  # what the products would be if the noise were shared
        t, shared = (float(v.mean() / v.std() * 24**0.5) for v in (products, same))
        assert abs(t) < 6 < shared


@pytest.mark.parametrize("recipe", ["qat", "psq4", "default"])
def test_gradients_agree_and_are_the_mean(ranks: list[dict], recipe: str) -> None:
    local, reduced = ([rank[recipe][i] for rank in ranks] for i in (0, 1))
    for name in local[0]:
        assert torch.equal(reduced[0][name], reduced[1][name])
        mean = (local[0][name] + local[1][name]) / 2
        torch.testing.assert_close(reduced[0][name], mean, rtol=1e-5, atol=1e-7)


def test_rank_zero_is_what_one_process_gives(ranks: list[dict]) -> None:
    """So that a run is the same with and without a process group of one."""
    model = fqt.quantize_(small_net(), "psq4")
    torch.manual_seed(5)
    mine = parameter_gradients(model, small_batch())
    assert all(torch.equal(mine[n], ranks[0]["psq4"][0][n]) for n in mine)


def test_qat_has_no_noise(ranks: list[dict]) -> None:
    first, second = (rank["qat"][0] for rank in ranks)
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_a_monitor_refuses_averages_over_ranks(ranks: list[dict]) -> None:
    assert all("averages gradients over 2 processes" in rank["refused"] for rank in ranks)


def test_weights_stay_equal(ranks: list[dict]) -> None:
    assert all(map(torch.equal, ranks[0]["weights"], ranks[1]["weights"]))
