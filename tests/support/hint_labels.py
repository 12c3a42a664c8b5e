"""Say whether a hint about a mutant of diffusers is right."""

from typing import Any

from ast_mutants import Mutant


def label(mutant: Mutant, one: dict[str, Any]) -> str:
    return "unclear" if one["hints"] else "none"
