"""Draw a `PairExplanation` with matplotlib (extra ``plots``): a panel per interaction layer, tokens as columns."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from mixencoder.base.texts import printable
from mixencoder.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mixencoder.explanation.result import PairExplanation

_ROW, _COLUMN = 0.3, 0.42
"""Height and width of a cell, in inches."""
_NUMBERED_CELLS = 400
"""With at most this many cells in a panel, each shows its percentage."""


def draw(explanation: "PairExplanation", *, heads: bool) -> "Figure":
    """Return the figure.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"pictures need the extra: pip install 'mixencoder[plots]' ({error})") from error
    panels = [list(_rows(explanation, layer, heads=heads)) for layer in range(len(explanation.layers))]
    columns = [_shown(token.text) for token in explanation.query_tokens] + _own_names(explanation)
    rows = sum(map(len, panels))
    size = max(6.0, 1.6 + _COLUMN * len(columns)), 0.8 + 0.9 * len(panels) + _ROW * rows
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), squeeze=False, height_ratios=[len(panel) for panel in panels])
    for number, (one, panel) in enumerate(zip(axes[:, 0], panels, strict=True)):
        _draw_panel(one, panel, columns)
        title = f"attention in percent, interaction layer {number + 1} (backbone layer {explanation.layers[number]})"
        one.set_title(title, loc="left", fontsize="medium")
    figure.suptitle(explanation.summary(), x=0.01, ha="left", fontsize="medium")
    return figure


def _rows(explanation: "PairExplanation", layer: int, *, heads: bool) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the rows of a layer with their names: the state, then each context embedding."""
    parts = []
    if explanation.state_attention is not None:
        # (H, m), and no attention to context embeddings
        state = explanation.state_attention[layer]
        parts.append(("state", np.pad(state, [(0, 0), (0, len(_own_names(explanation)))], constant_values=np.nan)))
    if explanation.context_attention is not None:
        contexts = explanation.context_attention[layer]
        parts += [(f"context {number + 1}", contexts[:, number]) for number in range(contexts.shape[1])]
    for name, rows in parts:
        if heads:
            yield from ((f"{name}, head {head + 1}", row) for head, row in enumerate(rows))
        else:
            yield name, rows.mean(axis=0)


def _own_names(explanation: "PairExplanation") -> list[str]:
    if explanation.context_attention is None:
        return []
    return [f"context {number + 1}" for number in range(explanation.context_attention.shape[2])]


def _draw_panel(axes: "Axes", rows: list[tuple[str, np.ndarray]], columns: list[str]) -> None:
    cells = np.stack([row for _, row in rows])
    axes.imshow(cells, cmap="Blues", vmin=0, vmax=float(np.nanmax(cells)), aspect="auto")
    # a $ would start a formula
    axes.set_xticks(range(len(columns)), [name.replace("$", r"\$") for name in columns], rotation=60, ha="right")
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.tick_params(length=0, labelsize="small")
    if cells.size > _NUMBERED_CELLS:
        return
    for (row, column), value in np.ndenumerate(cells):
        if not np.isnan(value):
            colour = "white" if value > 0.6 * np.nanmax(cells) else "black"
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", size="small", color=colour)


def _shown(token: str, length: int = 16) -> str:
    token = printable(token)
    return token if len(token) <= length else f"{token[: length - 1]}…"
