"""Find out which operand of a stage is wrong: scaled, negated, shifted, rounded, left out, or another token's.

The formulas of formulas.py are computed again, each time with one operand, or one step on the way, changed in one way.
Factors and added numbers are fitted.
"""

from collections.abc import Iterator
from math import isnan

from torch import Tensor

from .evidence import Evidence
from .formulas import Formula, Step, formulas
from .patterns import explains, reproduces, slope

ITERATIONS = 6  # of Gauss and Newton, for a factor or a number; a formula that is affine in its operand needs one
SMALL = 1e-4  # the difference from which a derivative is made
FACTORS = {0.0: "left out", -1.0: "negated"}
TOLD = (*FACTORS, 0.5, 2.0)  # factors and numbers that are taken for what they nearly are


def wrong_operand(e: Evidence) -> str | None:
    """Recognise one operand of this stage that is changed in one way."""
    if not e.candidate.isfinite().all():
        return None
    return next((said for formula in formulas(e) if (said := change_of(e, formula)) is not None), None)


def change_of(e: Evidence, formula: Formula) -> str | None:
    """Return which operand of a formula is changed, and how, or None if no change fits."""
    operands = {name: x.double() for name, x in formula.operands.items()}
    right = formula.compute(operands)
    if right.numel() != e.reference.numel() or not reproduces(e, right):
        return None
    wanted = e.candidate.double().reshape(right.shape)
    for name, x in operands.items():

        def made(changed: Tensor, name: str = name) -> Tensor:
            return formula.compute({**operands, name: changed})

        for what, changed in (*fits_of(wanted, x, made), *displaced(x)):
            if explains(e, made(changed)):
                return f"{name} {what}"
    for what, other in formula.others.items():
        if explains(e, formula.compute({name: x.double() for name, x in other.items()})):
            return what
    return None if formula.law is None else formula.law(wanted)


def fits_of(wanted: Tensor, x: Tensor, made: Step) -> Iterator[tuple[str, Tensor]]:
    """Yield an operand times the factor, and plus the number, that fit the candidate best."""
    for start in (1.0, -1.0):
        factor = start
        for _ in range(ITERATIONS):
            now = made(x * factor)
            factor += slope(made(x * (factor + SMALL)) - now, wanted - now).item() * SMALL
        if not isnan(factor) and abs(factor - 1) > 1e-7:
            exact = next((y for y in TOLD if abs(factor - y) < 1e-4), factor)
            yield FACTORS.get(exact, f"times {exact:.4g}"), x * exact
    number = 0.0
    for _ in range(ITERATIONS):
        now = made(x + number)
        number += slope(made(x + (number + SMALL)) - now, wanted - now).item() * SMALL
    if not isnan(number) and number != 0:
        yield f"plus {number:.4g}", x + number


def displaced(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield an operand that is rounded, left out, negated, or has its entries in other places."""
    yield "rounded to bfloat16", x.bfloat16().double()
    yield "rounded to float16", x.half().double()
    for factor, what in FACTORS.items():  # a factor that nothing depends on smoothly, as on a mask's, is not fitted
        yield what, x * factor
    for dim in (dim for dim in range(x.ndim) if x.shape[dim] > 1):
        what = {0: "batch element", 1: "token"}.get(dim, "channel" if dim == x.ndim - 1 else "row")
        for by, which in ((1, "previous"), (-1, "next")):
            yield f"of the {which} {what}", x.roll(by, dim)
        yield f"with {what}s in reverse order", x.flip(dim)
