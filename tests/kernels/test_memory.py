"""Memory that is used again: never while somebody holds it, and little more than once was needed."""

from __future__ import annotations

import gc
import os
import pickle
import resource
import threading
from pathlib import Path

import pytest
import torch

from fqt.kernels.cpu import memory

MB = 1 << 20


@pytest.fixture(autouse=True)
def blocks(monkeypatch: pytest.MonkeyPatch) -> memory._Blocks:
    """A store of its own for every test."""
    fresh = memory._Blocks()
    monkeypatch.setattr(memory, "_blocks", fresh)
    return fresh


def test_a_block_is_used_again_when_its_tensor_is_gone(blocks: memory._Blocks) -> None:
    first = memory.empty((2 * MB,), torch.uint8)
    address = first.data_ptr()
    assert memory.empty((2 * MB,), torch.uint8).data_ptr() != address
    view = first.view(torch.float32)[5:]
    del first
    assert memory.empty((2 * MB,), torch.uint8).data_ptr() != address, "a view still holds it"
    del view
    gc.collect()
    assert memory.empty((MB // 2,), torch.float32).data_ptr() == address
    blocks.collect()
    assert blocks.used == 0


def test_saved_for_backward_is_held() -> None:
    x = memory.empty((MB,), torch.float32).fill_(3.0).requires_grad_()
    y = (x * x).sum()
    address = x.data_ptr()
    held = x.grad_fn, y
    del x
    others = [memory.empty((MB,), torch.float32).fill_(7.0) for _ in range(3)]
    assert address not in {t.data_ptr() for t in others}
    del held


def test_small_tensors_are_torchs() -> None:
    assert memory.empty((3, 5), torch.bfloat16).shape == (3, 5)
    assert memory.empty((0, 5), torch.float32).numel() == 0
    assert memory._blocks.used == 0


def test_kept_memory_is_bounded_by_what_was_in_use(blocks: memory._Blocks) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        held = [memory.empty((int(n),), torch.uint8) for n in torch.randint(MB, 9 * MB, (3,), generator=generator)]
        assert blocks.held + blocks.used <= 1.5 * blocks.peak
        del held
    assert blocks.peak <= 3 * 10 * MB
    memory.release()
    assert (blocks.held, blocks.peak, blocks.used) == (0, 0, 0)


def test_memory_given_back_is_no_longer_resident(blocks: memory._Blocks) -> None:
    """What follows from the numbers is true of the process."""
    before = _resident()
    for size in (64 * MB, 8 * MB):
        held = memory.empty((size,), torch.uint8).fill_(1)
        assert _resident() - before > size - 2 * MB
        del held
    memory.release()
    assert _resident() - before < 16 * MB


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_a_step_that_repeats_needs_no_more_memory() -> None:
    """Sizes that are not all in use at once add up to more than ever was in use."""

    def step() -> set[int]:
        a, b = memory.empty((8 * MB,), torch.uint8), memory.empty((4 * MB,), torch.uint8)
        seen = {a.data_ptr(), b.data_ptr()}
        del a
        c = memory.empty((6 * MB,), torch.uint8)
        return seen | {c.data_ptr()}

    first = step()
    assert all(step() == first for _ in range(5))


def test_what_is_free_side_by_side_is_one_range(blocks: memory._Blocks) -> None:
    """In whatever order it was given back: so the largest result finds room where many small ones were."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        small = [memory.empty((MB,), torch.uint8) for _ in range(16)]
        start = min(x.data_ptr() for x in small)
        for i in torch.randperm(16, generator=generator).tolist():
            small[i] = None  # type: ignore[call-overload]
        assert memory.empty((16 * MB,), torch.uint8).data_ptr() == start
    assert blocks.regions[0].top == 16 * MB


def test_no_two_tensors_share_a_byte(blocks: memory._Blocks) -> None:
    """Random sizes and lives; each tensor still holds what was written to it when it goes."""
    generator = torch.Generator().manual_seed(2)
    alive: list[tuple[torch.Tensor, int]] = []
    for value in range(300):
        size, place = torch.randint(MB, 6 * MB, (2,), generator=generator).tolist()
        alive.append((memory.empty((size,), torch.uint8), value % 251))
        alive[-1][0].fill_(value % 251)
        if len(alive) > 12:
            gone, wanted = alive.pop(place % len(alive))
            assert int(gone.min()) == int(gone.max()) == wanted
            del gone
    blocks.collect()
    assert blocks.used == sum(-(-x.numel() // 4096) * 4096 for x, _ in alive)


def test_more_than_a_region(blocks: memory._Blocks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_REGION", 4 * MB)
    tensors = [memory.empty((size * MB,), torch.uint8).fill_(size) for size in (3, 3, 9, 1)]
    assert len(blocks.regions) == 3
    assert [int(x.max()) for x in tensors] == [3, 3, 9, 1]


def test_threads() -> None:
    wrong: list[int] = []

    def work(value: int) -> None:
        for _ in range(100):
            x = memory.empty((MB,), torch.uint8).fill_(value)
            y = x.clone()
            if not bool((x == value).all()) or not torch.equal(x, y):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_fork_and_a_pickle() -> None:
    x = memory.empty((MB,), torch.uint8).fill_(5)
    assert torch.equal(pickle.loads(pickle.dumps(x)), x)
    child = os.fork()
    if child == 0:
        memoryview(x.numpy())[:] = b"\1" * MB
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert int(x.max()) == 5, "a child wrote to its parent's memory"
