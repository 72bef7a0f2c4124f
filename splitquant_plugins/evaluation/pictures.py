"""Pictures of a split: each layer's histogram, its parts in colour, and the boundaries between them."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from splitquant_plugins.checkpoints.files import write_atomically, write_text
from splitquant_plugins.errors import ConfigError, optional
from splitquant_plugins.evaluation.inspect_layers import Inspection

# Okabe and Ito's colours, told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999933", "#882255")
INK, FAINT, WHOLE = "#222222", "#6b6b6b", "#d5d5d5"
DASHES = (0, (4, 2))
PANEL_INCHES = (3.1, 1.9)
MAX_COLUMNS = 8


def require_matplotlib() -> None:
    """Raise MissingExtraError unless matplotlib can be imported."""
    optional("matplotlib", "pictures need", "eval")


def check_target(path: Path) -> None:
    """Raise ConfigError unless a picture can be written there: a .png, a .html, or a folder."""
    if path.suffix.lower() in (".png", ".html"):
        if path.is_dir():
            raise ConfigError(f"--picture {path} is a folder; name a file in it")
    elif path.suffix and not path.is_dir():
        raise ConfigError(f"--picture {path}: choose a .png, a .html, or a folder")
    elif path.is_file():
        raise ConfigError(f"--picture {path} is a file without .png or .html; choose another name")


def write_picture(path: Path, title: str, layers: Sequence[Inspection]) -> None:
    """Write all layers as one PNG, as one HTML page that needs nothing else, or as a folder of PNGs."""
    require_matplotlib()
    if path.suffix.lower() == ".png":
        save_figure(path, overview(title, layers))
    elif path.suffix.lower() == ".html":
        write_text(path, page(title, layers))
    else:
        for layer in layers:
            save_figure(path / f"{layer.layer or 'model'}.png".replace("/", "_"), portrait(layer))


def overview(title: str, layers: Sequence[Inspection]) -> Any:
    """Return a figure of small multiples, one panel per layer, with one legend for all."""
    columns = min(MAX_COLUMNS, max(1, math.ceil(math.sqrt(len(layers)))))
    rows = math.ceil(len(layers) / columns)
    width = max(columns, 2) * PANEL_INCHES[0]  # room for the title and the legend above a single panel
    figure = new_figure(width, rows * PANEL_INCHES[1] + 0.75, "constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, layer in zip(panels, layers, strict=False):
        _draw(panel, layer, font=7)
    for panel in panels[len(layers) :]:
        panel.set_axis_off()
    most = max(layers, key=lambda layer: len(layer.parts))
    _legend(figure, most, _shortened(title, int(9 * width)), bounded=any(layer.boundaries for layer in layers))
    return figure


def portrait(layer: Inspection) -> Any:
    """Return a figure of one layer."""
    figure = new_figure(6.4, 3.4, "constrained")
    _draw(figure.subplots(), layer, font=9, labels=True)
    _legend(figure, layer, bounded=bool(layer.boundaries))
    return figure


def page(title: str, layers: Sequence[Inspection]) -> str:
    """Return an HTML page with one picture per layer, all embedded."""
    figures = []
    for layer in layers:
        picture = base64.b64encode(_png(portrait(layer))).decode("ascii")
        text = html.escape(f"{layer.layer}: {_caption(layer)}", quote=True)
        figures.append(f'<figure><img src="data:image/png;base64,{picture}" alt="{text}"></figure>')
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n"
        "<style>body{font:15px system-ui,sans-serif;color:#222;background:#fff;margin:1.5rem}"
        "main{display:grid;grid-template-columns:repeat(auto-fill,minmax(26rem,1fr));gap:1rem}"
        "figure{margin:0}img{width:100%;height:auto}</style></head>\n"
        f"<body><h1>{html.escape(title)}</h1>\n"
        "<p>Counts of weight values on a logarithmic scale, coloured by the part that takes them; a dashed line is a "
        "boundary between two parts.</p>\n<main>\n" + "\n".join(figures) + "\n</main></body></html>\n"
    )


def _draw(axes: Any, layer: Inspection, font: float, *, labels: bool = False) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    edges = layer.histogram.edges.numpy()
    whole = layer.histogram.whole.numpy()
    shared = sum(part.numpy() for part in layer.histogram.parts)
    disjoint = bool((shared <= whole).all())  # the parts of a residual split overlap: outlines over the whole
    style: dict[str, Any] = {"fill": True, "alpha": 0.85} if disjoint else {"linewidth": 1.2}
    axes.stairs(whole, edges, fill=True, color=WHOLE)
    for part, colour in zip(layer.histogram.parts, _colours(layer), strict=True):
        axes.stairs(part.numpy(), edges, color=colour, **style)
    for boundary in layer.boundaries:
        axes.axvline(boundary, color=INK, linewidth=0.9, linestyle=DASHES)
    axes.set_yscale("log")
    axes.set_ylim(0.7, max(float(whole.max()), 1.0) * 2)
    axes.set_xlim(edges[0], edges[-1])
    axes.yaxis.set_major_locator(LogLocator(numticks=4))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.tick_params(labelsize=font - 0.5, length=2, color=FAINT, labelcolor=FAINT, pad=2)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
    name = _shortened(layer.layer or "the model", 44)
    axes.annotate(name, (0, 1), (0, font * 2.1), "axes fraction", "offset points", fontsize=font + 0.5, color=INK)
    axes.annotate(
        _caption(layer), (0, 1), (0, font * 0.7), "axes fraction", "offset points", fontsize=font, color=FAINT
    )
    if labels:
        axes.set_xlabel("weight value", fontsize=font, color=FAINT)
        axes.set_ylabel("count", fontsize=font, color=FAINT)


def _caption(layer: Inspection) -> str:
    shape = "×".join(map(str, layer.shape))
    if layer.reason:
        return f"{shape}, stays whole: {_shortened(layer.reason, 34, end=False)}"
    gains = ", ".join(f"{gain.gain_db:+.1f} dB/{name}" for name, gain in layer.gains.items())
    return f"{shape}: {gains}"


def _legend(figure: Any, layer: Inspection, title: str = "", *, bounded: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [
        Patch(color=colour, label=part.name.replace("_", " "))
        for part, colour in zip(layer.parts, _colours(layer), strict=True)
    ]
    if bounded:
        handles.append(Line2D([], [], color=INK, linewidth=0.9, linestyle=DASHES, label="boundary"))
    style = {"fontsize": 8, "frameon": False, "labelcolor": INK, "handlelength": 1.6, "columnspacing": 1.2}
    heading = {"title": title, "title_fontproperties": {"size": 12, "weight": "bold"}, "alignment": "left"}
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), **style, **heading)


def _colours(layer: Inspection) -> list[str]:
    if len(layer.parts) == 1:
        return [WHOLE]
    return [COLOURS[number % len(COLOURS)] for number in range(len(layer.parts))]


def _shortened(text: str, length: int, *, end: bool = True) -> str:
    """Keep the end of a long text, which tells a layer's name from its neighbours', or else its beginning."""
    if len(text) <= length:
        return text
    return f"…{text[-length + 1 :]}" if end else f"{text[: length - 1]}…"


def new_figure(width: float, height: float, layout: Any = None) -> Any:
    """Return an empty white figure of that size in inches, which needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def save_figure(path: Path, figure: Any) -> None:
    """Write a figure as a PNG, at once or not at all."""
    content = _png(figure)
    write_atomically(path, lambda temporary: temporary.write_bytes(content))
