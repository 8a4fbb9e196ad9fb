"""Draw figures with Matplotlib, as SVG that takes the colours and the font of the page."""

import io
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal
from xml.etree import ElementTree

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from matplotlib.transforms import Bbox

# The colours of Okabe and Ito (2008), which colour-blind readers can tell apart, but for black and
# yellow, which cannot be seen on a dark and on a light page.
BLUE, VERMILLION, GREEN, ORANGE, PINK, SKY = COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#E69F00",
    "#CC79A7",
    "#56B4E9",
)
LINES = ("-", "--", ":", "-.")
INK = "#010203"  # becomes the colour of the page's text
_WIDTH = 4.4  # inches; at the 320 points that this is, text stays legible on a telephone

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ipwd_jax",  # the same figure has the same text whenever it is drawn
    "text.parse_math": False,  # a class can be called "$5"
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 10,
    "legend.fontsize": 9,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    ),
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
}
_SVG = "http://www.w3.org/2000/svg"
_LINK = "http://www.w3.org/1999/xlink"


def draw(key: str, alt: str, paint: Callable[[Axes], None], height: float = 3.0) -> str:
    """Draw a figure with one pair of axes.

    Args:
        key: identifies the figure within the page.
        alt: what it shows, for those who cannot see it.
        paint: draws into the axes.
        height: in inches; the width is the same for all figures.

    Returns:
        An `<svg>` element, whose text and axes have the CSS colour `currentColor`.
    """
    file = io.StringIO()
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # The browser writes the text, in a font that has the sign.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(_WIDTH, height), dpi=72, layout="constrained")
        paint(figure.subplots())
        figure.savefig(file, format="svg", metadata={"Date": None})
    return _inline(file.getvalue(), key, alt)


def standalone(svg: str) -> str:
    """What `draw` returns as the content of a file, legible on light and on dark pages."""
    style = "svg{color:#1f2328}@media(prefers-color-scheme:dark){svg{color:#d1d7e0}}"
    width = round(_WIDTH * 110)
    return svg.replace("<svg ", f'<svg width="{width}" ', 1).replace(
        ">", f"><style>{style}</style>", 1
    )


def line_style(number: int) -> dict[str, Any]:
    """Colour and line of the curve with this number, unlike those of the curves before it."""
    lines = LINES[number // len(COLOURS) % len(LINES)]
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": lines}


def means_and_ranges(axes: Axes, curves: Sequence[tuple[str, np.ndarray]]) -> None:
    """Draw a line through the means over seeds after each epoch, and shade their range.

    Args:
        axes: in which to draw.
        curves: labels and values (seeds, epochs); epochs that some seed has not measured are left
            out.
    """
    for number, (label, values) in enumerate(curves):
        seen = np.isfinite(values).all(axis=0)
        epochs, values = np.flatnonzero(seen) + 1, values[:, seen]
        style = line_style(number)
        low, high = values.min(axis=0), values.max(axis=0)
        axes.fill_between(epochs, low, high, color=style["color"], alpha=0.15, linewidth=0)
        marker = "o" if len(epochs) <= 15 else None
        axes.plot(epochs, values.mean(axis=0), marker=marker, label=label, **style)
    whole_numbers(axes)


def legend_below(axes: Axes, columns: int = 3) -> None:
    """Put the legend below the axes, where it covers no data; none if nothing is labelled."""
    _, labels = axes.get_legend_handles_labels()
    if labels:
        figure = axes.figure
        figure.legend(loc="outside lower center", ncols=columns, handlelength=3.2, columnspacing=1)


def logarithmic(axes: Axes, name: Literal["x", "y"]) -> None:
    """Make an axis logarithmic, with plain numbers at its ticks; after all data is drawn."""
    axis = axes.xaxis if name == "x" else axes.yaxis
    (axes.set_xscale if name == "x" else axes.set_yscale)("log")
    low, high = axis.get_view_interval()
    digits = (1.0, 2.0, 5.0) if high < 500 * low else (1.0,)
    axis.set_major_locator(LogLocator(subs=digits, numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def name_points(axes: Axes, points: np.ndarray, names: Sequence[str]) -> None:
    """Write names beside points, from the first on, and leave out those that would overlap.

    Args:
        axes: in which everything else is drawn.
        points: (N, 2) x and y.
        names: one per point.
    """
    axes.autoscale_view()
    middle = axes.transAxes.transform((0.5, 0.5))[0]
    taken: list[Bbox] = []
    for (x, y), place, name in zip(points, axes.transData.transform(points), names, strict=True):
        left, bottom, width = place[0] + 4, place[1] + 3, 5.5 * len(name)  # points and pixels alike
        right_aligned = place[0] > middle
        if right_aligned:
            left = place[0] - 4 - width
        box = Bbox.from_bounds(left, bottom, width, 8)
        if any(box.overlaps(other) for other in taken):
            continue
        taken.append(box)
        axes.annotate(
            name,
            (x, y),
            (-4 if right_aligned else 4, 3),
            textcoords="offset points",
            fontsize=8,
            ha="right" if right_aligned else "left",
        )


def whole_numbers(axes: Axes) -> None:
    """Put the ticks of the x axis at whole numbers, as of epochs."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def vertical_lines(axes: Axes, places: Sequence[float], label: str, line: str) -> None:
    """Mark places of the x axis by lines of a style, with one entry in the legend."""
    for number, place in enumerate(places):
        name = label if number == 0 else None
        axes.axvline(place, color=INK, alpha=0.8, linewidth=1.4, linestyle=line, label=name)


def _inline(svg: str, key: str, alt: str) -> str:
    """The element of an SVG file, with names that are unique on the page and no fixed size."""
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _LINK)
    root = ElementTree.fromstring(svg)
    # The file's own style sheet would apply to the whole page, which has its rules too.
    for parent in list(root.iter()):
        for unused in (*parent.findall("{*}metadata"), *parent.findall("{*}style")):
            parent.remove(unused)
    for element in root.iter():
        for name, value in element.attrib.items():
            if name == "id":
                value = f"{key}-{value}"
            elif name == f"{{{_LINK}}}href" and value.startswith("#"):
                value = f"#{key}-{value[1:]}"
            value = value.replace("url(#", f"url(#{key}-").replace(INK, "currentColor")
            element.set(name, value)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-label", alt)
    return ElementTree.tostring(root, encoding="unicode")
