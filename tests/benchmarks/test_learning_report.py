"""Tables and the picture of learning curves, variants of the interaction and adapting, from made-up records."""

import importlib.util
import json
import re
from statistics import mean

import pytest

from benchmarks.interaction.variants import VARIANTS
from benchmarks.measuring.provenance import ROOT
from benchmarks.report import learning_tables, pictures
from benchmarks.report.documents import rendered
from benchmarks.report.tables import TABLES
from benchmarks.suite.results import RESULTS

DEVICE = "cpu-some"


@pytest.fixture
def give(monkeypatch, tmp_path):
    """Write records into a folder of results that is empty at first."""
    monkeypatch.setattr(learning_tables, "RESULTS", tmp_path)

    def write(name, record):
        path = tmp_path / DEVICE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"threads": 1, "commit": "0123456789abcdef", **record}))

    return write


def cells_of(table: str) -> list[list[str]]:
    """Rows of a table, without the line under its header."""
    header, _, *rows = [line[2:-2].split(" | ") for line in table.splitlines() if line.startswith("|")]
    return [header, *rows]


def columns_of(table: str) -> list[dict[str, str]]:
    """Rows of a table by heading."""
    header, *rows = cells_of(table)
    return [dict(zip(header, row, strict=True)) for row in rows]


# -- learning curves ---------------------------------------------------------------------------------------------------


def curve(task, contender, figures, seed=0):
    """A record: figures are {report: {steps: value}}."""
    measure = "accuracy" if task == "nli" else "R@1"
    steps = sorted({count for values in figures.values() for count in values})
    points = [
        {
            "steps": count,
            "reports": {
                name: {
                    "measure": measure,
                    "results": {name: {"full": {measure: values[count]}, "dual": {measure: 0.0}}},
                    "intervals": {name: {"full": {measure: [values[count] - 0.1, values[count] + 0.1]}}},
                }
                for name, values in figures.items()
            },
        }
        for count in steps
    ]
    return {"task": task, "contender": contender, "seed": seed, "points": points}


TEN, HUNDRED, NLI = "ubuntu_irc_1in10.dev", "ubuntu_irc_1in100.dev", "mnli_matched.dev"


@pytest.fixture
def curves(give):
    """Two contenders of replies and one of NLI."""
    give("curves/replies.mixencoder.0.json", curve("replies", "mixencoder", {TEN: {125: 0.5, 4000: 0.7}}))
    both = {TEN: {125: 0.4, 4000: 0.8}, HUNDRED: {125: 0.2, 4000: 0.3}}
    give("curves/replies.cross-encoder.0.json", curve("replies", "cross-encoder", both))
    give("curves/nli.mixencoder-published.0.json", curve("nli", "mixencoder-published", {NLI: {125: 0.35}}))


def test_curves_are_shown_for_the_contenders_that_exist(curves):
    table = learning_tables.curves_table()
    assert cells_of(table) == [
        ["measured", "contender", "125 steps", "4,000 steps"],
        ["NLI, accuracy", "mixencoder, as published", "0.350", ""],
        ["replies 1 in 10, R@1", "cross-encoder", "0.400", "0.800"],
        ["replies 1 in 10, R@1", "mixencoder, with the dual term", "0.500", "0.700"],
        ["replies 1 in 100, R@1", "cross-encoder", "0.200", "0.300"],
    ]
    assert table.endswith("\n\ncpu-some, 1 thread; commit 0123456")


def test_the_picture_of_curves_has_a_panel_for_each_report_and_bands_of_intervals(curves):
    picture = pictures.curves_picture()
    assert [(panel.title, panel.y_label) for panel in picture.panels] == [
        ("NLI", "accuracy"),
        ("replies 1 in 10", "R@1"),
        ("replies 1 in 100", "R@1"),
    ]
    cross, ours = picture.panels[1].series
    assert (cross.x, cross.y, cross.low, cross.high) == ((125.0, 4000.0), (0.4, 0.8), (0.3, 0.7), (0.5, 0.9))
    assert (cross.role, ours.role) == (pictures.RIVAL, pictures.OURS)


def test_seeds_of_a_curve_are_averaged_and_have_no_band(curves, give):
    second = curve("replies", "mixencoder", {TEN: {125: 0.6, 4000: 0.8}}, seed=1)
    give("curves/replies.mixencoder.1.json", second)
    ours = pictures.curves_picture().panels[1].series[1]
    assert (ours.y, ours.low, ours.high) == ((0.55, 0.75), (), ())


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed (extra plots)")
def test_the_picture_of_curves_is_drawn_with_the_steps_on_its_axis(curves, tmp_path):
    from benchmarks.report.drawing import draw

    draw(pictures.curves_picture(), tmp_path / "curves.svg")
    texts = re.findall(r">([^<>]+)</text>", (tmp_path / "curves.svg").read_text())
    assert {"NLI", "cross-encoder", "mixencoder, with the dual term", "125", "4,000"} <= set(texts)


def test_without_records_the_documents_say_which_command_makes_them(give, tmp_path):
    text = "<!-- curves {0}: begin -->\n<!-- curves {0}: end -->\n"
    for kind in ("picture", "table"):
        found = rendered(text.format(kind), tmp_path)
        assert "\nNot recorded yet: `python -m benchmarks.comparison.curves` does it.\n" in found
    assert pictures.curves_picture() is None
    assert TABLES["interaction variants"]() == "Not recorded yet: `python -m benchmarks.interaction` does it."
    assert TABLES["adapting"]() == "Not recorded yet: `python -m benchmarks.interaction.adapting` does it."


# -- variants of the interaction ---------------------------------------------------------------------------------------


def point(steps, dual, full, scifact=0.6):
    shares = {"0.0": dual, "0.25": 0.1, "0.5": 0.1, "1.0": full, "2.0": 0.1, "alone": full / 2}
    sets = {"scifact": shares | {"0.0": scifact - 0.1, "1.0": scifact}}
    return {"steps": steps, "loss": 1.0, "sets": sets, "unseen": shares | {"chosen on the others": full + 0.01}}


def variant(name, points, what=None):
    found = VARIANTS.get(name, VARIANTS["base"])
    record = {"variant": name, "what": what or found.what, "heads": found.heads, "interacts": found.interacts}
    return record | {"points": points}


def test_variants_stand_in_their_order_below_the_untrained_encoder(give):
    give("interaction/mined.0.json", variant("mined", [point(500, 0.7, 0.72), point(2000, 0.7, 0.75, 0.65)]))
    give("interaction/mined.1.json", variant("mined", [point(500, 0.7, 0.74), point(2000, 0.7, 0.77, 0.67)]))
    give("interaction/heads.0.json", variant("heads", [point(2000, 0.68, 0.68)]))
    give("interaction/base.0.json", variant("base", [point(2000, 0.7, 0.5)]))
    give("interaction/gone.0.json", variant("gone", [point(2000, 0.7, 0.6)], what="no longer tried"))
    table = learning_tables.interaction_table()
    assert cells_of(table)[1:] == [
        ["the encoder's cosine, nothing trained", "", "0.700", "", "", "", "", "0.500"],
        [VARIANTS["base"].what, "2,000", "0.700", "0.500", "0.510", "0.250", "", "0.600"],
        [VARIANTS["heads"].what, "2,000", "0.680", "0.680", "0.690", "", "", "0.600"],
        [VARIANTS["mined"].what, "2,000", "0.700", "0.760", "0.770", "0.380", "0.730", "0.660"],
        ["no longer tried", "2,000", "0.700", "0.600", "0.610", "0.300", "", "0.600"],
    ]


def test_variants_that_all_train_the_dual_term_have_no_row_of_the_untrained_encoder(give):
    give("interaction/heads.0.json", variant("heads", [point(2000, 0.68, 0.68)]))
    assert [row[0] for row in cells_of(learning_tables.interaction_table())[1:]] == [VARIANTS["heads"].what]


# -- labels on stored vectors ------------------------------------------------------------------------------------------


def test_adapting_has_rows_by_what_is_trained_and_columns_by_labels(give):
    def entry(what, labels, seconds, ndcg):
        return {"what": what, "labels": labels, "seconds": seconds, "nDCG@10": ndcg, "Success@1": ndcg / 2}

    records = [entry("cosine", 0, 0.0, 0.4), entry("everything", 500, 60, 0.5), entry("everything", 5000, 120, 0.6)]
    give("adapting.json", {"held out": 500, "answers": 12000, "records": records})
    cosine, everything = columns_of(TABLES["adapting"]())
    assert {name: cell for name, cell in cosine.items() if cell} == {
        "what is trained": "nothing: the cosine of the vectors",
        "nDCG@10, no labels": "0.400",
        "Success@1, no labels": "0.200",
    }
    assert {name: cell for name, cell in everything.items() if cell} == {
        "what is trained": "everything",
        "nDCG@10, 500 labels": "0.500",
        "nDCG@10, 5,000 labels": "0.600",
        "Success@1, 500 labels": "0.250",
        "Success@1, 5,000 labels": "0.300",
        "minutes, 500 labels": "1.0",
        "minutes, 5,000 labels": "2.0",
    }
    assert "500 questions that were held out rank all 12,000 answers; cpu-some" in TABLES["adapting"]()


# -- the repository's own records --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["curves", "interaction variants", "adapting"])
def test_the_committed_records_make_a_table(name):
    assert re.match(r"\| |Not recorded yet: ", TABLES[name]())


# -- candidates for the bundled checkpoint -----------------------------------------------------------------------------


def test_trials_show_both_terms_at_the_best_share(give):
    def trial(**by_share):
        return {"figures": {"chat": by_share, "words": by_share}, "commit": "abcdefgh"}

    records = {
        "untrained": trial(**{"0.0": 0.5}),
        "retrained": trial(**{"0.0": 0.6, "0.25": 0.7, "1.0": 0.65}),
        "other": trial(**{"0.0": 0.6, "0.25": 0.6, "1.0": 0.8}),
    }
    give("default_trials.json", {"measure": "nDCG@10", "queries": 200, "records": records})
    assert TABLES["trials"]().splitlines() == [
        "| model | score | chat | words | mean |",
        "| --- | --- | --- | --- | --- |",
        "| untrained | cosine | 0.500 | 0.500 | 0.500 |",
        "| retrained | dual term alone | 0.600 | 0.600 | 0.600 |",
        "| retrained | full score, 0.25 of the interaction | 0.700 | 0.700 | 0.700 |",
        "| retrained | full score | 0.650 | 0.650 | 0.650 |",
        "| other | dual term alone | 0.600 | 0.600 | 0.600 |",
        "| other | full score | 0.800 | 0.800 | 0.800 |",
        "",
        "nDCG@10, 200 queries a set; commit abcdefg",
    ]


def test_the_page_quotes_the_record_of_a_quarter_of_the_interaction():
    path = RESULTS / "cpu-emerald-rapids-2-threads" / "quality_quarter.json"
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    figure = mean(task["full"]["nDCG@10"] for task in results.values())
    page = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
    assert f"to {figure:.3f} on the mean" in " ".join(page.split())
