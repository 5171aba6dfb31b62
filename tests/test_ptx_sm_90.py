"""What test_ptx.py asks of sm_80, of sm_90: a file of its own, so that two workers share the work."""

from test_ptx import (  # noqa: F401
    small,
    test_compiled_kernels_keep_the_error_rule,
    test_every_kernel_was_executed_in_bf16,
    test_what_the_compiler_makes_of_products_and_boxes_was_executed,
)

SM = 90
