"""Memory of a training step of one row that processes on CPUs share: what each holds at most, beyond what it held.

    for n in 1 2 4; do
        MALLOC_MMAP_THRESHOLD_=65536 OMP_NUM_THREADS=1 \\
            torchrun --nproc-per-node $n benchmarks/devices_memory.py [--length 32768] [--plan "full,window:512+4"]
    done

A small llama with 3 query heads and 1 KV head, which neither 2 nor 4 devices share evenly: full heads go by ring.
Random weights, float32, two layers, the chunked loss; forward and backward, no optimizer. Linux alone tells the peak.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from functools import partial

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from masformer import apply_plan
from masformer.benchmarks.timing import peak_memory
from masformer.cost import bytes_text
from masformer.models.across import across_devices
from masformer.parallel.forward import sequence_mesh
from masformer.training.loss import use_chunked_loss


def step(model: LlamaForCausalLM, length: int) -> None:
    """Of one row, or of this process's slice of it."""
    world, rank = dist.get_world_size(), dist.get_rank()
    tokens = torch.randint(0, 64, (1, length), generator=torch.Generator().manual_seed(0)).chunk(world, 1)[rank]
    with across_devices(model, sequence_mesh(world, "cpu")) if world > 1 else nullcontext():
        model(tokens, shift_labels=tokens, use_cache=False).loss.backward()


def main() -> None:
    """Prints a row of a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--plan", default="full,window:512+4")
    given = parser.parse_args()
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=given.length,
    )
    model = use_chunked_loss(apply_plan(LlamaForCausalLM(config), given.plan))
    step(model, given.length // 16)
    held = torch.tensor(peak_memory(partial(step, model, given.length), torch.device("cpu")) or 0)
    each = [torch.empty_like(held) for _ in range(dist.get_world_size())]
    dist.all_gather(each, held)
    if dist.get_rank() == 0:
        sizes = sorted(map(int, each))
        print(f"| {len(sizes)} | {given.plan} | {given.length:,} | {bytes_text(sizes[0])} to {bytes_text(sizes[-1])} |")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
