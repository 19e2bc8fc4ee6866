"""How much arithmetic encoders, connectors and decoders need: what their configurations declare it in.

A multiplication and its addition are two FLOP. Only what the result needs is counted: real patches and tokens, and each
query with the keys that it may attend to. Recomputation, norms, activations and look-ups are not counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Num


@dataclasses.dataclass(frozen=True)
class Counts:
    """What of a batch costs arithmetic.

    Attributes:
      segments: tokens of each conversation.
      images: patches of each image, tile or video frame.
      windows: patches of each attention window.
      vision_tokens: vision tokens that feed text tokens.
      targets: tokens whose successor is in the loss.
    """

    segments: np.ndarray
    images: np.ndarray
    windows: np.ndarray
    vision_tokens: int
    targets: int

    @property
    def tokens(self) -> int:
        """Tokens of all conversations."""
        return int(self.segments.sum())

    @property
    def patches(self) -> int:
        """Patches of all images."""
        return int(self.images.sum())


@dataclasses.dataclass(frozen=True)
class Product:
    """A weight of ``d_in`` x ``d_out`` that is multiplied with ``uses`` vectors.

    Attributes:
      entry: it reads what comes into its tower, where no gradient is needed unless something before it is trained.
      grouped: it is an expert's, and computed by `jvlm_kernels.grouped_matmul`.
    """

    uses: float | int
    d_in: int
    d_out: int
    entry: bool = False
    grouped: bool = False

    @property
    def flops(self) -> float:
        """FLOP of the product."""
        return 2.0 * self.uses * self.d_in * self.d_out


@dataclasses.dataclass(frozen=True)
class Work:
    """The arithmetic of a forward pass: products with weights, and the FLOP of attention's two products."""

    products: tuple[Product, ...] = ()
    attention: float = 0.0

    @property
    def linear(self) -> float:
        """FLOP of the products with weights."""
        return sum(product.flops for product in self.products)

    @property
    def total(self) -> float:
        """FLOP of everything."""
        return self.linear + self.attention


def attention_flops(pairs: float | int, width: int) -> float:
    """Return the FLOP of attention: scores and the sum of values, for ``pairs`` of a query and a key.

    Args:
      width: number of query heads times the size of a head.
    """
    return 4.0 * pairs * width


def squares(lengths: Num[np.ndarray, "..."]) -> float:
    """Return the pairs of queries and keys where segments of these lengths attend to all of themselves."""
    return float(np.square(lengths.astype(np.float64)).sum())


def attention_products(
    uses: float | int, width: int, q_width: int, kv_width: int, kv_uses: float | int | None = None
) -> Iterator[Product]:
    """Yield the products of an attention layer with q, k, v and output.

    Args:
      kv_uses: vectors that keys and values are made of; None is ``uses``.
    """
    yield Product(uses, width, q_width)
    for _ in range(2):
        yield Product(uses if kv_uses is None else kv_uses, width, kv_width)
    yield Product(uses, q_width, width)


def swiglu_products(
    uses: float | int, width: int, hidden: int, d_out: int | None = None, *, grouped: bool = False
) -> Iterator[Product]:
    """Yield the products of a gated MLP: gate, up, down."""
    for _ in range(2):
        yield Product(uses, width, hidden, grouped=grouped)
    yield Product(uses, hidden, width if d_out is None else d_out, grouped=grouped)


def plain_vit_work(counts: Counts, *, depth: int, width: int, hidden: int, patch_values: int) -> Work:
    """Return the arithmetic of a ViT whose layers attend to the whole image and have MLPs of two maps."""
    uses = counts.patches * depth
    products = (
        Product(counts.patches, patch_values, width, entry=True),
        *attention_products(uses, width, width, width),
        Product(uses, width, hidden),
        Product(uses, hidden, width),
    )
    return Work(products, attention_flops(depth * squares(counts.images), width))
