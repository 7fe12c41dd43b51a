import pytest
import torch

from fqt.errors import FqtError
from fqt.train import resolve
from fqt.train.graphs import Graphs
from fqt.train.trainer import Trainer


class Recorded:
    """Stands in for CUDA graphs: a recording leaves the generator as it was, a replay runs the call into the same
    tensors."""

    def __init__(self, memory=100):
        self.made = self.replayed = 0
        self.memory = memory

    def before(self, call):
        return call()

    def __call__(self, call):
        if self.made == self.memory:
            raise torch.cuda.OutOfMemoryError("no memory for a graph")
        self.made += 1
        state = torch.get_rng_state()
        found = tuple(torch.full_like(tensor, torch.nan) for tensor in call())
        torch.set_rng_state(state)

        def replay():
            self.replayed += 1
            for old, new in zip(found, call(), strict=True):
                old.copy_(new)

        return found, replay


def _noisy(batch):
    inputs, (targets,) = batch
    return inputs.sum() + targets.sum() + torch.rand(()), inputs.mean()


def _batch(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, generator=generator), (torch.randn(n, generator=generator),)


def test_replays_give_what_the_call_gives_and_leave_earlier_results_alone():
    record = Recorded()
    graphs = Graphs(_noisy, record)
    sizes = [4, 4, 6, 4, 4, 6, 6, 6, 4]
    torch.manual_seed(0)
    found = [graphs(_batch(n, i)) for i, n in enumerate(sizes)]
    torch.manual_seed(0)
    assert found == [_noisy(_batch(n, i)) for i, n in enumerate(sizes)]
    assert record.made == 2
    assert record.replayed == len(sizes) - 2 * 2


def test_shapes_beyond_what_memory_is_kept_for_run_as_they_are():
    record = Recorded()
    graphs = Graphs(lambda batch: (batch.sum(),), record)
    for _ in range(4):
        for n in range(1, 12):
            assert graphs(torch.ones(n)) == (n,)
    assert record.made == 8


def test_without_memory_for_another_graph_training_goes_on():
    record = Recorded(memory=1)
    graphs = Graphs(lambda batch: (batch.sum(),), record)
    for _ in range(4):
        for n in (1, 2, 3):
            assert graphs(torch.ones(n)) == (n,)
    assert record.made == 1
    assert record.replayed == 2


def test_gradients_that_stay_where_they_are_train_to_the_same_numbers():
    """On the CPU, before anything is recorded."""

    def trained(graph):
        trainer = Trainer(resolve("digits", None, {"batch_size": 128, "recipe": "psq8d", "device": "cpu"}))
        if graph:
            trainer._graphs = Graphs(trainer._pass, Recorded())
        for batch, _ in zip(trainer.batches(), range(2), strict=False):
            trainer.train_step(batch)
        return trainer.weights(), trainer.take_window()

    (plain, sums), (graphed, same) = trained(False), trained(True)
    assert sums == same
    assert all(torch.equal(plain[name], graphed[name]) for name in plain)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("recipe", ["none", "psq8d", "default"])
def test_on_a_gpu_graphs_train_to_the_same_numbers(recipe):
    def trained(graph):
        given = {"batch_size": 256, "recipe": recipe, "device": "cuda", "graph": graph, "amp": True}
        trainer = Trainer(resolve("digits", None, given))
        for batch, _ in zip(trainer.batches(), range(5), strict=False):
            trainer.train_step(batch)
        return trainer.weights(), trainer.take_window()

    torch.backends.cudnn.deterministic = True
    try:
        (plain, sums), (graphed, same) = trained(False), trained(True)
    finally:
        torch.backends.cudnn.deterministic = False
    assert sums == same
    assert all(torch.equal(plain[name], graphed[name]) for name in plain)


def test_graphs_are_for_a_gpu():
    with pytest.raises(FqtError, match="--graph records a step's launches on a GPU, and this run is on cpu"):
        Trainer(resolve("digits", None, {"device": "cpu", "graph": True}))


@pytest.mark.parametrize("other", [{"adapt": True}, {"compile": True}, {"accumulate": 2}, {"checkpointing": True}])
def test_what_graphs_do_not_go_with(other):
    (name,) = other
    with pytest.raises(FqtError, match=f"graph does not go with {name}: leave one out"):
        resolve("digits", None, {"graph": True, **other})
