"""Write elements and numbers of the HTML report."""

import math
import re
from collections.abc import Mapping
from html import escape

VOID = {"input"}
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


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


def power_of_ten(exponent: int) -> str:
    """Return a power of ten as text, such as 10⁻⁷; 1 for the exponent 0."""
    return f"10{str(exponent).translate(SUPERSCRIPT)}" if exponent else "1"


def breakable(text: str) -> str:
    """Escape a text, and let long names break after a dot or an underscore, for narrow screens."""
    return re.sub(r"(?<=[._])(?=\w)", "<wbr>", escape(text))


def folded(title: str, *children: str) -> str:
    """Return markup that the reader has to unfold, under its title."""
    return tag("details", tag("summary", title), *children)


def explained(words: Mapping[str, str]) -> str:
    """Return words with their meanings, to be read beside the numbers that they name."""
    pairs = [tag("div", tag("dt", escape(word)), tag("dd", escape(said))) for word, said in words.items()]
    return tag("dl", *pairs, class_="meanings")
