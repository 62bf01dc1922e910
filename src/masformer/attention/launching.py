"""What kernels of our own in Triton have in common."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

NARROWEST = 16
"""Triton multiplies matrices at least so wide: few sinks, or few queries of a key head, are filled up to it."""


def on(device: torch.device) -> AbstractContextManager[object]:
    """A context in which Triton launches on a device, whichever is the current one; for the CPU, its interpreter."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
