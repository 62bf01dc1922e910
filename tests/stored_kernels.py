"""The kernels of one query per row to what a cache stores, against float64.

As a script it runs them on the CPU, in Triton's interpreter: TRITON_INTERPRET=1 must be set from the start.
"""

import random

import torch

from masformer.attention import ConstantSinks
from masformer.attention.reference import dense_attention
from masformer.attention.stored import Slots, attend_slots

WIDTHS = [(64, 64), (80, 32), (256, 256), (8, 8)]


def check(seed, device, dtype, lengths=(3, 60, 300, 1500, 9000), widths=WIDTHS):
    """Raises where the kernels and the reference differ, for heads, spans, sinks, a softcap chosen by chance."""
    chosen = random.Random(seed)
    rows, kv_heads, group = chosen.choice([1, 2, 3]), chosen.choice([1, 2, 8]), chosen.choice([1, 3, 4])
    dim, value_dim = widths[seed % len(widths)]
    length, full = chosen.choice(lengths), chosen.random() < 0.5
    count, ring = (0, None) if full else (chosen.choice([0, 4]), chosen.choice([5, 70, 1024]))
    slots = length + 9 if full else min(length + 5, count + ring)
    newest = torch.tensor([length - 1 - chosen.randint(0, length // 2) for _ in range(rows)])
    low = torch.tensor([max(0, int(p) - chosen.randint(0, int(p) if full else ring - 1)) for p in newest])
    make = torch.Generator().manual_seed(length)
    query = torch.randn(rows, 1, kv_heads * group, dim, generator=make).transpose(1, 2).to(device, dtype)
    key = torch.randn(rows, kv_heads, slots, dim, generator=make).to(device, dtype)
    value = torch.randn(rows, kv_heads, slots, value_dim, generator=make).to(device, dtype)
    logit = torch.randn(kv_heads * group, generator=make).to(device)
    fixed = torch.randn(kv_heads, value_dim, generator=make).to(device)
    sinks = chosen.choice([None, ConstantSinks(logit, fixed), ConstantSinks(logit)])
    softcap = chosen.choice([None, 5.0])
    places, scale = Slots(newest.to(device), low.to(device), count, ring), dim**-0.5
    exact = dense_attention(
        *(x.double() for x in (query, key, value)), places.visible(slots), scale, 0.0, softcap, sinks
    )
    if query.is_cuda:
        actual = attend_slots(query, key, value, places, scale=scale, softcap=softcap, sinks=sinks)
    else:
        from masformer.attention import stored_triton  # it needs Triton

        actual = stored_triton.attend(query, key, value, places, scale, softcap, sinks and sinks.like(query, value))
    bound = 8e-3 if dtype == torch.bfloat16 else 1e-5
    apart = float((actual.double() - exact).norm() / exact.norm())
    assert apart < bound, f"{apart:.2g} apart: seed {seed}, {list(key.shape)}, group {group}, {places}"


if __name__ == "__main__":
    from triton.runtime import interpreter

    from masformer.attention import stored_triton

    patched = interpreter._patch_lang_tensor

    def with_indices(tensor, scope):
        """NumPy 2.4 makes no index of an array of one number, which Triton 3.6 asks of it."""
        patched(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = with_indices
    stored_triton._processors = lambda device: 8
    for seed in range(16):
        check(seed, "cpu", torch.float32, lengths=(3, 60, 300), widths=[(8, 8), (80, 32)])
