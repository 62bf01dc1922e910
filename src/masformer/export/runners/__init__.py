"""Scripts that run an export in its tool and note what it computes; they import nothing of masformer.

    python -I run_TOOL.py JOBS.json

JOBS.json is a list of jobs: `folder` (llama.cpp: the file), `tokens`, `positions` (those whose results are kept),
`new_tokens` and `answer`, the .npz file to write: `logits` [positions, vocabulary], or `logprobs` [positions] of the
next token where a tool gives no logits, or what its script says; and `continuation`, the greedy tokens after the last
one. All in float32.
"""
