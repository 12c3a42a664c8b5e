"""How wrong a tensor may be: one budget, and one set of verdicts, for `verify`, `audit` and the kit.

A candidate's error against its truth may be `1.5 * err(reference) + 4 * 2^-23 * |truth|`: what the reference itself
loses in the same dtype, and half of that again for another order of the same roundings; without the floor the reference
fails against itself on another processor. A timestep's sinusoid, and RoPE tables of float32 frequencies, have an
analytic bound in the budget's place.

    share of the budget        verify, kit               audit
    up to 1                    within budget             rounding
    up to 2                    within budget, a note     suspect: rounded more often than the reference
    above                      FAILED, diverged          diverged

There are honest ways of computing between 1 and 2: RoPE angles that are reduced by one float32 constant take 1.9, a
bfloat16 matrix product in two halves that are rounded before they are added 1.6. A bound has no such band.
"""
from typing import NamedTuple

import torch
from torch import Tensor

SHARE, FLOOR = 1.5, 4 * 2.0**-23  # of the reference's own error; of the truth's norm
CLEARLY = 2.0  # budgets: what more roundings than the reference's do not explain


class Errors(NamedTuple):
    """L2 norms."""
    error: float      # of the candidate against its truth
    reference: float  # of the reference against its own
    allowed: float    # the budget
    size: float       # of the truth

    @property
    def share(self) -> float:
        return self.error / self.allowed if self.allowed else (0.0 if self.error == 0 else float("inf"))


def norm(x: Tensor) -> float:
    return torch.linalg.vector_norm(x.double()).item()


def errors(candidate: Tensor, reference: Tensor, candidate_true: Tensor, true: Tensor, bound: Tensor | None = None,
           slack: float = 0.0) -> Errors:
    """Measure both sides, each against its own truth. `bound` takes the budget's place, `slack` is added to it."""
    error, own, size = norm(candidate.double() - candidate_true), norm(reference.double() - true), norm(candidate_true)
    allowed = SHARE * own + FLOOR * norm(true) + slack if bound is None else norm(bound)
    return Errors(error, own, allowed, size)
