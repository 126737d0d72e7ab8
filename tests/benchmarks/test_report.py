"""Tables and pictures of the documents are those of the committed results."""

import html
import importlib.util
import json
import re
from dataclasses import replace

import pytest

from benchmarks.report import __main__ as command
from benchmarks.report import pictures, tables
from benchmarks.report.documents import documents, rendered
from benchmarks.report.pictures import PICTURES, Panel, Picture, Series, is_current, picture_path
from benchmarks.suite.case import RECORD_KEYS
from benchmarks.suite.results import GROUPS, RESULTS, Results, read_results

SUITE = [path for group in GROUPS for path in sorted(RESULTS.glob(f"*/{group}.json"))]
with_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed (extra plots)"
)


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.parent.name + "/" + path.name)
def test_a_document_holds_what_the_results_say(path):
    text = path.read_text(encoding="utf-8")
    assert rendered(text, path.parent) == text


@pytest.mark.parametrize("name", PICTURES)
def test_a_committed_picture_shows_what_the_results_say(name):
    assert is_current(name), f"{picture_path(name).name} is out of date: python -m benchmarks.report"
    picture = PICTURES[name]()
    if picture is None:
        pytest.skip("not recorded yet")
    drawn = picture_path(name).read_text(encoding="utf-8")
    assert re.findall(r"data ([0-9a-f]{64})", drawn) == [picture.digest]
    series = [one for panel in picture.panels for one in panel.series]
    # a series whose points bear notes needs no legend
    labels = {one.label for one in series if not one.notes} | {panel.title for panel in picture.panels}
    assert labels <= set(map(html.unescape, re.findall(r">([^<>]+)</text>", drawn)))


@pytest.mark.parametrize("path", SUITE, ids=lambda path: path.parent.name + "/" + path.name)
def test_every_committed_record_is_whole(path):
    results = read_results(path)
    assert results.records
    assert all(tuple(record) == RECORD_KEYS for record in results.records)
    assert all(record["group"] == path.stem for record in results.records)
    assert {"kind", "capability", "native_bfloat16", "threads"} <= set(results.machine)
    assert {"command", "date", "timing"} <= set(results.provenance)


MADE_UP = Picture(
    "some lines",
    (
        Panel("lines", "x", "y", (Series("a", (1.0, 10.0), (1.0, 2.0), "ours"), Series("b", (1.0,), (3.0,), "rival"))),
        Panel("points", "x", "y", (Series("c", (1.0,), (1.0,), "ours", joined=False, notes=("c",)),)),
    ),
)


@pytest.fixture
def one_table(monkeypatch):
    monkeypatch.setattr("benchmarks.report.documents.TABLES", {"some": lambda: "| 1 |"})


def test_what_stands_between_marks_is_made_anew_and_the_rest_is_kept(one_table, tmp_path):
    text = "a\n<!-- some table: begin -->\nold\n<!-- some table: end -->\nb\n"
    new = rendered(text, tmp_path)
    assert new == "a\n<!-- some table: begin -->\n| 1 |\n<!-- some table: end -->\nb\n"
    assert rendered(new, tmp_path) == new


@with_matplotlib
def test_check_writes_nothing_and_a_run_mends_what_differs(one_table, tmp_path, monkeypatch, capsys):
    path, drawn = tmp_path / "page.md", tmp_path / "made-up.svg"
    path.write_text("<!-- some table: begin -->\n<!-- some table: end -->\n")
    monkeypatch.setattr(command, "documents", lambda: [path])
    for module in (command, pictures):
        monkeypatch.setattr(module, "PICTURES", {"made up": lambda: MADE_UP})
        monkeypatch.setattr(module, "picture_path", lambda name: drawn)
    before = path.read_text()
    assert command.main(["--check"]) == 1
    printed = capsys.readouterr().out
    assert "differs: page.md" in printed
    assert "made-up.svg" in printed
    assert (path.read_text(), drawn.exists()) == (before, False)
    assert command.main([]) == 0
    assert "| 1 |" in path.read_text()
    assert MADE_UP.digest in drawn.read_text()
    assert command.main(["--check"]) == 0


def record(backend, seconds, **changes):
    shape = {"N": 10, "m": 16, "n": 128, "L": 6, "d": 384}
    entry = dict.fromkeys(RECORD_KEYS) | {"group": "end_to_end", "operator": "rank", "variant": "", "shape": shape}
    entry |= {"dtype": "float32", "backend": backend, "own": backend == "mixencoder", "seconds": seconds}
    entry |= {"fraction_of_limit": 0.5, "peak_bytes": 2_000_000, "bytes": 10, "flops": 20}
    entry |= {"rival": "slow", "ratios": {"slow": 4.0}, "facts": {"stored_bytes": 100_000}}
    entry |= {"versions": {"torch": "2"}, "commit": "0123456789abcdef"}
    return entry | changes


MACHINE = {"name": "a processor", "capability": "AVX2", "threads": 2}


@pytest.fixture
def results(monkeypatch, tmp_path):
    """Give groups records of a made-up machine."""
    for module in (tables, pictures):
        monkeypatch.setattr(module, "FOLDER", tmp_path)
    monkeypatch.setattr(pictures, "COMPARISONS", dict.fromkeys(tables.COMPARISONS, tmp_path / "none"))

    def give(group, records, peaks=None):
        monkeypatch.setattr("benchmarks.suite.results.RESULTS", tmp_path.parent)
        from benchmarks.suite.results import write_results

        write_results(tmp_path.name, group, Results(MACHINE, peaks or {}, records, [], {}))

    return give


def test_ranking_is_shown_with_losses_and_what_did_not_run_is_empty(results):
    fast = record("fast", 0.001)
    large = {**fast["shape"], "N": 1000}
    few = [record("mixencoder", 0.01), record("slow", 0.04), fast]
    many = [record("mixencoder", 0.1, shape=large), record("slow", 400.0, shape=large)]
    results("end_to_end", [*few, *many])
    assert tables.end_to_end_table().splitlines() == [
        "| N | mixencoder | of the limit | slow | fast |",
        "| --- | --- | --- | --- | --- |",
        "| 10 | 10 ms | 50% | 4x | 0.1x |",
        "| 1,000 | 100 ms | 50% | 4,000x |  |",
        "",
        "a processor, AVX2, 2 threads; PyTorch 2, commit 0123456789",
    ]
    cost = pictures.cost_picture()
    lines = {one.label: one for one in cost.panels[0].series}
    assert (lines["mixencoder"].x, lines["mixencoder"].y) == ((10.0, 1000.0), (10.0, 100.0))
    assert lines["limit of mixencoder"].y == (5.0, 50.0)
    kept, taken = pictures.memory_picture().panels
    assert [(one.label, one.y) for one in kept.series] == [("mixencoder = slow", (1.0, 100.0)), ("fast", (1.0,))]
    assert {one.y for one in taken.series} == {(2.0, 2.0), (2.0,)}


def operator(backend, seconds, variant="", **changes):
    changes = {"group": "operators", "operator": "candidate_attention", "variant": variant, **changes}
    shape = {"N": 1000, "k": 1, "m": 64, "H": 12, "D": 64}
    return record(backend, seconds, own=backend == "torch", rival="einsum", **{"shape": shape, **changes})


def test_attention_joins_the_ratios_of_its_variants(results):
    plain = [operator("torch", 0.004, ratios={"einsum": 1.5}), operator("einsum", 0.006, ratios={"einsum": 1.0})]
    compiled = operator("torch", 0.005, "compiled", ratios={"einsum": 9.0, "flex": 5.0})
    results("operators", [*plain, compiled], {"float32": {"flops": 1e9, "bytes": 1e9, "exps": 1e9}})
    head, _, row = tables.attention_table().splitlines()
    assert head.endswith("| einsum | flex |")
    assert row == "| 1000 | 1 | 64 | float32 | 4.00 ms | 50% | 1.50x | 5.00x |"
    (panel,) = pictures.roofline_picture().panels
    ours, rival, roof = panel.series
    assert (ours.x, ours.y, rival.label) == ((2.0,), (5e-06,), "forward, best rival")
    # bytes bound it to the left of the ridge, products to the right
    assert dict(zip(roof.x, roof.y, strict=True))[1.0] == 1.0
    assert roof.y[-1] == 1.0


def test_a_loss_in_the_other_groups_is_a_multiple_below_one(results):
    results("layers", [record("fused", 0.01, group="layers", operator="layer", own=True, ratios={"slow": 0.25})])
    row = "| layer | N = 10, m = 16, n = 128, L = 6, d = 384 | fused | 10 ms | 50% | slow 0.25x |"
    assert row in tables.layers_table()


ABOVE = "is at 14.7 of its limit; expected 1 at most: measure it again on a quiet machine"


@pytest.mark.parametrize(
    ("group", "show"),
    [
        ("end_to_end", tables.end_to_end_table),
        ("end_to_end", pictures.cost_picture),
        ("layers", tables.layers_table),
        ("index", tables.index_operations_table),
        ("operators", tables.attention_table),
        ("operators", pictures.roofline_picture),
    ],
)
def test_a_fraction_of_the_limit_above_one_is_not_shown(group, show, results):
    peaks = {"float32": {"flops": 1e9, "bytes": 1e9, "exps": 1e9}}
    made = operator if group == "operators" else record
    own = "torch" if group == "operators" else "mixencoder"
    for fraction in (14.7, 1.0):
        results(group, [made(own, 0.01, fraction_of_limit=fraction, group=group)], peaks)
        if fraction > 1:
            with pytest.raises(ValueError, match=ABOVE):
                show()
        else:
            assert show()


def test_a_gpu_s_fraction_above_one_is_not_shown(monkeypatch, tmp_path):
    document = json.loads((tables.GPU_FOLDER / "gpu_attention.json").read_text(encoding="utf-8"))
    for entry in document["records"]:
        entry["fraction_of_measured"] = 14.7
    (tmp_path / "gpu_attention.json").write_text(json.dumps(document))
    monkeypatch.setattr(tables, "GPU_FOLDER", tmp_path)
    with pytest.raises(ValueError, match=ABOVE):
        tables.gpu_attention_table()


def test_a_last_bit_that_differs_from_machine_to_machine_leaves_the_digest_as_it_is():
    def drawn(value):
        return replace(MADE_UP, panels=(Panel("a", "x", "y", (pictures._series("a", [(1.0, value)], "ours"),)),))

    assert drawn(0.1 + 0.2).digest == drawn(0.3).digest != drawn(0.31).digest


@with_matplotlib
def test_the_same_data_are_drawn_to_the_same_bytes_with_text_as_text(tmp_path):
    from benchmarks.report.drawing import draw

    for name in ("a.svg", "b.svg"):
        draw(MADE_UP, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert ">lines<" in (tmp_path / "a.svg").read_text()
