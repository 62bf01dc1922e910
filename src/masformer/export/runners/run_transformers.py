"""Runs exports in stock transformers; see the package's docstring."""

import inspect
import json
import sys

import numpy
import torch
from transformers import AutoConfig, AutoModelForCausalLM

with open(sys.argv[1], encoding="utf-8") as file:
    jobs = json.load(file)
for job in jobs:
    capped = getattr(AutoConfig.from_pretrained(job["folder"]), "attn_logit_softcapping", None)
    options = {"attn_implementation": "eager"} if capped else {}  # sdpa of older versions drops the cap
    model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=torch.float32, **options).eval()
    tokens, positions = torch.tensor([job["tokens"]]), torch.tensor(job["positions"])
    with torch.no_grad():
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            logits = model(tokens, logits_to_keep=positions).logits[0]
        else:
            logits = model(tokens).logits[0, positions]
        model.generation_config.eos_token_id = None
        new = {"max_new_tokens": job["new_tokens"], "do_sample": False, "repetition_penalty": 1.0}
        whole = model.generate(tokens, attention_mask=torch.ones_like(tokens), **new)[0]
    numpy.savez(job["answer"], logits=logits.float().numpy(), continuation=whole[tokens.shape[1] :].numpy())
assert "masformer" not in sys.modules
