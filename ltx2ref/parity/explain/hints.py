"""What the bug looks like: hints for the first tap at which two implementations part.

A hint explains, or is silent. It repeats a mistake that ports make, on what the reference computed, and speaks only if
this reproduces the candidate (`evidence.explains`). Its sentence says what the candidate has, with the number found.
"""

from collections.abc import Callable

from . import numbers, phases, places, stages
from .evidence import Evidence, by_token

__all__ = ["Evidence", "HINTS", "hints", "named"]

Hint = Callable[[Evidence], str | None]
HINTS: tuple[Hint, ...] = (  # the most specific first: a mistake with a name, a place, a number, a size
    phases.scaled_timestep,
    phases.other_noise_level,
    phases.rounded_timestep,
    phases.other_sinusoid,
    places.axis_major,
    places.padding_side,
    places.shared_heads,
    phases.wrong_positions,
    phases.wrong_frequencies,
    stages.wrong_rows,
    stages.sequential_exchange,
    stages.wrong_residual,
    stages.wrong_rotation,
    stages.wrong_attention,
    stages.wrong_projection,
    stages.other_activation,
    stages.wrong_norm,
    places.swapped_rows,
    places.permuted_heads,
    places.swapped_halves,
    places.reordered_planes,
    places.shifted_token,
    places.reordered_tokens,
    places.only_some_tokens,
    places.another_tap,
    numbers.constant_factor,
    numbers.constant_vector,
    numbers.scaled_weight,
    numbers.factor_per_head,
    numbers.factor_per_channel,
    places.collapsed_tokens,
    places.collapsed_batch,
    places.only_one_axis,
    places.only_one_batch_element,
    numbers.not_finite,
    phases.float32_angles,
    numbers.rounded,
    numbers.narrow_numbers,
    numbers.more_exact,
    numbers.rounding_noise,
)


def hints(e: Evidence) -> tuple[str, ...]:
    """What the difference looks like, the most specific first. Nothing, if nothing explains it."""
    return tuple(named(e).values())


def named(e: Evidence) -> dict[str, str]:
    """The same, by the names of the hints, which all look at their evidence `by_token`."""
    seen = by_token(e)
    found = ((hint.__name__, hint(seen)) for hint in HINTS)
    return {name: sentence for name, sentence in found if sentence is not None}
