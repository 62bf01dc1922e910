"""How long a training step of one row takes that 8 to 64 GPUs share: a reckoning from counts, no measurement.

    python benchmarks/simulate_devices.py [--length 131072] [--flops 400e12] [--near 400e9] [--far 50e9] [--node 8]

Of the model and the plan of recipes/llama-3.2-1b-128k.yaml, beside full attention in every layer. The operations of the
busiest GPU are divided by --flops (of a GPU, a second), the bytes that the busiest GPU sends or receives by --near
(bytes a second of a GPU, in one direction, within a node of --node GPUs) or, where several nodes share the row, by
--far. Nothing overlaps, as it is. Not in it: the optimizer, what is sent for weights, the waits of a real run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from masformer import AttentionPlan, FullSpan
from masformer.cost import ModelShape, bytes_text, communication
from masformer.parallel.slices import traffic
from masformer.training.model import recipe_config, recipe_plan
from masformer.training.recipe import load_recipe

RECIPE = Path(__file__).parent.parent / "recipes" / "llama-3.2-1b-128k.yaml"
PASSES = 4
"""Forward passes that a step with checkpointing costs: one, one more in the backward pass, which costs two itself."""


def busiest_flops(shape: ModelShape, plan: AttentionPlan, length: int, devices: int) -> float:
    """Of one forward pass on the GPU that does most: the last one; but full heads are the same work for all."""
    each = length // devices
    pairs = 0.0
    for span, units in plan.unit_counts(shape.kv_heads).items():
        way = traffic(span, shape.query_heads, shape.kv_heads, devices, each).way
        pairs += units * (
            span.visible_pairs(length, length - each) if way == "edge" else span.visible_pairs(length) / devices
        )
    attention = 2 * (shape.head_dim + shape.value_dim) * shape.query_heads * pairs / shape.kv_heads
    return attention + 2 * shape.matmul_weights * each


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=131072)
    for name, usual in (("flops", 400e12), ("near", 400e9), ("far", 50e9)):
        parser.add_argument(f"--{name}", type=float, default=usual)
    parser.add_argument("--node", type=int, default=8)
    given = parser.parse_args()
    settings = load_recipe(RECIPE).model
    config, own = recipe_config(settings)
    shape, mixed = ModelShape.of(config), recipe_plan(settings, own)
    plans = {str(mixed): mixed, "full": AttentionPlan.uniform(len(mixed), FullSpan())}
    print("| GPUs | plan | computing | sent by the busiest | sending | step | with all-gather | with a ring |")
    print("|---:|---|---:|---:|---:|---:|---:|---:|")
    for devices in (8, 16, 32, 64):
        speed = given.near if devices <= given.node else given.far
        for name, plan in plans.items():
            sent = communication(shape, plan, given.length, devices, recompute=True)
            computing = PASSES * busiest_flops(shape, plan, sent.length, devices) / given.flops
            ways = [computing + each / speed for each in (sent.busiest, sent.gathered / devices, sent.ring / devices)]
            seconds = " | ".join(f"{each:.2f} s" for each in ways)
            size = bytes_text(sent.busiest)
            print(f"| {devices} | {name} | {computing:.2f} s | {size} | {sent.busiest / speed:.3f} s | {seconds} |")


if __name__ == "__main__":
    main()
