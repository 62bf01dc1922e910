"""Defaults and names that the command line shows; here, so that showing them imports nothing."""

from typing import Literal

TargetName = Literal["transformers", "vllm", "sglang", "mlx-lm", "llama.cpp"]
"""Tools that models are exported for: `masformer.export.targets`."""

SEED = 0
PREFILL_CHUNK = 2048
"""Prompt tokens in one forward pass: what a pass needs beside the cache does not grow with the prompt."""
LOSS_CHUNK = 512
"""Positions whose logits exist at the same time, where memory is not asked for more."""
BATCH = 8
"""Prompts that are continued together."""
SHOT_TOKENS = 256
"""Of a document that is shown as an example, at most."""
