"""What two processes saw, each in a file; one start of them for the whole folder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import multiprocessing

from .worker import main


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(main, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]
