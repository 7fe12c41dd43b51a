"""The page of `fqt report`, read back by a parser that refuses what a browser would have to guess at."""

import json
import re
import warnings
from pathlib import Path

import pytest

from fqt.errors import FqtError
from fqt.records import write_json
from fqt.report import collect, render, write_page
from fqt.report.chart import COLOURS, POINTS, Point, drawing, make_chart, plain

from .page_reader import Page

RESULTS = Path(__file__).parents[2] / "results"
HOSTILE = "<script>alert('x')</script>&\"$\\frac{$ _^ ]]>"


def read(*paths):
    text, problems = render(collect([Path(path) for path in paths]))
    return Page(text), problems


@pytest.fixture
def comparison(record, tmp_path):
    write_json(tmp_path / "c" / "compare.json", record)
    return tmp_path / "c"


def test_the_reader_refuses(run_folder):
    good, _ = render(collect([run_folder("a")]))
    Page(good)
    for old, new in (
        ("</main>", ""),
        ("</main>", "</main></p>"),
        ("</main>", '<img src="https://example.org/x.png"></main>'),
        ("</main>", '<a href="//example.org">x</a></main>'),
        ("</main>", '<p onclick="x()">x</p></main>'),
        ("</main>", '<i id="tip"></i></main>'),
        ("</style>", "@import 'x';</style>"),
        ("</style>", "b{background:url(http://example.org)}</style>"),
        ("</script>", "fetch('x')</script>"),
    ):
        with pytest.raises(AssertionError):
            Page(good.replace(old, new, 1))


def test_a_run(run_folder):
    page, problems = read(run_folder("a", rho=True))
    assert problems == []
    assert page.tags["svg"] == 5  # loss, two accuracies, ρ, width
    cells = [cells for _, _, cells in page.values]
    assert ["bhq4, seed 3", "10", "1.25"] in cells
    assert ["bhq4, seed 3", "20", "77.77"] in cells
    assert ["bhq4, seed 3, conv1", "20", "0.062"] in cells
    assert ["bhq4, seed 3", "10", "0.25"] in cells
    assert [cell for cell in cells if cell[0].endswith(", fc")] == []  # not measured
    widths = [("10", "8"), ("10", "3.5"), ("20", "3.5")]
    assert [tuple(cell[1:]) for cell in cells if tuple(cell[1:]) in widths] == widths
    assert not any(cell[2] == "5.75" for cell in cells)  # the end's is a mean over the run
    for text in ("Run: bhq4, seed 3", "finished", "2.13", "77.77", "Recipe in full", "ptq8"):
        assert text in page.text


def test_values_lie_where_they_are_drawn(run_folder):
    page, _ = read(run_folder("a"))
    (x1, y1, first), (x2, y2, second) = page.values[:2]
    assert (first[2], second[2]) == ("1.25", "0.75")
    assert x1 < x2
    assert y1 < y2  # downwards on the screen
    text, _ = render(collect([run_folder("b")]))
    path = re.search(r'<path d="M ([\d.]+) ([\d.]+) \nL ([\d.]+) ([\d.]+) \n" clip-path', text)
    assert [float(v) for v in path.groups()] == pytest.approx([x1, y1, x2, y2], abs=0.06)


def test_a_folder_of_everything(run_folder, comparison, tmp_path):
    run_folder("single")
    run_folder("c/shq4-seed0", recipe="shq4", finished=False)
    run_folder("c/ptq4-seed1", recipe="ptq4")  # the comparison's record holds it
    write_json(tmp_path / "other.json", {"environment": {"torch": "2.13"}, "rows": [{"role": "r", "rho": 0.5}]})
    write_json(tmp_path / "irrelevant.json", {"a": 1})
    page, problems = read(tmp_path)
    assert problems == []
    runs = re.findall(r"(\S+-seed\d|\S*single)\n?", page.text)
    for recipe in ("qat", "ptq4", "bhq4"):
        for seed in range(3):
            assert page.text.count(f"c/{recipe}-seed{seed}") == 1
    assert any("single" in run for run in runs)
    assert "incomplete" in page.text
    assert page.tags["svg"] == 3 + 3  # of two runs together, of the comparison (one evaluation: no curve)
    assert "other.json" in page.text
    assert "irrelevant" not in page.text


def test_the_comparison_has_its_table_and_values(comparison):
    page, _ = read(comparison)
    assert "-3.33 ± 1.20" in page.text
    cells = [cells for _, _, cells in page.values]
    assert ["ptq4", "1", "79.00"] in cells
    assert ["bhq4", "mean", "0.021"] in cells


@pytest.mark.skipif(not RESULTS.is_dir(), reason="an installed copy has no records beside it")
def test_real_records():
    text, problems = render(collect([RESULTS / "digits", RESULTS / "cifar10-resnet20"]))
    assert problems == []
    page = Page(text)
    assert len(re.findall(r"digits/\w+-seed\d", page.text)) == 88
    assert len(re.findall(r"cifar10-resnet20/\w+-seed\d", page.text)) == 10
    assert page.tags["svg"] == 10
    assert len(text) < 600_000


def test_hostile_names(run_folder, record, tmp_path):
    run = run_folder("r<b>", recipe=HOSTILE)
    record["recipes"][1] = record["config"]["task"] = HOSTILE
    for entry in record["runs"] + record["gradient"]:
        entry["recipe"] = HOSTILE if entry["recipe"] == "ptq4" else entry["recipe"]
    write_json(tmp_path / "c" / "compare.json", record)
    part = {"value": 1.0, "error": None}
    hostile = {"sources": [HOSTILE], "targets": [HOSTILE], "parts": {HOSTILE: {HOSTILE: part}}}
    write_json(tmp_path / "m.json", {"environment": {HOSTILE: HOSTILE}, "table": hostile})
    page, problems = read(run, tmp_path / "c", tmp_path / "m.json")
    assert problems == []
    assert page.tags["script"] == 1
    assert "alert" not in page.script
    assert page.text.count(HOSTILE) > 10
    assert [HOSTILE, "1", "79.00"] in [cells for _, _, cells in page.values]


def test_names_that_matplotlib_would_take_for_something_else():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("$x$", "_hidden", "漢字", "a\x00b", "x" * 99, "$\\badcommand$", ""):
            chart = make_chart("t", ("a",), lambda axes, name=name: _labelled(axes, plain(name)))
            svg = drawing(chart, "k").svg
            assert "<svg" in svg
    assert plain("_hidden") == " _hidden"
    assert len(plain("x" * 99)) == 32


def _labelled(axes, name):
    axes.plot([0, 1], [0, 1], label=name)
    axes.legend()
    axes.set_xticks([0], [name])
    return [Point(0, 0, (name,))]


def test_many_layers_have_no_legend(run_folder):
    folder = run_folder("a")
    for count, shown in ((8, True), (60, False)):
        line = {"kind": "monitor", "step": 20, "layers": {f"layer{i}": 0.5**i for i in range(count)}}
        (folder / "metrics.jsonl").write_text("\n".join(json.dumps({**line, "step": s}) for s in (10, 20)))
        text, _ = render(collect([folder]))
        page = Page(text)
        assert len(page.values) == 2 * count
        assert ("legend_1" in text) == shown
        assert ("60 lines: point at one" in page.text) != shown


def test_colours_become_the_pages():
    def draw(axes):
        for i, value in enumerate(COLOURS):
            axes.plot([0, 1], [i, i], color=value)
        return []

    svg = drawing(make_chart("t", (), draw), "k").svg
    assert "var(--series7)" in svg
    assert not re.search("#[0-9a-f]{6}", svg, re.IGNORECASE)
    assert drawing(make_chart("t", (), draw), "k").svg == svg


def test_long_curves_are_thinned():
    def draw(axes):
        axes.plot([0, 9999], [0, 1])
        return [Point(i, 0.5, (str(i),)) for i in range(10_000)]

    points = drawing(make_chart("t", ("i",), draw), "k").points
    assert len(points) == POINTS
    assert (points[0][2], points[-1][2]) == (("0",), ("9999",))


def _cut(folder):
    (folder / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text()[:-20])


def _remove(name):
    return lambda folder: (folder / name).unlink()


def _write(name, text):
    return lambda folder: (folder / name).write_text(text)


DAMAGES = [
    (_cut, 0, "incomplete"),
    (_remove("metrics.jsonl"), 1, "cannot read"),
    (_remove("config.toml"), 1, "cannot read"),
    (_remove("environment.json"), 1, "cannot read"),
    (_write("metrics.jsonl", ""), 0, "None of these runs has written a line of metrics yet"),
    (_write("metrics.jsonl", "5\n[1]\n{}\n"), 1, "line 1 of"),
    (_write("metrics.jsonl", '{"kind": "train", "step": "x", "loss": []}\n'), 1, "incomplete"),
    (_write("metrics.jsonl", '{"kind": "train", "step": 3, "loss": null}\n'), 1, "incomplete"),
    (_write("metrics.jsonl", '{"kind": "train", "step": 3, "loss": "<b>"}\n'), 1, "incomplete"),
    (
        _write("metrics.jsonl", '{"kind": "monitor", "step": 3, "rho": [1], "layers": [2], "mean_width": "x"}\n'),
        1,
        "incomplete",
    ),
    (_write("metrics.jsonl", "{nonsense\n{}\n"), 1, "line 1 of"),
    (_write("metrics.jsonl", '{"kind": "end", "step": 3, "diverged": true}\n'), 0, "diverged"),
    (_write("config.toml", "= nonsense"), 1, "is not a TOML file"),
    (_write("config.toml", "task = inf\nsteps = nan\nresolved_recipe = 3\n"), 1, "not finite"),
    (_write("environment.json", "[]"), 0, "finished"),
    (_write("environment.json", '{"started": 3, "continued": 4}'), 0, "finished"),
]


@pytest.mark.parametrize(("damage", "warnings", "text"), DAMAGES)
def test_a_damaged_run_is_shown_as_far_as_it_goes(run_folder, damage, warnings, text):
    folder = run_folder("a")
    damage(folder)
    page, problems = read(folder)
    assert problems == []
    assert text in page.text
    assert page.tags["li"] == 2 + warnings  # two in the contents


def test_one_bad_record_does_not_hide_the_others(run_folder, comparison, tmp_path):
    run_folder("good")
    folder = run_folder("bad")
    (folder / "config.toml").write_text("")
    (folder / "metrics.jsonl").write_text("")
    (comparison / "compare.json").write_text("{}")
    (tmp_path / "half.json").write_text('{"environment": {')
    page, problems = read(tmp_path)
    assert len(problems) == 3
    for problem in problems:
        assert "\n" not in problem
        assert problem in page.text
    assert "Run: bhq4, seed 3" in page.text


@pytest.mark.parametrize("name", ["environment", "config", "baseline", "recipes", "seeds", "measurement", "runs"])
def test_a_comparison_that_lacks_something(record, comparison, name):
    for change in ({}, {name: 3}):
        damaged = {**{k: v for k, v in record.items() if k != name}, **change}
        write_json(comparison / "compare.json", damaged)
        with pytest.raises(FqtError, match=name):
            collect([comparison])


def test_a_record_of_the_wrong_form_becomes_a_problem(run_folder, layer_table, tmp_path):
    del layer_table["parts"]["b"]["a"]
    write_json(tmp_path / "m.json", {"format": "fqt x", "table": layer_table})
    page, problems = read(run_folder("a"), tmp_path / "m.json")
    assert len(problems) == 1
    assert "it has no 'a'" in problems[0]
    assert "it has no 'a'" in page.text


def test_a_layer_by_layer_table(layer_table, tmp_path):
    write_json(tmp_path / "m.json", {"format": "fqt table 1", "table": layer_table})
    page, problems = read(tmp_path / "m.json")
    assert problems == []
    values = {tuple(cells[:2]): (x, y, cells[2]) for x, y, cells in page.values}
    assert set(values) == {("a", "a"), ("a", "b"), ("b", "b")}
    assert values["b", "b"][2] == "3.5"
    assert values["a", "b"][2] == "0.5 ± 0.1"
    assert values["a", "a"][1] == values["a", "b"][1]  # one row: the gradient of a
    assert values["a", "a"][0] < values["a", "b"][0]


def test_paths(tmp_path, run_folder):
    folder = run_folder("a")
    assert collect([folder / "metrics.jsonl"]).runs[0].label == "bhq4, seed 3"
    assert len(collect([folder, folder]).runs) == 1
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.json").write_text("[]")
    for path, message in (
        (tmp_path / "nowhere", "cannot read"),
        (tmp_path / "empty", "holds no record"),
        (tmp_path / "x.json", "is no record of fqt"),
        (folder / "config.toml" / "x", "cannot read"),
    ):
        with pytest.raises(FqtError, match=message):
            collect([path])


def test_the_page_does_not_depend_on_when_it_is_made(comparison):
    assert render(collect([comparison])) == render(collect([comparison]))


def test_a_folder_whose_name_is_no_text_is_shown(run_folder, tmp_path):
    folder = run_folder("a").rename(tmp_path / "r\udcff")
    assert write_page(collect([folder]), tmp_path / "page.html") == []
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    Page(page)
    assert "r\\udcff" in page
