"""Diagnoses and certificates on the page: their tables, and values where the record has them."""

import copy
import io
import json

import pytest
import torch
from rich.console import Console

import fqt
from fqt.errors import FqtError
from fqt.records import read_json, write_json
from fqt.report import certificate_table, collect, diagnosis_tables, render
from fqt.stats import Certificate, diagnosis_record

from .page_reader import Page


@pytest.fixture(scope="module")
def diagnosis(tmp_path_factory):
    """A diagnosis of two layers, as JSON."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    fqt.quantize_(model, "shq4")
    batches = [(torch.randn(16, 8), torch.randint(0, 4, (16,))) for _ in range(3)]
    loss = lambda m, batch: torch.nn.functional.cross_entropy(m(batch[0]), batch[1])
    record = {"run": "r", "step": 7, **diagnosis_record(fqt.diagnose(model, loss, batches))}
    path = tmp_path_factory.mktemp("diagnosis") / "diagnosis.json"
    write_json(path, record)
    return read_json(path)


def page_of(tmp_path, record):
    write_json(tmp_path / "x.json", record)
    text, problems = render(collect([tmp_path / "x.json"]))
    return Page(text), problems


def test_a_diagnosis(tmp_path, diagnosis):
    page, problems = page_of(tmp_path, diagnosis)
    assert problems == []
    # ρ, by layer, by bits for either product, codes, layer × layer
    assert page.tags["svg"] == 6
    for text in ("Diagnosis: r", "At step 7", "whole gradient", "Theorem 2: whose quantizer adds what"):
        assert text in page.text
    cells = [tuple(cells) for _, _, cells in page.values]
    operand = next(o for o in diagnosis["operands"] if (o["layer"], o["role"]) == ("2", "grad_input"))
    energy = operand["energy"]["value"]
    assert ("2", f"{diagnosis['layers']['2']['rho']['value']:.2g}") in [(c[0], c[1].split(" ")[0]) for c in cells]
    assert ("2", "grad_input", "4", f"{operand['variance']['4']['value'] / energy:.2g}") in cells
    # only one layer has a product for grad_input, so it is its own median
    for what in ("bound", "limit"):
        assert (what, "3", f"{operand[what]['3'] / energy:.2g}") in cells
    total = sum(operand["histogram"])
    for code, count in enumerate(operand["histogram"]):
        assert ("2", "grad_input", str(code), f"{count / total:.2g}") in cells


def test_codes_of_eight_bits_are_drawn_in_groups(tmp_path, diagnosis):
    wide = copy.deepcopy(diagnosis)
    operand = wide["operands"][0]
    operand["histogram"] = [1] * 16 + [0] * 224 + [3] * 16
    page, _ = page_of(tmp_path, wide)
    cells = [tuple(cells) for _, _, cells in page.values]
    name = (operand["layer"], operand["role"])
    assert (*name, "0–15", "0.25") in cells
    assert (*name, "240–255", "0.75") in cells
    assert (*name, "16–31", "0") in cells


def test_a_diagnosis_without_what_may_be_missing(tmp_path, diagnosis):
    bare = copy.deepcopy(diagnosis)
    bare["table"] = None
    for operand in bare["operands"]:
        operand["limit"] = None
    bare["operands"][0]["energy"]["value"] = 0.0
    bare["layers"]["0"]["rho"] = {"value": None, "error": None}
    page, problems = page_of(tmp_path, bare)
    assert problems == []
    assert page.tags["svg"] == 4 + (len({o["role"] for o in bare["operands"][1:]}) == 2)
    assert "Theorem 2" not in page.text
    assert len(diagnosis_tables(bare)) == 2
    bare["operands"] = []
    page, problems = page_of(tmp_path, bare)
    assert (problems, page.tags["svg"]) == ([], 1)  # ρ
    del bare["total"]
    _, problems = page_of(tmp_path, bare)
    assert "no complete record" in problems[0]


def test_numbers_that_no_arithmetic_takes(tmp_path, diagnosis):
    damaged = copy.deepcopy(diagnosis)
    damaged["operands"][0]["histogram"] = []
    assert "no complete record" in page_of(tmp_path, damaged)[1][0]


def test_a_diagnosis_of_a_run_inside_a_comparison(tmp_path, diagnosis, record, run_folder):
    write_json(tmp_path / "c" / "compare.json", record)
    run = run_folder("c/bhq4-seed0")
    write_json(run / "diagnosis.json", {**diagnosis, "recipe": "psq2"})
    text, problems = render(collect([tmp_path / "c"]))
    assert problems == []
    assert "Diagnosis: r with psq2" in Page(text).text
    assert "Run: bhq4, seed 3" not in Page(text).text  # the comparison has it


def defective(x, seed):
    """Rounds up less often than it should."""
    g = torch.Generator().manual_seed(seed)
    step = x.abs().amax().clamp(min=1e-30) / 7
    return (x / step + 0.9 * torch.rand(x.shape, generator=g)).floor() * step


def test_certificates(tmp_path):
    certificate = fqt.certify(defective, draws=64)
    record = json.loads(json.dumps({**certificate.to_dict(), "environment": {"fqt": "0.1.0"}}))
    again = Certificate.from_dict(record)
    assert str(again) == str(certificate)
    page, problems = page_of(tmp_path, record)
    assert problems == []
    for text in ("biased", "convicted on “gaussian”", "mean, each row", "FAIL", "64 draws per input"):
        assert text in page.text
    assert "biased" not in page_of(tmp_path, fqt.certify("psq4", draws=64).to_dict())[0].text
    for damage in ({"findings": [{"test": "other"}]}, {"rate": "x"}, {"power": None}):
        assert "damaged" in page_of(tmp_path, {**record, **damage})[1][0]
    with pytest.raises(FqtError, match="no record of fqt certify"):
        Certificate.from_dict({"format": "fqt diagnosis 1"})


def test_a_narrow_screen_shows_each_test_on_few_lines():
    certificate = fqt.certify("psq4", draws=64)

    def shown(width):
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(certificate_table(certificate, width))
        return console.export_text()

    assert "what the effect is" in shown(160)
    narrow = shown(80)
    assert "what the effect is" not in narrow
    assert "where the score is" in narrow
    assert "verdict: exact" in narrow
