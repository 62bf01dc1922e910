"""Runs exports in llama.cpp, through the package xllamacpp; see the package's docstring.

Its server answers for the next token alone, and with the likeliest ones: `distributions` [positions and new tokens,
vocabulary] are their log-probabilities, NaN for the others. Beside the keys of every job: `batch`, the tokens that it
computes at a time, and `text`, which it splits into `tokenised`.
"""

import json
import os
import sys
import urllib.request
from typing import Any

import numpy
import xllamacpp

MOST = 1000
"""Log-probabilities of a position: its answers are text."""


def server(job: dict[str, Any], length: int) -> Any:
    """The server of one file, exact: keys and values in float32, prompts in batches."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = job["folder"]
    parameters.n_ctx = length
    parameters.n_parallel = 1
    parameters.n_batch = parameters.n_ubatch = job["batch"]
    parameters.warmup = False
    if threads := int(os.environ.get("OMP_NUM_THREADS", 0)):
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    return xllamacpp.Server(parameters)


def split(run: Any, text: str, special: bool) -> list[int]:
    """The tokens of a text; `special`: with those that the file says come around it."""
    data = json.dumps({"content": text, "add_special": special}).encode()
    request = urllib.request.Request(f"{run.listening_address}/tokenize", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        tokens: list[int] = json.load(response)["tokens"]
    return tokens


def following(run: Any, prompt: list[int], letter: int, cached: bool) -> dict[int, float]:
    """The log-probabilities of the token after a prompt.

    The token that is drawn is a letter, always, which changes nothing in them: half a character would have no answer.
    """
    asked = {"prompt": prompt, "n_predict": 1, "n_probs": MOST, "temperature": 0.0, "samplers": ["temperature"]}
    answer = run.handle_completions(asked | {"logit_bias": [[letter, 1e9]], "cache_prompt": cached})
    answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
    if "choices" not in answer:
        raise RuntimeError(f"llama.cpp answers {answer}")
    return {each["id"]: each["logprob"] for each in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}


with open(sys.argv[1], encoding="utf-8") as file:
    jobs = json.load(file)
for job in jobs:
    tokens = job["tokens"]
    run = server(job, len(tokens) + job["new_tokens"])
    letter = split(run, "a", special=False)[-1]
    found = [following(run, tokens[: position + 1], letter, cached=False) for position in job["positions"]]
    continuation: list[int] = []
    for step in range(job["new_tokens"]):
        found.append(following(run, tokens + continuation, letter, cached=step > 0))
        continuation.append(max(found[-1], key=found[-1].__getitem__))
    distributions = numpy.full((len(found), job["vocabulary"]), numpy.nan, dtype=numpy.float32)
    for row, known in enumerate(found):
        distributions[row, list(known)] = list(known.values())
    more: dict[str, Any] = (
        {} if job.get("text") is None else {"tokenised": numpy.array(split(run, job["text"], special=True))}
    )
    numpy.savez(job["answer"], distributions=distributions, continuation=numpy.array(continuation), **more)
    del run
assert "masformer" not in sys.modules
