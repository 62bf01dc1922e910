"""What commands on models import, and how it is set up."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from masformer.defaults import SEED


@contextmanager
def importing() -> Iterator[None]:
    """Lets the collector rest where much is imported: it would look through all that comes again and again, which takes
    a quarter of the time. In a process that has just begun, it need not look through it later either, least of all at
    the end.
    """
    begun, collecting = "transformers" not in sys.modules, gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if begun:
            gc.freeze()
        if collecting:
            gc.enable()


def prepare() -> None:
    """Imports what commands on models need, and sets it up."""
    with importing():
        import torch
        import transformers

        import masformer.models.checkpoint  # noqa: F401
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    torch.manual_seed(SEED)
