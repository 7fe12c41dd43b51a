"""Every test starts from the same seed; one thread, since nothing here is large."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _reproducible(one_thread: None) -> None:
    torch.manual_seed(20201027)
