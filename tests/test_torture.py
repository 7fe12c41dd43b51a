"""The short form of `make torture`: some kills, some damaged files."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

TORTURE = Path(__file__).resolve().parents[1] / "results" / "torture"


def test_a_killed_run_goes_on_to_the_same_numbers():
    # In a process of its own: what it kills are forks of one that has computed nothing.
    code = "import json, kills; print(json.dumps(kills.main(6, commands=['train'])))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=TORTURE, capture_output=True, text=True, timeout=300, check=True)
    found = json.loads(done.stdout)
    assert found["failures"] == []
    assert found["cases"] >= 6


def test_damaged_files_are_refused(one_thread):
    spec = importlib.util.spec_from_file_location("files", TORTURE / "files.py")
    files = importlib.util.module_from_spec(spec)
    sys.modules["files"] = files
    spec.loader.exec_module(files)
    found = files.main(40, 2, short=True)
    assert found["failures"] == []
    assert found["refused"] > 20
