"""Pure torch twins of the kernels, with the same signatures."""

from symlm_kernels.reference.products import apply, apply_polynomial, gram, is_transposed, symmetric_product
from symlm_kernels.reference.rows import (
    SMALLEST_PLAIN,
    MeanNorms,
    center,
    centered_row_norm_step,
    is_plain,
    mean_norms,
    normal,
    over_rms,
    rms_divisors,
    row_directions,
    row_norm_step,
    row_norms,
    step_by_directions,
    unit_rows,
)
from symlm_kernels.reference.stacks import stack_inputs, stack_step

__all__ = [
    "SMALLEST_PLAIN",
    "MeanNorms",
    "apply",
    "apply_polynomial",
    "center",
    "centered_row_norm_step",
    "gram",
    "is_plain",
    "is_transposed",
    "mean_norms",
    "normal",
    "over_rms",
    "rms_divisors",
    "row_directions",
    "row_norm_step",
    "row_norms",
    "stack_inputs",
    "stack_step",
    "step_by_directions",
    "symmetric_product",
    "unit_rows",
]
