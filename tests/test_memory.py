"""Memory of a long prompt, in a process of its own: the peak above what the process holds beforehand."""

import subprocess
import sys
from pathlib import Path

import pytest

MEASURED = """
import re, torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

torch.set_num_threads(1)

def memory(kind):
    return 1024 * int(re.search(rf"{kind}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

def peak(call):
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = memory("VmRSS")
    call()
    return memory("VmHWM") - before
"""
LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux, to reset the peak")


def printed(script):
    """The numbers of each line that a script prints, which takes memory by `peak`."""
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}  # what is freed goes back at once
    words = [sys.executable, "-c", MEASURED + script]
    result = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    return [list(map(int, line.split())) for line in result.stdout.splitlines()]


PROMPTS = """
from masformer import AttentionPlan, WindowSpan, apply_plan
from masformer.cost import ModelShape, prefill_bytes

LENGTH, CHUNK = 32768, 1024

config = LlamaConfig(
    vocab_size=128, hidden_size=128, intermediate_size=384, num_hidden_layers=8, num_attention_heads=2,
    num_key_value_heads=2, head_dim=64, max_position_embeddings=LENGTH + 4,
)
plan = AttentionPlan.mixed(8, 2, "middle", local=WindowSpan(512, 4))
model = apply_plan(LlamaForCausalLM(config).eval(), plan)
tokens = torch.randint(0, 128, (1, LENGTH))

def generate(length):
    model.generate(tokens[:, :length], max_new_tokens=4, do_sample=False, eos_token_id=None, prefill_chunk_size=CHUNK)

generate(4096)  # one-time allocations
shape = ModelShape.of(config)
for length in (8192, LENGTH):
    predicted = prefill_bytes(shape, plan, length + 3, CHUNK, bytes_per_value=4, reserve=length + 4)
    print(length, peak(lambda: generate(length)), predicted)
"""


@LINUX
def test_the_memory_of_a_prompt_of_32768_tokens_stays_within_the_prediction():
    short, long = printed(PROMPTS)
    assert long[1] < 1.2 * long[2], long
    cache = 2 * 2 * 2 * 64 * 4 * (long[0] - short[0])  # layers, keys and values, heads, head_dim, bytes, tokens
    assert abs(long[1] - short[1] - cache) < 0.1 * cache  # nothing else grows with the prompt


PASSES = """
from masformer import AttentionPlan, FullSpan, WindowSpan, apply_plan
from masformer.placement import gradient
from masformer.placement.measure import Measurer
from masformer.placement.texts import Window

LENGTH, LAYERS = 2048, 4

config = LlamaConfig(
    vocab_size=128, hidden_size=192, intermediate_size=512, num_hidden_layers=LAYERS, num_attention_heads=3,
    num_key_value_heads=1, head_dim=64, max_position_embeddings=LENGTH + 4,
)
full = AttentionPlan.uniform(LAYERS, FullSpan())
model = apply_plan(LlamaForCausalLM(config), full)
tokens = torch.randint(0, 128, (1, LENGTH + 1))
meter = gradient.GainMeter(Measurer(model.eval()), WindowSpan(256, 4), (FullSpan(),))
window = Window(tuple(tokens[0].tolist()), LENGTH // 2)

def train():
    model.train()(tokens, labels=tokens, use_cache=False).loss.backward()

def search(again):
    model.eval()
    meter._slope(window, full, 0.5, None, 0, again)

def taken(run):
    run()  # one-time allocations
    return peak(run)

found = [taken(lambda: search(again)) for again in (False, True)] + [taken(train)]
model.gradient_checkpointing_enable()
print(*found, taken(train))
"""


@LINUX
def test_a_pass_for_gains_takes_the_memory_of_a_training_step():
    """Of its activations; gradients of weights and the optimizer's moments it has none."""
    ((kept, again, trained, trained_again),) = printed(PASSES)
    assert kept < 1.3 * trained
    assert again < 1.4 * trained_again
    assert again < 0.6 * kept
