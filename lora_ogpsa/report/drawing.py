"""`Picture`: a drawing as SVG that fits into any page, and as PNG on white."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Text and axes; `currentColor` in the SVG, so that it is legible on a dark page too.
_INK = "#24292f"
_SIZE = (4.6, 3.3)  # inches: on a telephone the letters keep about their size
_RC = {
    "font.size": 9.0,
    "svg.fonttype": "none",  # letters stay letters: small, sharp, and read aloud
    "text.parse_math": False,  # names are the user's, and may hold a dollar
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


@dataclass(frozen=True)
class Picture:
    """One picture.

    Attributes:
        name: of its file, without the ending.
        title: heading.
        alt: what it shows, for those who do not see it.
        svg: for the page, without a prolog.
        png: for the Markdown file, on white.
    """

    name: str
    title: str
    alt: str
    svg: str
    png: bytes


def picture(name: str, title: str, alt: str, draw: Callable[[Any], None]) -> Picture:
    """Draw a picture in both forms.

    Args:
        name: of its file, without the ending.
        title: heading.
        alt: what it shows, for those who do not see it.
        draw: draws on the axes that it is given.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_RC, "svg.hashsalt": name}):
        # Not through pyplot, which would keep the figure and ask for a screen.
        figure = Figure(figsize=_SIZE, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure.subplots())
        vector, raster = io.StringIO(), io.BytesIO()
        figure.savefig(vector, format="svg", metadata={"Date": None})
        figure.set_layout_engine("none")  # the same for both
        figure.savefig(raster, format="png", dpi=150, facecolor="white")
    return Picture(name, title, alt, _for_page(vector.getvalue(), name), raster.getvalue())


def _for_page(svg: str, name: str) -> str:
    """An SVG document as an element of a page: its own ids, the page's colours, nothing to load."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r' id="', f' id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'xlink:href="#', f'xlink:href="#{name}-', svg)
    svg = svg.replace(_INK, "currentColor")
    return svg.replace("<svg ", '<svg aria-hidden="true" ', 1)
