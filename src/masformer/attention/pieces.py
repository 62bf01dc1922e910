"""Attention to some of the keys, with the log-sum-exps of its scores, to be joined with attention to the others.

A piece is a rectangle, every query of which sees every key, or a triangle: documents that see themselves causally.
Outputs are joined by `masformer.attention.tiled.joined`; the gradients of a piece are exact with the *joined* output
and log-sum-exps (see `masformer.attention.flash`), whatever the other pieces are.
"""

from __future__ import annotations

from torch import Tensor

from masformer.attention.call import Call
from masformer.attention.flash import Flash
from masformer.attention.tiled import Tiled
from masformer.errors import MasformerError

BACKENDS = "auto", "flash", "tiled"


def attend_piece(call: Call, causal: bool, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Attention under a full span; no graph is kept.

    Args:
        call: without sinks; with a layout only if causal.
        causal: whether it is a triangle, which has as many keys as queries; else a rectangle.
        backend: one of `BACKENDS`; auto is FlashAttention where it can do the call, else torch's kernel for CPUs, or
            plain products where that cannot: with soft caps, dropout, or values of another width than the keys.

    Returns:
        [batch, query_heads, query_len, value_dim], and [batch, query_heads, query_len], at least float32. Padding has
        any finite numbers.

    Raises:
        MasformerError: the backend cannot do it.
    """
    return _chosen(call, backend).piece(call, causal)


def piece_gradients(
    call: Call, causal: bool, grad: Tensor, out: Tensor, sums: Tensor, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value. Dropout drops the same weights if random numbers are the same.

    Args:
        call: see `attend_piece`, also for causal and backend.
        causal: see there.
        grad: of the joined output; zero for padding.
        out: the joined output.
        sums: the joined log-sum-exps.
        backend: see there.
    """
    return _chosen(call, backend).piece_gradients(call, causal, grad, out, sums)


def _chosen(call: Call, backend: str) -> Flash | Tiled:
    if backend not in BACKENDS:
        raise MasformerError(
            f"backend {backend} does not compute full heads in pieces, as devices do that cannot share the heads; "
            f"allowed: {', '.join(BACKENDS)}"
        )
    reason = "" if backend == "tiled" else Flash().objection(call)
    if reason is None:
        return Flash()
    if backend == "flash":
        raise MasformerError(reason)
    return Tiled()
