"""How new adapters begin: in numpy, so that the same seed gives the same matrices on every mesh.

Kernels are [*, i, o]: the transpose of what the papers write.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from jvlm.adapters.config import Init
from jvlm.adapters.plan import Group

ReadMatrix = Callable[[tuple[int, ...]], np.ndarray]


def pairs(
    init: Init,
    group: Group,
    shape: tuple[int, int],
    kernel: ReadMatrix,
    rng: np.random.Generator,
    *,
    is_table: bool = False,
) -> tuple[Float[np.ndarray, "*L i r"], Float[np.ndarray, "*L r o"]]:
    """Return (a, b) of all matrices of a parameter; pairs above a matrix's own rank are zeros.

    "default" is PEFT's: a from U(-1/sqrt(i), 1/sqrt(i)) and b zero; for an embedding table a zero and b from N(0, 1).
    "gaussian" draws a from N(0, 1/r) by standard deviation. "pissa" takes the first r singular triples of the kernel
    (arXiv 2404.02948), "olora" the first r columns of its QR decomposition (arXiv 2406.01775).

    Args:
      kernel: gives the matrix at an index.
      is_table: the parameter is an embedding table.
    """
    d_in, d_out = shape
    a = np.zeros((*group.lead, d_in, group.rank), np.float32)
    b = np.zeros((*group.lead, group.rank, d_out), np.float32)
    for index, i in group.indices:
        rank = group.ranks[i]
        if init in ("pissa", "olora"):
            make = pissa if init == "pissa" else olora
            a[index][:, :rank], b[index][:rank] = make(kernel(index).astype(np.float64), rank, group.scales[i])
        elif is_table:
            b[index][:rank] = rng.standard_normal((rank, d_out), np.float32)
        elif init == "gaussian":
            a[index][:, :rank] = rng.standard_normal((d_in, rank), np.float32) / rank
        else:
            a[index][:, :rank] = (2 * rng.random((d_in, rank), np.float32) - 1) / math.sqrt(d_in)
    return a, b


def pissa(
    kernel: Float[np.ndarray, "i o"], rank: int, scale: float
) -> tuple[Float[np.ndarray, "i r"], Float[np.ndarray, "r o"]]:
    """Return a and b with ``scale * a b`` the best approximation of the kernel of that rank."""
    u, s, vt = np.linalg.svd(kernel, full_matrices=False)
    root = np.sqrt(s[:rank] / scale)
    return u[:, :rank] * root, root[:, None] * vt[:rank]


def olora(
    kernel: Float[np.ndarray, "i o"], rank: int, scale: float
) -> tuple[Float[np.ndarray, "i r"], Float[np.ndarray, "r o"]]:
    """Return the first r columns of Q and rows of R, where kernel^T = Q R; ``scale`` plays no part."""
    q, r = np.linalg.qr(kernel.T)
    return r[:rank].T, q[:, :rank].T


def norms(shape: tuple[int, ...], kernel: ReadMatrix) -> Float[np.ndarray, "*L o"]:
    """Return the length of each column of a stack of this shape: the magnitudes that change nothing."""
    result = np.zeros((*shape[:-2], shape[-1]), np.float32)
    for index in np.ndindex(shape[:-2]):
        result[index] = np.sqrt(np.square(kernel(index).astype(np.float32)).sum(0))
    return result
