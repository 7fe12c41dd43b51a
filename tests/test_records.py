import errno
import json
import os

import pytest

from fqt.errors import FqtError
from fqt.files import write_bytes
from fqt.records import (
    RecordLog,
    check_shape,
    environment,
    read_json,
    read_records,
    read_toml,
    write_json,
    write_toml,
)


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
    text = '{"step": 1}\n{"step": 2}\n'
    path.write_text(text)
    assert read_records(path) == [{"step": 1}, {"step": 2}]
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


@pytest.mark.parametrize(("write", "read"), [(write_json, read_json), (write_toml, read_toml)])
def test_every_flipped_bit_of_what_was_written_is_refused(tmp_path, write, read):
    path = tmp_path / "a"
    write(path, {"lr": 0.25, "recipe": "psq4"})
    assert read(path) == {"lr": 0.25, "recipe": "psq4"}
    data = path.read_bytes()
    for at in range(8 * len(data)):
        changed = bytearray(data)
        changed[at // 8] ^= 1 << at % 8
        path.write_bytes(changed)
        with pytest.raises(FqtError):
            read(path)
    for end in range(1, len(data)):
        path.write_bytes(data[:end])
        with pytest.raises(FqtError):
            read(path)


def test_what_was_changed_on_purpose_is_taken_without_its_seal(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"lr": 1})
    assert path.read_text().count("\n") == 5  # readable: one line for each name
    path.write_text(path.read_text().replace("1", "2", 1))
    with pytest.raises(FqtError, match=r"not what was written.*on purpose, remove its lines `sealed` and `seal`"):
        read_json(path)
    path.write_text('{"lr": 2}')
    assert read_json(path) == {"lr": 2}


WILD = [
    "NaN",
    "[1, Infinity]",
    "1e999",
    "9" * 400,
    '{"a": -' + "9" * 5000 + "}",
    "[" * 100_000,
    "[" * 70 + "]" * 70,
]


@pytest.mark.parametrize("text", [*WILD, "\x00", '"\xff"'])
def test_wild_json_is_one_line(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(FqtError, match="is not a JSON file") as caught:
        read_json(path)
    assert "\n" not in str(caught.value)
    path.write_bytes(text.encode("latin-1") + b"\n{}\n")
    with pytest.raises(FqtError, match="line 1 of"):
        read_records(path)


@pytest.mark.parametrize(
    "text", ["a = nan", "a = 1e999", "a = " + "9" * 400, "a = " + "[" * 5000, "a = 1\na = 2", "\xff"]
)
def test_wild_toml_is_one_line(tmp_path, text):
    path = tmp_path / "a.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(FqtError, match="is not a TOML file") as caught:
        read_toml(path)
    assert "\n" not in str(caught.value)


def _log(folder, lines):
    log = RecordLog(folder / "m.jsonl")
    for line in lines:
        log.append(line)
    return log


def test_a_log_is_read_as_it_was_written_and_goes_on(tmp_path):
    lines = [{"step": i} for i in range(4)]
    size = _log(tmp_path, lines[:2]).sync()
    assert read_records(tmp_path / "m.jsonl") == lines[:2]
    with (tmp_path / "m.jsonl").open("a") as file:
        file.write('{"step": "later"}\n')
    assert read_records(tmp_path / "m.jsonl") == lines[:2]  # without a sum it is not written yet
    RecordLog(tmp_path / "m.jsonl", size).append(lines[2])
    assert read_records(tmp_path / "m.jsonl") == lines[:3]
    assert (tmp_path / "m.sums").read_text().count("\n") == 3


def test_a_log_of_an_earlier_version_goes_on_with_sums(tmp_path):
    line = b'{"step": 1}\n'
    (tmp_path / "m.jsonl").write_bytes(line)
    assert read_records(tmp_path / "m.jsonl") == [{"step": 1}]
    RecordLog(tmp_path / "m.jsonl", len(line)).append({"step": 2})
    assert read_records(tmp_path / "m.jsonl") == [{"step": 1}, {"step": 2}]
    (tmp_path / "m.jsonl").write_bytes(line.replace(b"1", b"3") + b'{"step": 2}\n')
    with pytest.raises(FqtError, match="is damaged"):
        read_records(tmp_path / "m.jsonl")


def test_a_damaged_log_is_neither_read_nor_continued(tmp_path):
    size = _log(tmp_path, [{"loss": 0.5}, {"loss": 0.25}]).size
    path = tmp_path / "m.jsonl"
    data = path.read_bytes()
    changes = [b"", data[:-1], data[: size // 2], data.replace(b"0.5", b"0.4"), data + data, b"\0" + data[1:]]
    for changed in changes:
        path.write_bytes(changed)
        with pytest.raises(FqtError, match=r"is damaged|is cut short"):
            read_records(path)
        if changed[:size] != data:
            with pytest.raises(FqtError, match=r"is damaged|is cut short"):
                RecordLog(path, size)
            assert path.read_bytes() == changed
    path.write_bytes(data)
    for sums in (b"", b"x\n", b"%d \n" % size, (tmp_path / "m.sums").read_bytes().replace(b" ", b" 0")):
        (tmp_path / "m.sums").write_bytes(sums)
        with pytest.raises(FqtError, match="damaged"):
            read_records(path)


def test_shapes():
    shape = {"a": (int,), "b": [{"c": (str,)}], "d": {...: (float,)}, "e": lambda x: x > 3}
    good = {"a": 1, "b": [{"c": "x"}], "d": {"x": 0.5}, "e": 4}
    check_shape(good, shape, "it")
    for bad, message in [
        ({"a": True}, "it, a is damaged: 'True' is of the wrong type"),
        ({"b": [{}]}, r"it: b\[0\] is incomplete: it has no 'c'"),
        ({"b": {}}, "it: b is damaged: it is no list"),
        ({"d": {"x": 1}}, "it: d, x is damaged: '1' is of the wrong type"),
        ({"e": 3}, "it, e is damaged: '3' cannot be there"),
    ]:
        with pytest.raises(FqtError, match=message):
            check_shape({**good, **bad}, shape, "it")


def test_a_name_that_is_no_text_is_one_line(tmp_path):
    with pytest.raises(FqtError, match="not UTF-8"):
        write_toml(tmp_path / "config.toml", {"data": "\udcff"})
    assert not list(tmp_path.iterdir())
