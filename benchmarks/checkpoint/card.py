"""The bundled checkpoint's card, written from records: ``python -m benchmarks.checkpoint.card``.

Reads the checkpoint's configuration, its training.json, share.json and head.json, and quality_default.json,
quality_untrained.json and quality_equal_dual.json of benchmarks/results; card.md in this folder is the template. A test
fails when card and records differ.
"""

import json
from pathlib import Path
from statistics import mean
from textwrap import fill
from typing import Any

import yaml

from benchmarks.measuring.markdown import markdown_table
from benchmarks.measuring.provenance import ROOT

PRETRAINED = ROOT / "mixencoder" / "pretrained"
CARD = PRETRAINED / "README.md"
FRAME = Path(__file__).with_name("card.md")
STAGES = ("training.yaml", "training-second.yaml")
QUALITY = ("default", "untrained", "equal_dual")
"""Names of the records of `mixencoder evaluate` that the card shows, first the checkpoint's own."""
MEASURES = ("nDCG@10", "Success@1")
WIDTH = 120
"""Characters of a line."""
PARTS = {"full score": "full", "interaction alone": "interaction", "dual term alone": "dual"}

TERMS = {
    "ubuntu_irc": ("Ubuntu IRC, annotated replies", "CC BY 4.0"),
    "medquad": ("MedQuAD, answers cut at 120 words", "CC BY 4.0"),
    "scifact": ("SciFact, train queries with BM25's top 100", "claims CC BY 4.0, abstracts ODC-By"),
    "selqa": ("SelQA, its test part", "Apache-2.0"),
    "trecqa": ("TREC-QA", "public-domain questions"),
    "stsb": ("STS benchmark", "CC BY-SA and mixed"),
    "packages": ("Descriptions of Debian packages", "their packages' free licences"),
    "wordnet": ("WordNet 3.0, glosses of nouns", "WordNet licence"),
    "qnli": ("QNLI, questions with the sentence that answers them", "CC BY-SA"),
    "snli": ("SNLI, its dev part", "CC BY-SA 4.0"),
    "mnli_mismatched": ("MultiNLI, its mismatched dev part", "OANC and mixed open terms"),
    "joci": ("JOCI", "as published"),
}
"""Beginning of a source's name -> its description and licence terms."""

Results = dict[str, Any]


def quality_rows(default: Results, untrained: Results, equal: Results) -> list[list[str]]:
    """Every ranking task's measures: two dual-encoders, and the default's whole score and its parts."""
    tasks = [task for task, parts in default["results"].items() if "dual" in parts]
    columns = [
        ("all-MiniLM-L6-v2, untrained", untrained, "dual"),
        ("dual-encoder, trained alike", equal, "full"),
        *((label, default, part) for label, part in PARTS.items()),
    ]
    rows = [["task", "measure", *(label for label, _, _ in columns)]]
    for measure in MEASURES:
        found = [[report["results"][task][part][measure] for report, part in _sources(columns)] for task in tasks]
        rows += [
            [task, measure, *(f"{value:.3f}" for value in values)] for task, values in zip(tasks, found, strict=True)
        ]
        rows.append(["mean", measure, *(f"{mean(values):.3f}" for values in zip(*found, strict=True))])
    return rows


def classification_rows(default: Results) -> list[list[str]]:
    """Accuracy and macro-F1 of every task with classes."""
    rows = [["task", "measure", "figure"]]
    for task, parts in default["results"].items():
        if "accuracy" in parts["full"]:
            for measure, value in parts["full"].items():
                low, high = default["intervals"][task]["full"][measure]
                rows.append([task, measure, f"{value:.3f} [{low:.3f}, {high:.3f}]"])
    return rows


def verdict(default: Results, untrained: Results, equal: Results) -> str:
    """Say on which tasks the full score does not beat its dual term, the untrained encoder, or one trained alike."""
    measure, lines = MEASURES[0], []
    for label, report, part in (
        ("the dual term alone", default, "dual"),
        ("the untrained dual-encoder", untrained, "dual"),
        ("the dual-encoder trained alike", equal, "full"),
    ):
        tasks = [task for task, parts in default["results"].items() if "dual" in parts]
        worse = [
            task
            for task in tasks
            if default["results"][task]["full"][measure] <= report["results"][task][part][measure]
        ]
        if worse:
            lines.append(f"On {' and '.join(worse)} the full score is no better than {label}.")
        else:
            lines.append(f"The full score is above {label} on every set.")
    return " ".join(lines)


def share_rows(share: dict[str, Any]) -> list[list[str]]:
    """Figures of every development set, and their mean, by the interaction's share b."""
    rows = [["b", *share["figures"], "mean"]]
    for b, average in share["means"].items():
        label = f"{b}, chosen" if float(b) == share["chosen"] else b
        rows.append([label, *(f"{figures[b]:.3f}" for figures in share["figures"].values()), f"{average:.3f}"])
    return rows


def lesson(share: dict[str, Any]) -> str:
    """Say on which development sets the chosen share beats the dual term alone (b = 0), and on which it does not."""
    chosen, alone = str(share["chosen"]), "0.0"
    better = [name for name, figures in share["figures"].items() if figures[chosen] > figures[alone]]
    worse = [name for name in share["figures"] if name not in better]
    return (
        f"Beside the dual term alone (b = 0) the interaction gains on {' and '.join(better) or 'none'}, and loses on "
        f"{', '.join(worse) or 'none'}."
    )


def data_rows(stages: list[dict[str, Any]], examples: dict[str, int]) -> list[list[str]]:
    """Every source with its share of batches in each stage."""
    shares: dict[str, list[float]] = {}
    for number, stage in enumerate(stages):
        weights = {entry.partition("=")[0]: float(entry.partition("=")[2] or 1) for entry in stage["data"]}
        for path, weight in weights.items():
            name = next(start for start in TERMS if Path(path).name.startswith(start))
            shares.setdefault(name, [0.0] * len(stages))[number] += weight / sum(weights.values())
    rows = [["data", "terms", *(f"batches, stage {number + 1}" for number in range(len(stages))), "rows, last stage"]]
    for name, parts in sorted(shares.items(), key=lambda item: -sum(item[1])):
        count = sum(rows for source, rows in examples.items() if source.startswith(name))
        rows.append([*TERMS[name], *(f"{part:.0%}" if part else "" for part in parts), f"{count:,}" if count else ""])
    return rows


def rendered(pretrained: Path, results: Path) -> str:
    """Return the card of a checkpoint whose quality was recorded in a folder of results."""
    config, record, share = (_json(pretrained / f"{name}.json") for name in ("config", "training", "share"))
    quality = [_json(results / f"quality_{name}.json") for name in QUALITY]
    head = _json(pretrained / "head.json")
    stages = [yaml.safe_load((pretrained / name).read_text(encoding="utf-8")) for name in STAGES]
    calibration = config["calibration"]
    fields = {
        "classes": ", ".join(config["id2label"].values()),
        "quality": markdown_table(quality_rows(*quality)),
        "verdict": fill(verdict(*quality), WIDTH),
        "classification": markdown_table(classification_rows(quality[0])),
        "head": fill(
            f"The head was trained alone, after all else, for {len(head['held_out_accuracy'])} epochs over "
            f"{head['pairs']:,} pairs, of which that with the best accuracy on {head['held_out']:,} others was kept.",
            WIDTH,
        ),
        "measure": share["measure"],
        "queries": str(share["queries"]),
        "share": markdown_table(share_rows(share)),
        "lesson": fill(lesson(share), WIDTH),
        "calibration": fill(
            f"**Probabilities** are `sigmoid(score / {calibration['temperature']:.3g} {calibration['bias']:+.3g})`, "
            "fitted by `mixencoder calibrate` to lists of ten out of the Free On-line Dictionary of Computing, the "
            "wrong ones mined by the dual term (`mixencoder mine`). They are offered beside the score, never instead.",
            WIDTH,
        ),
        "stages": " ".join(
            f"Stage {number}: {stage['steps']:,} steps of {stage['batch_size']}."
            for number, stage in enumerate(stages, 1)
        )
        + f" The second took {record['seconds'] / 60:.0f} minutes, threads: {record['threads']}.",
        "data": markdown_table(data_rows(stages, record["examples"])),
    }
    text = FRAME.read_text(encoding="utf-8")
    for name, value in fields.items():
        text = text.replace(f"{{{name}}}", value)
    return text


def _sources(columns: list[tuple[str, Results, str]]) -> list[tuple[Results, str]]:
    return [(report, part) for _, report, part in columns]


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def main() -> None:
    """Write the card."""
    (path,) = (ROOT / "benchmarks" / "results").glob("*/quality_default.json")
    CARD.write_text(rendered(PRETRAINED, path.parent), encoding="utf-8")


if __name__ == "__main__":
    main()
