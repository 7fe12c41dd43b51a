"""The paper's figures from records made up so that every number to be read off is known."""

import copy

import pytest

from fqt.errors import FqtError
from fqt.paper.bits import variance_law
from fqt.paper.figures import SECTIONS, paper_figure, paper_section, paper_tables
from fqt.paper.record import accuracy_record, check_paper, layers_record
from fqt.records import write_json
from fqt.report import collect, render, save_figure
from tests.report.page_reader import Page

STAMP = {"time": "then", "torch": "2.13"}
NETWORK = {"task": "digits", "model": "convnet", "recipe": "qat", "batch_size": 64, "seed": 0, "step": 150}
BITS = (3, 4, 5, 6)
ROUNDINGS = ("stochastic", "dithered")
SHIFT = {"ptq": 0.0, "psq": 1.0, "bhq": 1.5, "shq": 2.0}


def _paper(figure, **content):
    head = {"format": "fqt paper 1", "figure": figure, "environment": STAMP, "network": NETWORK}
    return {**head, "settings": {"seed": 0}, **content}


def _variance():
    cells = [
        {
            "method": m,
            "rounding": r,
            "bits": b,
            "grad_weight": w,
            "value": 2.0 * 4.0 ** -(b + SHIFT[m]),
            "error": 0.2 * 4.0 ** -(b + SHIFT[m]),
        }
        for m in SHIFT
        for r, w in (("stochastic", "exact"), ("dithered", "exact"), ("stochastic", "ptq8"))
        for b in BITS
    ]
    cells += [
        {"method": None, "rounding": None, "bits": None, "grad_weight": w, "value": v, "error": 0.0}
        for w, v in (("ptq8", 0.5), ("column8", 0.125))
    ]
    return _paper("variance", sampling={"value": 2.0, "error": 0.1}, rows=cells)


def _profile():
    rows = [
        {
            "layer": f"layer{k}", "rows": 8, "columns": 16, "energy": 4.0,
            "variance": {m: {r: [16.0, 4.0 / (1 + i)] for r in ROUNDINGS} for i, m in enumerate(SHIFT)},
        }
        for k in range(3)
    ]  # fmt: skip
    return _paper("profile", settings={"bits": [3, 4]}, rows=rows)


def _histogram():
    rows = [
        {"method": m, "counts": [2, 0, 5, 1], "bins": [0.5, 0.25, 0.125], "variance": 1.0 / (1 + i)}
        for i, m in enumerate(SHIFT)
    ]
    return _paper("histogram", settings={"bits": 2}, layer="conv", shape=[3, 4], rows=rows)


def _times(**parts):
    return {name: {"q20": 0.9 * value, "q50": value, "q80": 1.2 * value} for name, value in parts.items()}


def _overhead():
    rows = [{"samples": 32, "method": None, "rounding": None, "seconds": _times(integer=0.5, float32=2.0)}]
    rows += [
        {
            "samples": n, "method": m, "rounding": r,
            "seconds": _times(range=0.01, quantize=0.25 * n / 32, total=0.25 * n / 32, integer=0.5 * n / 32),
        }
        for n in (16, 32) for m in SHIFT for r in ROUNDINGS
    ]  # fmt: skip
    shape = {"samples": 32, "channels": 4, "size": 8, "kernel": 3}
    return _paper("overhead", settings={"convolution": shape}, network=None, rows=rows)


def _layers(table):
    return layers_record({"table": table, "environment": STAMP}, "table.json", STAMP)


@pytest.fixture
def records(record, layer_table):
    return {
        "variance": _variance(),
        "profile": _profile(),
        "histogram": _histogram(),
        "overhead": _overhead(),
        "layers": _layers(layer_table),
        "accuracy": accuracy_record(record, "runs/c", STAMP),
    }


FIGURES = ("variance", "profile", "histogram", "overhead", "layers", "accuracy")


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_has_a_file_and_a_place_on_the_page(records, name, tmp_path):
    save_figure(paper_figure(records[name]), tmp_path / "f.png")
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    write_json(tmp_path / f"{name}.json", records[name])
    text, problems = render(collect([tmp_path]), SECTIONS)
    assert problems == []
    page = Page(text)
    assert page.tags["svg"] == {"variance": 2, "histogram": 2, "accuracy": 2}.get(name, 1)
    assert page.values
    assert "2.13" in page.text


def _table(record, title):
    found = [table for table in paper_tables(record) if table.title.startswith(title)]
    assert len(found) == 1
    return {tuple(row[: found[0].text_columns]): list(row[found[0].text_columns :]) for row in found[0].rows}


def test_the_gap_in_bits(records):
    gaps = _table(records["variance"], "Bits that")
    assert gaps["psq", "stochastic", "exact"] == ["+1.00", "+1.00", "+1.00", "–"]
    assert gaps["bhq", "stochastic", "ptq8"] == ["+1.50", "+1.50", "–", "–"]
    assert gaps["ptq", "dithered", "exact"] == ["+0.00", "+0.00", "+0.00", "+0.00"]
    assert ("ptq", "stochastic", "exact") not in gaps


def test_the_law_stands_beside_what_was_measured(records):
    table = _table(records["variance"], "Growth")
    assert table["psq", "stochastic"] == ["4.00 ± 0.57"] * 3  # two errors of a tenth: 4·0.1·√2
    assert table["law", "stochastic"] == [f"{variance_law(b):.2f}" for b in (6, 5, 4)]
    assert table["law", "dithered"] == [f"{variance_law(b, dithered=True):.2f}" for b in (6, 5, 4)]


def test_variances_are_in_units_of_the_mini_batchs(records):
    assert _table(records["variance"], "ρ")["ptq", "stochastic", "exact"][0] == "0.0156"  # 4⁻³
    weight = _table(records["variance"], "Quantizer of grad_weight")
    assert weight["8 bits per feature (released code)", "exact"] == ["0.0625"]
    assert weight["8 bits per tensor (paper)", "exact"] == ["0.25"]
    assert weight["8 bits per tensor (paper)", "psq4"] == ["0.000977"]


def test_the_profile_is_relative_to_the_gradient(records):
    row = _table(records["profile"], "Exact variance over squared norm, 4 bits")["layer1",]
    assert row == ["8 × 16", "1.00e+00", "5.00e-01", "3.33e-01", "2.50e-01", "2.0", "3.0", "4.0", "2.50e-01"]


def test_growth_and_gaps_by_layer(records):
    record = records["profile"]
    record["rows"][2]["variance"]["ptq"]["stochastic"] = [8.0, 4.0]
    growth = _table(record, "Growth of the exact variance")
    assert growth["ptq", "stochastic"] == ["4.00 (2.00, 4.00)"]
    assert growth["law", "stochastic"] == [f"{variance_law(4):.2f}"]
    gaps = _table(record, "Bits that stochastic PTQ must add at a layer")
    assert gaps["ptq", "dithered"] == ["–", "0.00 (0.00, 0.00)"]  # 16 is beyond what one layer's PTQ has
    record["rows"][2]["variance"]["psq"]["stochastic"] = [8.0, 4.0]
    record["rows"][1]["variance"]["psq"]["stochastic"] = [8.0, 4.0]
    record["rows"][0]["variance"]["psq"]["stochastic"] = [8.0, 4.0]
    assert _table(record, "Bits")["psq", "stochastic"] == ["0.50 (0.00, 0.50)", "0.00 (0.00, 0.00)"]


def test_the_histograms_table(records):
    rows = _table(records["histogram"], "Layer conv")
    assert rows["bhq",] == ["0.333", "3.0", "25", "0.12 … 0.5"]


def test_overhead_is_a_share_of_the_convolution(records):
    rows = _table(records["overhead"], "Time of")
    assert rows["psqd",] == ["10", "–", "250", "–", "250", "500", "0.50", "0.12"]
    assert rows["convolution, float32",][-2:] == ["4.00", "1"]
    assert _table(records["overhead"], "Growth of the time")["shq",] == ["2.00"]


def test_accuracy_comes_from_the_comparison(records, record):
    rows = _table(records["accuracy"], "Accuracy")
    assert rows["ptq4",] == ["81.67", "3", "0.3000"]
    assert records["accuracy"]["source"]["commit"] == record["environment"]["commit"]
    section = paper_section("accuracy.json", records["accuracy"])
    points = section.charts[0].points
    assert ("bhq", "4", "85.00") in [point.cells for point in points]
    assert ("qat", "–", "85.00") in [point.cells for point in points]


def test_an_unfinished_sweep_is_drawn_as_far_as_it_goes(records):
    record = records["variance"]
    for count in (1, 5, len(record["rows"])):
        part = {**record, "rows": record["rows"][:count]}
        paper_figure(part)
        assert paper_tables(part)
    unfinished = {**records["overhead"], "rows": []}
    with pytest.raises(FqtError, match="no timing"):
        paper_section("x", unfinished)


@pytest.mark.parametrize("name", FIGURES)
def test_damaged_records_are_one_line(records, name, tmp_path):
    record = records[name]
    check_paper(record, "f")
    for key in ("environment", "rows" if "rows" in record else "table"):
        damaged = {k: v for k, v in record.items() if k != key}
        with pytest.raises(FqtError, match=key):
            check_paper(damaged, "f")
    with pytest.raises(FqtError, match="no record of `fqt reproduce`"):
        check_paper({**record, "figure": "x"}, "f")
    if "rows" in record:
        for key in record["rows"][0]:
            damaged = copy.deepcopy(record)
            damaged["rows"][0][key] = ["nonsense"]
            write_json(tmp_path / "f.json", damaged)
            text, problems = render(collect([tmp_path / "f.json"]), SECTIONS)
            Page(text)
            assert len(problems) <= 1


@pytest.mark.parametrize("bits", [-(2**63), 2**62, 0, 4.0, True])
def test_no_width_of_a_record_is_taken_for_a_number_of_steps(records, bits):
    damaged = copy.deepcopy(records["variance"])
    damaged["rows"][0]["bits"] = bits
    with pytest.raises(FqtError, match=r"rows\[0\], bits is damaged"):
        check_paper(damaged, "f")


def test_what_the_quantizers_of_each_layer_add(records):
    assert _table(records["layers"], "What each layer") == {("b",): ["4", "50.0"], ("a",): ["4", "50.0"]}


def test_a_table_of_another_form_is_refused(layer_table):
    short = {**layer_table, "sources": ["a", "b", "c"]}
    for record in ([], {}, {"table": None}, {"table": {**layer_table, "targets": [1]}}, {"table": short}):
        with pytest.raises(FqtError, match=r"table\.json"):
            layers_record(record, "table.json", STAMP)
