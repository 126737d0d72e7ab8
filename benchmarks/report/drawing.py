"""Draw pictures as SVG (extra ``plots``). A file holds the digest of its data; compare digests, not bytes.

The same data may give other bytes on another machine, which may round the last bit of a coordinate differently.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import matplotlib
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator
from matplotlib.transforms import Bbox

from benchmarks.report.pictures import LIMIT, OURS, BandedSeries, Panel, Picture, Series

_SETTINGS = {
    "svg.hashsalt": "mixencoder",
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_RED = ("#c0392b", "#e08e79")
_COLOURS = ("#1f4e79", "#5b9bd5", "#2e7d32", "#8e6bbf", "#b8860b", "#5f6a6a", "#17a589", "#000000")
_MARKS = "osD^vP<>"
_HALF_MARK = 5
"""Half the width of a point's mark in pixels."""
_PLACES = ((7, 0), (7, 10), (7, -10), (7, 20), (7, -20))
"""Where a point's name may be, in points from it; the last one if all lie on other names."""


def draw(picture: Picture, target: Path) -> None:
    """Draw a picture into a file, with the digest of its data."""
    matplotlib.use("Agg")
    with matplotlib.rc_context(_SETTINGS):
        figure = figure_of(picture)
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, metadata={"Date": None, "Description": f"data {picture.digest}"})
        pyplot.close(figure)


def figure_of(picture: Picture) -> Figure:
    """Draw a picture into a figure."""
    rows = math.ceil(len(picture.panels) / picture.columns)
    size = (8.6, 0.4 + 4.0 * rows) if picture.columns == 1 else (5.2 * picture.columns, 0.6 + 3.9 * rows)
    figure, axes = pyplot.subplots(rows, picture.columns, figsize=size, squeeze=False, layout="constrained")
    styles = _styles(picture)
    for one_axes, panel in zip(axes.flat, picture.panels, strict=False):
        _draw_panel(one_axes, panel, styles)
    for one_axes in axes.flat[len(picture.panels) :]:
        one_axes.set_visible(False)
    figure.draw_without_rendering()
    for one_axes in axes.flat:
        _separate([text for text in one_axes.texts if isinstance(text, Annotation)])
    if any(not one.joined and not _is_named(panel) for panel in picture.panels for one in panel.series):
        # marks mean the same in all panels
        known = {}
        for one_axes in axes.flat:
            known |= dict(zip(*reversed(one_axes.get_legend_handles_labels()), strict=True))
        figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def _is_named(panel: Panel) -> bool:
    """Whether every series is a single point with its name next to it."""
    return all(len(one.x) == 1 and one.notes for one in panel.series)


def _styles(picture: Picture) -> dict[str, tuple[str, str]]:
    """Colour and mark of every name, the same in all panels: reds are ours; unjoined points keep their marks."""
    ours, others, marks, found = cycle(_RED), cycle(_COLOURS), cycle(_MARKS), {}
    for one in (one for panel in picture.panels for one in panel.series):
        if one.role == LIMIT:
            style = "#222222", ""
        elif not one.joined:
            style = (_RED[0] if one.role == OURS else "#7f8c8d"), one.mark
        elif _name(one) in found:
            continue
        else:
            style = next(ours if one.role == OURS else others), next(marks)
        found[_name(one)] = style
    return found


def _name(series: Series) -> str:
    """The first name of a series."""
    return series.label.split(" = ")[0]


def _draw_panel(axes: Axes, panel: Panel, styles: Mapping[str, tuple[str, str]]) -> None:
    for one in panel.series:
        colour, mark = styles[_name(one)]
        axes.plot(
            one.x,
            one.y,
            color=colour,
            marker=mark or None,
            markersize=6,
            markerfacecolor=colour if one.joined or one.role == OURS else "none",
            linestyle="none" if not one.joined else (":" if one.role == LIMIT else "-"),
            linewidth=2.4 if one.role == OURS else 1.4,
            zorder=4 if one.role == OURS else 3,
            label=one.label,
        )
        if isinstance(one, BandedSeries) and one.low:
            axes.fill_between(one.x, one.low, one.high, color=colour, alpha=0.12, linewidth=0, zorder=2)
        for note, x, y in zip(one.notes, one.x, one.y, strict=False):
            axes.annotate(
                note, (x, y), xytext=_PLACES[0], textcoords="offset points", va="center", fontsize=8, color=colour
            )
    axes.set_xscale("log")
    _plain(axes.xaxis, one_two_five=False)
    if all(isinstance(one, BandedSeries) for one in panel.series):
        # few points, less than two decades apart
        axes.xaxis.set_major_locator(FixedLocator(sorted({x for one in panel.series for x in one.x})))
        axes.xaxis.set_minor_locator(NullLocator())
    if panel.y_log:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        _plain(axes.yaxis, one_two_five=high / low < 100)
    axes.set_title(panel.title, loc="left")
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.grid(alpha=0.25, which="major")
    if _is_named(panel):
        # names are to the right of points and need space
        low, high = axes.get_xlim()
        axes.set_xlim(low, high * (high / low) ** 0.25)
        axes.margins(y=0.15)
    elif all(one.joined for one in panel.series):
        # in the order in which lines end
        handles, labels = axes.get_legend_handles_labels()
        order = sorted(range(len(labels)), key=lambda number: -panel.series[number].y[-1] / panel.series[number].x[-1])
        axes.legend(
            [handles[number] for number in order],
            [labels[number] for number in order],
            frameon=False,
            fontsize=9,
            loc="center left",
            bbox_to_anchor=(1.0, 0.5),
        )


def _separate(notes: Sequence[Annotation]) -> None:
    """Move names that would lie on points or on other names, from left to right, to the first free of `_PLACES`."""
    points = [note.axes.transData.transform(note.xy) for note in notes if note.axes is not None]
    taken = [Bbox.from_bounds(x - _HALF_MARK, y - _HALF_MARK, 2 * _HALF_MARK, 2 * _HALF_MARK) for x, y in points]
    for note in sorted(notes, key=lambda one: one.xy):
        for place in _PLACES:
            note.set_position(place)
            box = note.get_window_extent()
            if not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)


def _plain(axis: Axis, *, one_two_five: bool) -> None:
    """Label an axis with plain numbers, 10,000 instead of a power of ten; more of them if it spans few decades."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if one_two_five else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())
