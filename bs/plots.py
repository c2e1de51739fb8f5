"""How plots look, and where they go: a file, or text inside a page. matplotlib is loaded when it is asked for."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wdmoe.runtime.errors import OutputError, WdmoeError

# Told apart by those who see few colours, and 3:1 or better on white and on nearly black.
COLORS = ("#4477aa", "#d95f4c", "#2a8a45", "#b0519a", "#93801a", "#2b8f9c")
MARKERS = "osD^vPX*"
_INK = "#010203"  # stands for the colour of the text around an inline figure


def require_matplotlib(option: str) -> None:
    """Refuse an option that needs matplotlib where there is none.

    Raises:
        WdmoeError: it is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise WdmoeError(f"{option} needs matplotlib ({error}): pip install 'wdmoe[plots]'") from error


def require_format(option: str, path: Path) -> None:
    """Refuse a plot whose ending matplotlib cannot write.

    Raises:
        ValueError: says which endings there are.
        WdmoeError: matplotlib is not installed.
    """
    require_matplotlib(option)
    from matplotlib.figure import Figure

    known = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix.lstrip(".").lower() not in known:
        raise ValueError(f"{option} {path}: the ending decides the format, expected one of .{', .'.join(known)}")


@contextmanager
def style(ink: str = "black") -> Iterator[None]:
    """Draw in the style of this project: no frame above and to the right, names as they are and not as formulas."""
    import matplotlib

    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    options = {
        "font.size": 10, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
        "text.parse_math": False, "figure.constrained_layout.use": True, **dict.fromkeys(inked, ink),
    }  # fmt: skip
    with matplotlib.rc_context(options):
        yield


def new_figure(width_in: float, height_in: float) -> Any:
    """Return an empty matplotlib Figure."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width_in, height_in))


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure whole or not at all; the ending of the path decides the format.

    Raises:
        OutputError: it cannot be written there.
    """
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    try:
        figure.savefig(partial, dpi=140)
    except (OSError, ValueError) as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"cannot write the plot {path}: {error}") from error
    partial.replace(path)


@contextmanager
def inline_style(key: str) -> Iterator[None]:
    """Draw what `inline_svg` takes: text stays text, in the colour of the page."""
    import matplotlib

    with style(_INK), matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": key}):
        yield


def inline_svg(figure: Any, key: str, label: str) -> str:
    """Return a figure as an <svg> element that stands in a page beside others.

    Args:
        figure: drawn within `inline_style`.
        key: letters that no other figure of the page has; what the element refers to by name begins with it.
        label: what a screen reader says, escaped.
    """
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    for unwanted in (r"<metadata>.*?</metadata>", r"<style.*?</style>", r"<!--.*?-->"):
        svg = re.sub(unwanted, "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{key}-", svg)
    svg = re.sub(r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{label}">', svg, count=1)
    # The prefix of links is declared on the element that was just replaced; a page needs none.
    return svg.replace("xlink:href", "href").replace(_INK, "currentColor")
