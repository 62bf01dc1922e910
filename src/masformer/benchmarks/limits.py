"""What the machine could do at best, measured in the same run: a rate of matrix products and a rate of copies.

A pass over `flops` operations and `bytes` of memory takes at least `max(flops / rate, bytes / rate)` (the roofline of
Williams et al., 2009), so that a time can be read as so much of the limit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from masformer.benchmarks.timing import Timing

PRODUCT, COPY = "matrix product", "copy"
"""Names of the two calls among those that are timed."""


@dataclass(frozen=True)
class Limits:
    """Rates of this machine.

    Attributes:
        flops_per_second: of the product of two square matrices; a multiplication and an addition are two operations.
        bytes_per_second: of a copy; each byte is read and written, and counts twice.
    """

    flops_per_second: float
    bytes_per_second: float

    def to_dict(self) -> dict[str, float]:
        """Plain values for JSON."""
        return {"flops_per_second": self.flops_per_second, "bytes_per_second": self.bytes_per_second}

    def of(self, median: float, flops: float, bytes_moved: float) -> dict[str, Any]:
        """Columns of a row: operations, bytes, the limit in seconds, what sets it, and the share of it reached."""
        by_flops, by_bytes = flops / self.flops_per_second, bytes_moved / self.bytes_per_second
        limit = max(by_flops, by_bytes)
        return {
            "flops": flops,
            "bytes": bytes_moved,
            "limit_seconds": limit,
            "bound": "flops" if by_flops >= by_bytes else "bytes",
            "of_limit": limit / median,
        }


class Probe:
    """The two calls, to be timed in the same rounds as what they are held against.

    Args:
        dtype: of the matrices.
        device: where.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        side = 8192 if device.type == "cuda" else 1536
        self.left, self.right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        self.source = torch.zeros(2**30 if device.type == "cuda" else 2**25, dtype=torch.uint8, device=device)
        self.target = torch.empty_like(self.source)

    def calls(self) -> dict[str, Callable[[], object]]:
        """Name -> what to time."""
        return {PRODUCT: lambda: self.left @ self.right, COPY: lambda: self.target.copy_(self.source)}

    def limits(self, times: Mapping[str, Timing]) -> Limits:
        """From the times of the calls: medians."""
        product, copy = (times[name].median for name in (PRODUCT, COPY))
        return Limits(2 * self.left.shape[0] ** 3 / product, 2 * self.source.numel() / copy)
