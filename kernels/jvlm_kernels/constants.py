"""Constants that several kernels share."""

import math

# Attention scores that are masked out. Finite, so that a row of masked scores gives exp(0) and no NaN.
MASK_VALUE = -1e30
# Finite stand-in for minus infinity: a running maximum starts here. It lies above `MASK_VALUE`, so that
# exp(MASK_VALUE - maximum) is 0 even in a query that attends to no key.
NEG_INF = -1e20
LOG2E = math.log2(math.e)  # exp(x) == exp2(x * LOG2E)
LANES = 128  # of a TPU vector register: its last dimension
