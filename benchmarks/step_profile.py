"""Where the time of a training step goes on a GPU: wall clock, how long the host launches, how long kernels run.

    python benchmarks/step_profile.py > benchmarks/results/step-profile-smollm2-nvidia-h200.txt

SmolLM2-135M's shape with random weights under three plans: rows of 8192 tokens, 4 and then 8 of them, bfloat16
autocast, compiled layers and loss. "wall" is the time of each of 6 steps, "launch" the time until the host had launched
all of it (it waits when 1024 kernels are ahead), "busy" the sum of the times of one step's kernels, then the longest of
them: milliseconds in all, how often, which. Needs an NVIDIA GPU and a minute.
"""

from __future__ import annotations

import time

import torch
from torch.profiler import ProfilerActivity, profile

from masformer import AttentionPlan, apply_plan
from masformer.benchmarks.models import random_model, random_tokens
from masformer.models.compiling import compile_layers
from masformer.training.loss import compile_loss, use_chunked_loss

PLANS = {"full": "full", "mix": "full@4,7-8,17-18,20,23-24; window:256+4", "local": "window:256+4"}
LENGTH, ROUNDS, LONGEST = 8192, 6, 22


def main() -> None:
    """Prints it."""
    device = torch.device("cuda")
    plan = AttentionPlan.load("full", 30)
    model = random_model("benchmarks/shapes/smollm2-135m", plan, torch.float32, device).train()
    use_chunked_loss(model, LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    compile_layers(model)
    compile_loss(model)
    for rows in (4, 8):
        tokens = random_tokens(model, LENGTH, rows)

        def step(tokens: torch.Tensor = tokens) -> None:
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        for text in PLANS.values():
            apply_plan(model, text)
            step()
            step()
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in PLANS}
        for _ in range(ROUNDS):
            for name, text in PLANS.items():
                apply_plan(model, text)
                torch.cuda.synchronize()
                start = time.perf_counter()
                step()
                launched = time.perf_counter()
                torch.cuda.synchronize()
                found[name].append((time.perf_counter() - start, launched - start))
        for name, times in found.items():
            wall, launch = ([round(1e3 * each, 1) for each in column] for column in zip(*times, strict=True))
            print(rows, name, "wall", wall, "launch", launch, flush=True)
        for name, text in PLANS.items():
            apply_plan(model, text)
            step()
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA]) as seen:
                step()
                torch.cuda.synchronize()
            kernels = sorted(seen.key_averages(), key=lambda kernel: -kernel.self_device_time_total)
            busy = sum(kernel.self_device_time_total for kernel in kernels)
            print(rows, name, "busy ms", round(busy / 1e3, 1), "kernels", sum(kernel.count for kernel in kernels))
            for kernel in kernels[:LONGEST] if rows == 4 else []:
                print("   ", round(kernel.self_device_time_total / 1e3, 2), kernel.count, kernel.key[:110])


if __name__ == "__main__":
    main()
