"""Quality against latency, as a picture: ``python -m benchmarks.comparison.picture`` (extra ``plots``)."""

import json
from pathlib import Path

import matplotlib
from matplotlib import pyplot

from benchmarks.comparison.tables import cells, read_records, task_mean
from benchmarks.comparison.tasks import CONTENDERS
from benchmarks.gpu_records import ROOT

PICTURE = ROOT / "docs" / "images" / "comparison.png"


def draw(folder: Path, target: Path) -> None:
    """Draw the records of a folder, of which the latency lies beside it."""
    found = cells(read_records(folder))
    latency = json.loads((folder.parent / "comparison_latency.json").read_text(encoding="utf-8"))
    points = {}
    for name, contender in CONTENDERS.items():
        if name in found and (quality := task_mean(found[name])) is not None:
            points[name] = (latency["contenders"][contender.architecture]["seconds"] * 1000, quality)
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for name, (milliseconds, quality) in points.items():
        ours = name.startswith("mixencoder")
        axes.scatter(milliseconds, quality, s=70, color="#c0392b" if ours else "#34495e", zorder=3)
        axes.annotate(name, (milliseconds, quality), xytext=(8, 5), textcoords="offset points")
    axes.set_xscale("log")
    axes.margins(x=0.25, y=0.2)
    axes.set_xlabel("milliseconds a query, 1,000 candidates, two CPU threads (log)")
    axes.set_ylabel("mean over four tasks")
    axes.grid(alpha=0.3, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, dpi=160)


def main() -> None:
    matplotlib.use("Agg")
    (folder,) = (ROOT / "benchmarks" / "results").glob("*/comparison_small")
    draw(folder, PICTURE)


if __name__ == "__main__":
    main()
