"""Where kernels of our own run."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def on(device: torch.device) -> AbstractContextManager[object]:
    """A context in which Triton launches on a device, whichever is the current one; for the CPU, its interpreter."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
