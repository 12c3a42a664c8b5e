"""List all hints on what a bug looks like, in the order of the report.

A new hint is a function in levels.py, mistakes.py, operands.py or patterns.py, and a line here.
"""

from . import levels, mistakes, operands, patterns
from .evidence import Hint

HINTS: tuple[Hint, ...] = (  # the most specific first: mistakes by name, then places, numbers and sizes
    levels.wrong_level,
    mistakes.other_sinusoid,
    patterns.axis_major,
    patterns.padding_side,
    patterns.shared_heads,
    mistakes.wrong_positions,
    mistakes.wrong_frequencies,
    mistakes.wrong_rows,
    mistakes.sequential_exchange,
    mistakes.wrong_residual,
    mistakes.wrong_rotation,
    mistakes.wrong_attention,
    mistakes.wrong_projection,
    mistakes.other_activation,
    mistakes.wrong_norm,
    mistakes.other_epsilon,
    operands.wrong_operand,
    patterns.swapped_rows,
    patterns.permuted_heads,
    patterns.swapped_halves,
    patterns.reordered_planes,
    patterns.shifted_token,
    patterns.reordered_tokens,
    patterns.only_some_tokens,
    patterns.another_tap,
    patterns.constant_factor,
    patterns.constant_vector,
    patterns.scaled_weight,
    patterns.factor_per_head,
    patterns.factor_per_channel,
    patterns.collapsed_tokens,
    patterns.collapsed_batch,
    patterns.only_one_axis,
    patterns.only_one_bound,
    patterns.only_one_batch_element,
    patterns.not_finite,
    mistakes.float32_angles,
    patterns.rounded,
    patterns.narrow_numbers,
    patterns.more_exact,
    patterns.rounding_noise,
)
