"""Runs exports in vLLM, which gives no logits but log-probabilities; see the package's docstring."""

import json
import os
import sys
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import numpy
from vllm import LLM, SamplingParams


def run(job: dict[str, Any]) -> None:
    """One model."""
    length = len(job["tokens"]) + job["new_tokens"]
    model = LLM(
        job["folder"],
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=length,
        generation_config="vllm",
    )
    asked = SamplingParams(
        temperature=0, max_tokens=job["new_tokens"], prompt_logprobs=0, ignore_eos=True, detokenize=False
    )
    answer = model.generate([{"prompt_token_ids": job["tokens"]}], asked)[0]
    following = [answer.prompt_logprobs[i + 1][job["tokens"][i + 1]].logprob for i in job["positions"]]
    numpy.savez(job["answer"], logprobs=numpy.array(following), continuation=numpy.array(answer.outputs[0].token_ids))


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        jobs = json.load(file)
    for job in jobs:
        run(job)
    assert "masformer" not in sys.modules
