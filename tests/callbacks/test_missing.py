"""A callback whose library is not there says what to install; fqt itself imports none of them."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fqt
import fqt.callbacks


@pytest.mark.parametrize(
    ("name", "library", "extra"),
    [("HuggingFaceCallback", "transformers", "hf"), ("LightningCallback", "lightning", "lightning")],
)
def test_a_missing_library(name: str, library: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _ = fqt.callbacks._HOMES[name]
    monkeypatch.delitem(sys.modules, f"fqt.callbacks.{module}", raising=False)
    for loaded in [key for key in sys.modules if key.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(fqt.FqtError) as error:
        getattr(fqt.callbacks, name)
    assert str(error.value).startswith(f"{name} needs {library}")
    assert str(error.value).endswith(f"which is not installed: in a checkout of fqt, pip install '.[{extra}]'")


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'KerasCallback'"):
        fqt.callbacks.KerasCallback  # noqa: B018


def test_importing_fqt_imports_none_of_them() -> None:
    others = "{'transformers', 'lightning', 'accelerate', 'peft'}"
    code = f"import sys, fqt.callbacks; print({others} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
