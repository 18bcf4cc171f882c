"""What all figures of the report have in common: colours, style, and their two files, SVG and PDF.

The SVG is a file of its own, and stands inside the page too, where it follows the page's colours.
"""

import io
import re
import warnings
import xml.etree.ElementTree as ET
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes

# Role of a colour -> its value in the figure files. In the page each becomes the CSS variable of its name, which is
# how figures follow the light and the dark scheme. The series are the colours of Okabe and Ito, made to be told apart
# by colour-blind readers; dashes and markers tell them apart in grey.
COLOURS = {
    "ink": "#1b1f24",
    "quiet": "#6a737d",
    "rule": "#d3d8de",
    "chance": "#b9c0c8",
    "series-0": "#0072b2",
    "series-1": "#d55e00",
    "series-2": "#009e73",
    "series-3": "#cc79a7",
    "series-4": "#b07d00",
    "series-5": "#3f9fd1",
}
_SERIES = [name for name in COLOURS if name.startswith("series-")]
DASHES: list[Any] = [
    "-",
    (0, (5, 1.6)),
    (0, (1.2, 1.4)),
    (0, (6, 1.5, 1.2, 1.5)),
    (0, (3, 1, 1, 1, 1, 1)),
    (0, (9, 2)),
]
HATCHES = ["", "////", "----", "xxxx", "||||", "++++"]
MARKERS = ["o", "s", "^", "D", "v", "P"]
WIDTH = 7.4  # inches
_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be searched, and takes the page's font
    "text.parse_math": False,  # a "$" in a layer's name is a "$"
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": COLOURS["ink"],
    "axes.labelcolor": COLOURS["ink"],
    "axes.edgecolor": COLOURS["quiet"],
    "axes.linewidth": 0.7,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": True,
    "xtick.color": COLOURS["quiet"],
    "ytick.color": COLOURS["quiet"],
    "xtick.labelcolor": COLOURS["ink"],
    "ytick.labelcolor": COLOURS["ink"],
    "grid.color": COLOURS["rule"],
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


@dataclass(frozen=True)
class Drawing:
    """One figure as the content of its two files."""

    svg: str
    pdf: bytes


def inline(svg: str, prefix: str, description: str) -> str:
    """Return the figure as an ``<svg>`` element for an HTML page.

    Ids get ``prefix``, since a page holds many figures; colours become the page's CSS variables; what would act
    outside the figure (its style sheet) or is of no use in a page (metadata) is dropped.

    Args:
        svg: a figure as the other functions return it.
        prefix: unique in the page; letters, digits and "-".
        description: what a screen reader says instead; any text.
    """
    root = ET.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}style", f"{{{_SVG}}}metadata"):
                parent.remove(child)
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            if key == "id":
                element.set(key, f"{prefix}-{value}")
            elif key == f"{{{_XLINK}}}href":
                del element.attrib[key]
                # A picture holds its own bytes; everything else points to a place in the figure.
                inside = value.startswith("data:image/png;base64,")
                element.set("href", value if inside else f"#{prefix}-{value.removeprefix('#')}")
            elif key in ("style", "fill", "stroke", "clip-path"):
                value = re.sub(r"url\(#", f"url(#{prefix}-", value)
                # The page's own font: matplotlib's is not on every machine.
                element.set(key, re.sub(r"(font: [^;]*?px) [^;]*", r"\1 var(--figure-font)", _with_variables(value)))
    width = float(root.attrib.pop("width", "0pt").removesuffix("pt"))
    root.attrib.pop("height", None)
    if 0 < width < 72 * WIDTH - 1:
        root.set("style", f"max-width: {100 * width / (72 * WIDTH):.1f}%")  # letters are as large in every figure
    root.set("role", "img")
    title = ET.Element(f"{{{_SVG}}}title")
    title.text = description
    root.insert(0, title)
    for element in root.iter():
        element.tag = element.tag.removeprefix(f"{{{_SVG}}}")
    return ET.tostring(root, encoding="unicode")


def _with_variables(value: str) -> str:
    for name, colour in COLOURS.items():
        value = value.replace(colour, f"var(--{name})")
    return value


@contextmanager
def canvas(width: float, height: float) -> "Iterator[Figure]":
    """Give an empty figure of this size (inches), in the report's style."""
    with mpl.rc_context(cast(Any, _STYLE)), warnings.catch_warnings():
        # The browser's fonts draw the text, so what matplotlib's own font lacks does not matter.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure


def drawn(figure: Figure, name: str) -> Drawing:
    """Return the figure as the content of its files, the same bytes for the same numbers.

    Args:
        figure: what to draw.
        name: unique name of the figure in its page.
    """
    svg, pdf = io.BytesIO(), io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": f"sublens {name}"}):
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    figure.set_layout_engine("none")  # what was laid out for the one holds for the other
    figure.savefig(pdf, format="pdf", metadata={"CreationDate": None, "Creator": None, "Producer": None})
    return Drawing(svg=svg.getvalue().decode("utf-8"), pdf=pdf.getvalue())


def series_colour(index: int) -> str:
    """Return the colour of the series in this place."""
    return COLOURS[_SERIES[index % len(_SERIES)]]


def legend_label(name: str) -> str:
    """Return the name as a legend shows it."""
    # Legends leave out labels that begin with an underscore; a word joiner in front is not seen.
    return f"\u2060{name}" if name.startswith("_") else name


def add_legend(figure: Figure, axes: "Axes") -> None:
    """Put the names of what ``axes`` shows above the figure."""
    handles, labels = axes.get_legend_handles_labels()
    # As many in a line as the figure is wide: about 100 characters, of which each entry's line or marker takes ten.
    columns = max(1, min(len(labels), 100 // (max(map(len, labels)) + 10)))
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, handlelength=2.6)


def shorten(name: str, limit: int = 36) -> str:
    """Cut the middle out of a long name: in dotted names both ends tell layers apart."""
    return name if len(name) <= limit else f"{name[: limit // 2 - 1]}…{name[-(limit // 2) :]}"
