"""Write elements and numbers of the HTML report."""

import math
from html import escape

VOID = {"input"}


def tag(name: str, *children: str, **attributes: object) -> str:
    """Return an element as markup.

    Attributes are escaped. Children are markup, so foreign text must go through `escape` first.
    """
    words = [name, *(f'{key.rstrip("_").replace("_", "-")}="{escape(str(x))}"' for key, x in attributes.items())]
    return f"<{' '.join(words)}>" + ("" if name in VOID else f"{''.join(children)}</{name}>")


def number(x: float | None, digits: int = 3) -> str:
    """Return a number as text: 1.20e-07, 0.345, 12, 48000, ∞, and an em dash for None."""
    if x is None:
        return "—"
    if not math.isfinite(x):
        return "NaN" if math.isnan(x) else "∞" if x > 0 else "-∞"
    short = f"{abs(x):.{digits}g}"
    if "e" in short:
        short = f"{abs(x):.0f}" if 1 < abs(x) < 1e7 else f"{abs(x):.{digits - 1}e}"
    return f"-{short}" if x < 0 else short
