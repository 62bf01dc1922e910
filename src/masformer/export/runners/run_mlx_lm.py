"""Runs exports in mlx-lm; see the package's docstring."""

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

with open(sys.argv[1], encoding="utf-8") as file:
    jobs = json.load(file)
for job in jobs:
    model = load_model(Path(job["folder"]))[0]
    model.set_dtype(mx.float32)
    tokens = mx.array(job["tokens"])
    logits = model(tokens[None])[0][mx.array(job["positions"])]
    steps = generate_step(tokens, model, max_tokens=job["new_tokens"])
    continuation = [int(token) for token, _ in steps]
    numpy.savez(job["answer"], logits=numpy.array(logits.astype(mx.float32)), continuation=numpy.array(continuation))
assert "masformer" not in sys.modules
