"""Text for a terminal: names from untrusted files are shown without characters that control it."""


def printable(text: str) -> str:
    r"""Replace each character that is not printable by its escape, such as `\x1b`, so that no file controls a terminal.

    Besides control characters these are line breaks, and marks that hide text or reverse its direction.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable_lines(text: str) -> str:
    r"""Escape like `printable`, but keep line breaks ("\n")."""
    return "\n".join(map(printable, text.split("\n")))
