import pytest

from tests.report.conftest import layer_table, record  # noqa: F401


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass
