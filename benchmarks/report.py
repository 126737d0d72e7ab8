"""Renders committed results into README.md and the model card: ``python -m benchmarks.report``.

No figure there is typed by hand; tests/test_report.py fails when a document and the results differ.
"""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RIVALS = ("sdpa-expanded", "sdpa-pre-expanded", "einsum-concatenated", "two-pass", "two-pass-compiled", "flex-compiled")
MEASURES = ("nDCG@10", "Success@1")
DOCUMENTS = {
    ROOT / "README.md": ("index", "attention", "training", "quality"),
    ROOT / "docs" / "candidate-index.md": ("precision", "prefilter", "million"),
    ROOT / "mixencoder" / "pretrained" / "README.md": ("quality",),
}


def attention_table() -> str:
    """For every shape the torch backend's time, and every rival's time as a multiple of it."""
    rows = [
        ["N", "k", "m", "precision", "torch backend", "of the limit", *RIVALS],
        ["---"] * (6 + len(RIVALS)),
    ]
    (path,) = RESULTS.glob("*/candidate_attention.json")
    for record in json.loads(path.read_text(encoding="utf-8"))["benchmarks"]:
        info = record["extra_info"]
        if info["backend"] == "torch":
            shape, ratios = info["shape"], info["ratios"]
            rows.append(
                [
                    *(str(shape[name]) for name in ("N", "k", "m")),
                    info["dtype"],
                    f"{info['seconds'] * 1000:.2f} ms",
                    f"{info['fraction_of_limit']:.0%}",
                    *(f"{ratios[name]:.2f}x" if name in ratios else "" for name in RIVALS),
                ]
            )
    return _markdown(rows)


def training_table() -> str:
    """Every contender's training step: time, memory of its own, and its time as a multiple of the torch backend's."""
    (path,) = RESULTS.glob("*/training_step.json")
    records = [record["extra_info"] for record in json.loads(path.read_text(encoding="utf-8"))["benchmarks"]]
    steps = {info["backend"]: info for info in records}
    rows = [["step by", "time", "beside ours", "tensors of its own"], ["---"] * 4]
    for name, info in steps.items():
        ratio = info["seconds"] / steps["torch"]["seconds"]
        label = "mixkernels, torch backend" if name == "torch" else name
        rows.append([label, f"{info['seconds'] * 1000:.0f} ms", f"{ratio:.2f}x", f"{info['peak_bytes'] / 1e6:.0f} MB"])
    return _markdown(rows)


def quality_table() -> str:
    """Every task's measures: the untrained dual-encoder, and the default's score whole and by parts."""
    (path,) = RESULTS.glob("*/quality_default.json")
    default = json.loads(path.read_text(encoding="utf-8"))["results"]
    untrained = json.loads(path.with_name("quality_untrained.json").read_text(encoding="utf-8"))["results"]
    columns = {
        "all-MiniLM-L6-v2, untrained": [values["dual"] for values in untrained.values()],
        "full score": [values["full"] for values in default.values()],
        "interaction alone": [values["interaction"] for values in default.values()],
        "dual term alone": [values["dual"] for values in default.values()],
    }
    rows = [["task", "measure", *columns], ["---"] * (2 + len(columns))]
    for measure in MEASURES:
        rows += [
            [task, measure, *(f"{column[number][measure]:.3f}" for column in columns.values())]
            for number, task in enumerate(default)
        ]
        means = [sum(values[measure] for values in column) / len(column) for column in columns.values()]
        rows.append(["mean", measure, *(f"{mean:.3f}" for mean in means)])
    return _markdown(rows)


def index_table() -> str:
    """For every N the time from a query's text to its ranking through an index on disk, and rivals as multiples."""
    (path,) = RESULTS.glob("*/index_speed.json")
    disk = "text to ranking, index on disk, projected float16"
    columns = {
        "query pass": ("seconds", "tokenise and query pass"),
        "bare products": ("seconds", "products"),
        "text to ranking": ("seconds", disk),
        "cross-encoder": ("ratios", f"cross-encoder / {disk}"),
        "plain PyTorch": ("beside", "plain eager"),
        "late interaction": ("beside", "late interaction"),
        "dual-encoder": ("beside", "dual-encoder"),
        "int8 products": ("seconds", f"{disk} int8 products"),
        "cross-encoder, to int8": ("ratios", f"cross-encoder / {disk} int8 products"),
    }
    rows = [["N", *columns], ["---"] * (1 + len(columns))]
    for record in json.loads(path.read_text(encoding="utf-8"))["records"]:
        row = [f"{record['N']:,}"]
        for kind, name in columns.values():
            if name not in record["ratios" if kind == "ratios" else "seconds"]:
                row.append("")
            elif kind == "seconds":
                row.append(f"{record['seconds'][name] * 1000:,.1f} ms")
            else:
                ratio = (
                    record["ratios"][name] if kind == "ratios" else record["seconds"][name] / record["seconds"][disk]
                )
                row.append(f"{ratio:.3g}x")
        rows.append(row)
    return _markdown(rows)


def _precision_records() -> list[dict]:
    (path,) = RESULTS.glob("*/index_precision.json")
    return json.loads(path.read_text(encoding="utf-8"))["records"]


def precision_table() -> str:
    """Every stored format: size and quality."""
    rows = [
        ["layout", "precision", "bytes a candidate", "nDCG@10", "best ten found again", "time a query"],
        ["---"] * 6,
    ]
    for record in _precision_records():
        if "prefilter" not in record and "score" not in record:
            precision = record["precision"] + (", int8 products" if "products" in record else "")
            size = f"{record['bytes_per_candidate']:,}"
            rows.append([record["layout"], precision, size, *_quality(record)])
    return _markdown(rows)


def prefilter_table() -> str:
    """Every prefilter: what is lost and saved."""
    rows = [["prefilter", "nDCG@10", "best ten found again", "time a query"], ["---"] * 4]
    for record in _precision_records():
        if (record["layout"], record["precision"]) == ("projected", "float16") and "products" not in record:
            kept = "dual score alone" if "score" in record else str(record.get("prefilter", "none"))
            rows.append([kept, *_quality(record)])
    return _markdown(rows)


def million_table() -> str:
    """What a large index takes."""
    (path,) = RESULTS.glob("*/index_million.json")
    found = json.loads(path.read_text(encoding="utf-8"))
    seconds, memory = found["seconds"], found["anonymous_bytes"]
    gained = memory["most while ranking"] - memory["before ranking"]
    rows = [
        ["candidates", f"{found['documents']:,}"],
        ["---", "---"],
        ["to fill", f"{seconds['fill']:.0f} s"],
        ["to open", f"{seconds['open'] * 1000:.0f} ms"],
        ["to rank all for a query", f"{seconds['rank']:.0f} s"],
        ["array files, beside the arrays' own bytes", f"{found['array_file_bytes'] / found['array_bytes']:.4f}"],
        ["ids and checksums", f"{found['catalogue_bytes'] / 1e6:.0f} MB"],
        ["anonymous memory gained while ranking", f"{gained / 1e6:.1f} MB"],
    ]
    return _markdown(rows)


def _quality(record: dict) -> list[str]:
    milliseconds = f"{record['seconds_per_query'] * 1000:.0f} ms"
    return [f"{record['ndcg_at_10']:.4f}", f"{record['overlap_at_10']:.1%}", milliseconds]


TABLES = {
    "index": index_table,
    "precision": precision_table,
    "prefilter": prefilter_table,
    "million": million_table,
    "attention": attention_table,
    "training": training_table,
    "quality": quality_table,
}


def rendered(text: str, names: tuple[str, ...]) -> str:
    """Return a document's text with its tables, which stand between two marks each, made anew."""
    for name in names:
        begin, end = f"<!-- {name} table: begin -->", f"<!-- {name} table: end -->"
        head, rest = text.split(begin)
        text = f"{head}{begin}\n{TABLES[name]()}\n{end}{rest.split(end)[1]}"
    return text


def _markdown(rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    """Write the tables into every document."""
    for path, names in DOCUMENTS.items():
        path.write_text(rendered(path.read_text(encoding="utf-8"), names), encoding="utf-8")


if __name__ == "__main__":
    main()
