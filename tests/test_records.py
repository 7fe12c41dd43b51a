import errno
import json
import os

import pytest

from fqt.errors import FqtError
from fqt.records import append_record, environment, read_json, read_records, write_bytes, write_json


def _disk_full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    monkeypatch.setattr("fqt.records.os.fsync", _disk_full)
    with pytest.raises(FqtError, match=r"disk is full.*a\.json.*intact"):
        write_json(path, {"new": 2})
    assert read_json(path) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    write_bytes(path, b"old")
    seen = []
    replace = os.replace

    def look(source, target):
        seen.append(path.read_bytes())
        replace(source, target)

    monkeypatch.setattr("fqt.records.os.replace", look)
    write_bytes(path, b"new")
    assert (seen, path.read_bytes()) == ([b"old"], b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FqtError, match="cannot write"):
        write_bytes(tmp_path / "file" / "x", b"")


def test_floats_that_json_lacks_become_null(tmp_path):
    write_json(tmp_path / "a.json", {"x": [float("nan"), float("inf"), 0.1]})
    assert json.loads((tmp_path / "a.json").read_text())["x"] == [None, None, 0.1]


def test_floats_come_back_bit_for_bit(tmp_path):
    values = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308]
    write_json(tmp_path / "a.json", values)
    assert read_json(tmp_path / "a.json") == values


def test_a_line_cut_off_in_writing_is_left_out_but_a_bad_line_before_is_not(tmp_path):
    path = tmp_path / "a.jsonl"
    append_record(path, {"step": 1})
    append_record(path, {"step": 2})
    text = path.read_text()
    path.write_text(text[:-5])
    assert read_records(path) == [{"step": 1}]
    path.write_text("{" + text)
    with pytest.raises(FqtError, match="line 1 of"):
        read_records(path)


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(FqtError, match="cannot read"):
        read_json(tmp_path / "none.json")
    (tmp_path / "x.json").write_text("no json")
    with pytest.raises(FqtError, match="not a JSON file"):
        read_json(tmp_path / "x.json")


def test_the_stamp_says_what_a_result_needs():
    stamp = environment(["fqt", "train"])
    assert stamp["command"] == ["fqt", "train"]
    assert {"time", "fqt", "commit", "dirty", "python", "torch", "processor", "threads"} <= set(stamp)
    assert stamp["commit"] is None or len(stamp["commit"]) == 40
    json.dumps(stamp)
