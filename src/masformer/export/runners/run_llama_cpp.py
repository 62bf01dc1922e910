"""Runs exports in llama.cpp, through the package xllamacpp; see the package's docstring.

Its server answers for the next token alone, and with the likeliest ones: `distributions` [positions and new tokens,
vocabulary] are their log-probabilities, NaN for the others. Beside the keys of every job: `batch`, the tokens that it
computes at a time, and `text`, which it splits into `tokenised`.
"""

import json
import sys
import urllib.request
from typing import Any

import numpy
import xllamacpp

MOST = 1000
"""Log-probabilities of a position: its answers are text."""


def server(job: dict[str, Any], length: int) -> Any:
    """The server of one file, exact: keys and values in float32, each call from the first token on."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = job["folder"]
    parameters.n_ctx = length
    parameters.n_parallel = 1
    parameters.n_batch = parameters.n_ubatch = job["batch"]
    parameters.warmup = False
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    return xllamacpp.Server(parameters)


def ask(run: Any, prompt: list[int], new: int) -> tuple[list[int], list[dict[int, float]]]:
    """The greedy tokens after a prompt, and the log-probabilities of each step."""
    asked = {
        "prompt": prompt,
        "n_predict": new,
        "n_probs": MOST,
        "temperature": 0.0,
        "samplers": ["temperature"],
        "cache_prompt": False,
        "ignore_eos": True,
    }
    answer = run.handle_completions(asked)
    answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
    if "choices" not in answer:
        raise RuntimeError(f"llama.cpp answers {answer}")
    steps = answer["choices"][0]["logprobs"]["content"]
    return [step["id"] for step in steps], [{each["id"]: each["logprob"] for each in step["top_logprobs"]} for step in steps]


def tokenised(run: Any, text: str) -> list[int]:
    """The tokens of a text, with those that the file says come around it."""
    data = json.dumps({"content": text, "add_special": True}).encode()
    request = urllib.request.Request(f"{run.listening_address}/tokenize", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        tokens: list[int] = json.load(response)["tokens"]
    return tokens


with open(sys.argv[1], encoding="utf-8") as file:
    jobs = json.load(file)
for job in jobs:
    tokens = job["tokens"]
    run = server(job, len(tokens) + job["new_tokens"])
    found = [ask(run, tokens[: position + 1], 1)[1][0] for position in job["positions"]]
    continuation, steps = ask(run, tokens, job["new_tokens"])
    width = job["vocabulary"]
    distributions = numpy.full((len(found) + len(steps), width), numpy.nan, dtype=numpy.float32)
    for row, step in enumerate([*found, *steps]):
        distributions[row, list(step)] = list(step.values())
    more = {} if job.get("text") is None else {"tokenised": numpy.array(tokenised(run, job["text"]))}
    numpy.savez(job["answer"], distributions=distributions, continuation=numpy.array(continuation), **more)
    del run
assert "masformer" not in sys.modules
