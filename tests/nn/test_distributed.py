"""Distributed data parallel: independent noise on every rank, equal gradients after the reduction."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import multiprocessing, nn

import fqt
from fqt import FqtError, Recipe
from fqt.nn import load_recipe

from .cases import parameter_gradients, small_batch, small_net
from .worker import main, wide_batch, wide_net


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(main, args=(str(folder),), nprocs=2)
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(2)]


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


def test_weights_stay_equal(ranks: list[dict]) -> None:
    assert all(map(torch.equal, ranks[0]["weights"], ranks[1]["weights"]))


def test_remembered_ranges_are_the_first_ranks(ranks: list[dict]) -> None:
    """Each rank learns from its own gradients; a forward pass makes all begin from the first one's."""
    (*apart, together), (*others, same) = (rank["ranges"] for rank in ranks)
    for number, (mine, theirs) in enumerate(zip(apart, others, strict=True), 1):
        moved = [key for key in mine if int(mine[key][0]) > 0]
        assert all(int(mine[key][0]) == int(theirs[key][0]) == number for key in moved)
        assert any(not torch.equal(mine[key], theirs[key]) for key in moved)
    for key, state in apart[-1].items():
        assert torch.equal(state, together[key])
        assert torch.equal(state, same[key])


def whole_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """As the worker's, in one process."""
    x = wide_batch().requires_grad_()
    output = model(x)
    output.square().sum().backward()
    found = {"output": output.detach(), "input": x.grad}
    return found | {n: p.grad.flatten() for n, p in model.named_parameters()}  # type: ignore[return-value, union-attr]


def test_tensor_parallel_is_the_layer_on_shards(ranks: list[dict]) -> None:
    """Column- and row-parallel: on every rank the same; without recipe the float network's gradients.

    With 8-bit operands within a hundredth: steps are of the shard, so codes differ from one process's.
    """
    for recipe, slack in (("none", 1e-6), ("qat", 0.02)):
        first, second = (rank["sharded"][recipe][0] for rank in ranks)
        wanted = whole_gradients(wide_net() if recipe == "none" else fqt.quantize_(wide_net(), recipe))
        for name, value in wanted.items():
            assert torch.equal(first[name], second[name])
            assert (first[name] - value).norm() <= slack * value.norm()


@pytest.mark.parametrize("placed", ["psq4", "replicas"])
def test_tensor_parallel_gradients_are_unbiased(ranks: list[dict], placed: str) -> None:
    """Mean of 96 draws against the exact gradient on the same shards: within 7 standard errors.

    False alarms: below 1e-7 for 200 entries of normal noise (t of 95 degrees).
    """
    whole = whole_gradients(fqt.quantize_(wide_net(), "qat"))
    exact = whole if placed == "replicas" else ranks[0]["sharded"]["qat"][0]
    draws = ranks[0]["sharded"][placed]
    for name in ("input", "0.weight", "2.weight"):
        sample = torch.stack([draw[name] for draw in draws]).double()
        error = (sample.mean(0) - exact[name]).abs()
        assert sample.std(0).any()
        assert (error <= 7 * sample.std(0) / 96**0.5 + 1e-5 * exact[name].abs().max()).all()


def test_replicas_average_their_noise(ranks: list[dict]) -> None:
    """The same gradients on both processes, with half the variance of one's, within a quarter.

    96 draws of d independent entries tell a ratio of variances to √(4/95d): the quarter is 4 of these with d = 11
    (the least layer has 40 entries).
    """
    first, second = (rank["sharded"]["replicas"] for rank in ranks)
    assert all(torch.equal(a[n], b[n]) for a, b in zip(first, second, strict=True) for n in a)
    alone = fqt.quantize_(wide_net(), "psq4")
    torch.manual_seed(8)
    single = []
    for _ in range(96):
        alone.zero_grad()
        single.append(whole_gradients(alone))
    for name in ("input", "0.weight", "2.weight"):
        mean, one = (torch.stack([draw[name] for draw in draws]).var(0).sum() for draws in (first, single))
        assert mean == pytest.approx(0.5 * float(one), rel=0.25)


def test_batches_in_shards(ranks: list[dict]) -> None:
    """Parameters whole, samples dealt out: each process quantizes its own."""
    from torch.distributed.tensor import Shard

    for name, layer in (("data", wide_net()), ("images", nn.Conv1d(9, 4, 1))):
        placements, output = ranks[0]["sharded"][name]
        assert placements == (Shard(0),)
        assert torch.equal(output, ranks[1]["sharded"][name][1])
        assert output.shape == torch.Size((2, *layer(wide_batch()[:1]).shape[1:]))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("plain", "plain: input"),
        ("apart", "use ColwiseParallel"),
        ("remembers", "on sharded tensors"),
    ],
)
def test_what_cannot_be_sharded_is_refused(ranks: list[dict], name: str, words: str) -> None:
    error = ranks[1]["sharded"][name]
    assert isinstance(error, FqtError)
    assert words in str(error)
    assert "\n" not in str(error)
