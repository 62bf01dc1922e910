"""Defaults that the command line shows and the work below it takes; here, so that showing them imports nothing."""

SEED = 0
PREFILL_CHUNK = 2048
"""Prompt tokens in one forward pass: what a pass needs beside the cache does not grow with the prompt."""
LOSS_CHUNK = 512
"""Positions whose logits exist at the same time, where memory is not asked for more."""
BATCH = 8
"""Prompts that are continued together."""
SHOT_TOKENS = 256
"""Of a document that is shown as an example, at most."""
