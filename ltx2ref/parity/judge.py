"""How wrong a tensor may be: one budget, and one set of verdicts, for `verify`, `audit` and the kit.

A candidate's error against its truth may be `1.5 * err(reference) + 4 * 2^-23 * |truth|`: what the reference itself
loses in the same dtype, and half of that again for another order of the same roundings; without the floor the reference
fails against itself on another processor. A timestep's sinusoid has an analytic bound in the budget's place.

    share of the budget        verify, kit               audit
    up to 1                    within budget             rounding
    up to 2, in bfloat16 4     within budget, a note     suspect: rounded more often than the reference
    above                      FAILED, diverged          diverged
"""
from typing import NamedTuple

import torch
from torch import Tensor

SHARE, FLOOR = 1.5, 4 * 2.0**-23  # of the reference's own error; of the truth's norm


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


def tolerable(dtype: torch.dtype, bounded: bool = False) -> float:
    """Return up to how many budgets a difference may be rounding: there are honest ways of computing that round more
    often than the reference.

    RoPE angles reduced by one float32 constant take 1.9. In a narrow dtype a matrix product of eight parts is rounded
    15 times and not once, and its error grows by the root of that. A bound has no such ways.
    """
    return 1.0 if bounded else 4.0 if torch.finfo(dtype).bits < 32 else 2.0
