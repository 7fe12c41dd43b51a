"""Every test starts from the same seed; one thread, since nothing here is large."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(20201027)
    yield
    torch.set_num_threads(threads)
