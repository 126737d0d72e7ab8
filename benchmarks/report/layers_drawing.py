"""Draws the layers of the packages as SVG (extra ``plots``), one column a package, each unit with its purpose."""

import textwrap
from collections.abc import Sequence

import matplotlib
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from benchmarks.report.layers import PICTURE, digest, picture_data

_SETTINGS = {"svg.hashsalt": "mixencoder", "svg.fonttype": "none", "font.size": 9}
_COLOURS = {"mixencoder": "#fbeeec", "mixkernels": "#eaf1f8", "benchmarks": "#eef5ee"}
_WRAPPED = 52
"""Letters of a line."""
_LINE, _GAP = 0.17, 0.12
"""Inches: a line of text, and between boxes."""


def draw() -> None:
    """Draw the picture into its file, with the digest of its data."""
    data = picture_data()
    columns = {package: [[_text(*unit) for unit in layer] for layer in layers] for package, layers in data.items()}
    height = max(sum(map(_height, layers)) + _GAP * len(layers) for layers in columns.values()) + 0.4
    matplotlib.use("Agg")
    with matplotlib.rc_context(_SETTINGS):
        figure, axes = pyplot.subplots(1, len(columns), figsize=(4.3 * len(columns), height), layout="constrained")
        for place, (package, layers) in zip(axes, columns.items(), strict=True):
            _draw_column(place, package, layers, height)
        PICTURE.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(PICTURE, metadata={"Date": None, "Description": f"data {digest()}"})
        pyplot.close(figure)


def _text(unit: str, purpose: str) -> list[str]:
    return [unit, *textwrap.wrap(purpose, _WRAPPED)]


def _height(layer: Sequence[Sequence[str]]) -> float:
    """Height of a layer in inches: its units stand below one another."""
    return sum(len(lines) * _LINE for lines in layer) + _GAP * (len(layer) + 1)


def _draw_column(axes: Axes, package: str, layers: Sequence[Sequence[Sequence[str]]], height: float) -> None:
    axes.set_xlim(0, 1)
    axes.set_ylim(0, height)
    axes.axis("off")
    axes.set_title(package, loc="left", fontsize=11, fontweight="bold")
    top = height
    for layer in layers:
        tall = _height(layer)
        style = "round,pad=0,rounding_size=0.02"
        box = FancyBboxPatch(
            (0.01, top - tall), 0.98, tall, boxstyle=style, facecolor=_COLOURS[package], edgecolor="#888888"
        )
        axes.add_patch(box)
        line = top - _GAP
        for unit, *lines in layer:
            axes.text(0.03, line, unit, va="top", fontweight="bold", fontfamily="monospace")
            line -= _LINE
            for text in lines:
                axes.text(0.06, line, text, va="top", fontsize=8, color="#333333")
                line -= _LINE
            line -= _GAP
        top -= tall + _GAP
