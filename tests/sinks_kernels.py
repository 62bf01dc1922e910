"""The kernels of sinks against the lines of torch that do the same, in float32.

As a script it runs them on the CPU, in Triton's interpreter: TRITON_INTERPRET=1 must be set from the start.
"""

from dataclasses import replace

import torch

from masformer import WindowSpan
from masformer.attention import parts, sinks, sinks_triton
from masformer.attention.call import Call
from masformer.attention.layout import Layout


def packed(*rows):
    """Documents of these lengths in each row."""
    return Layout.of(None, torch.tensor([[number for number, n in enumerate(row) for _ in range(n)] for row in rows]))


def padded_left(length, *counts):
    return Layout.of((torch.arange(length) >= torch.tensor(counts)[:, None]).long(), None)


# window and sinks, rows, key heads, group, width, queries, keys, layout
CASES = {
    "rows alike": (WindowSpan(33, 4), 2, 3, 3, 64, 217, 217, None),
    "packed, documents as short as the sinks and as long as the window": (
        *(WindowSpan(16, 17), 2, 2, 4, 64, 230, 230),
        packed([5, 17, 16, 33, 18, 141], [100, 20, 40, 70]),
    ),
    "padded left": (WindowSpan(20, 4), 2, 1, 3, 80, 150, 150, padded_left(150, 61, 0)),
    "queries after a past": (WindowSpan(30, 4), 2, 2, 4, 80, 70, 171, None),
    "padded, after a past": (WindowSpan(30, 1), 2, 2, 1, 64, 70, 171, padded_left(171, 120, 9)),
    "wide heads, each with its keys": (WindowSpan(8, 1), 1, 2, 1, 128, 100, 100, None),
    "a long row": (WindowSpan(8, 1), 1, 1, 4, 128, 700, 700, None),
    "wide heads, many sinks": (WindowSpan(40, 17), 1, 1, 3, 128, 90, 90, None),
}


def check(name, device):
    """Raises where kernels and torch differ. What the kernels have no business with must stay as it is."""
    span, batch, kv_heads, group, dim, query_len, key_len, layout = CASES[name]
    make = torch.Generator().manual_seed(0)
    of_queries, of_keys = (batch, query_len, group * kv_heads, dim), (batch, key_len, kv_heads, dim)
    q, out, grad, q_grad = torch.randn(4, *of_queries, generator=make)
    k, v, k_grad, v_grad = torch.randn(4, *of_keys, generator=make)
    call = Call(*(x.transpose(1, 2) for x in (q, k, v)), span, 0.2, layout)
    table = parts.parts_of(call).sinks
    shape = (batch, group * kv_heads, query_len) if layout is None else (1, group * kv_heads, batch * query_len)
    sums = torch.randn(shape, generator=make)
    here = [x.clone().to(device) for x in (q, k, v, out, sums, grad, q_grad, k_grad, v_grad)]
    there = replace(table, chunks=table.chunks.to(device), ends=table.ends.to(device))
    sinks.join(table, q, k, v, out, sums, 0.2)
    sinks_triton.join(there, *here[:5], 0.2)
    for mine, expected in zip(here[3:5], (out, sums), strict=True):
        torch.testing.assert_close(mine.cpu(), expected, atol=1e-4, rtol=0)
    sinks.add_gradients(table, grad, q, k, v, out, sums, 0.2, q_grad, k_grad, v_grad)
    sinks_triton.add_gradients(there, here[5], *here[:5], 0.2, *here[6:])
    for mine, expected in zip(here[6:], (q_grad, k_grad, v_grad), strict=True):
        torch.testing.assert_close(mine.cpu(), expected, atol=1e-3, rtol=1e-4)


if __name__ == "__main__":
    for case in CASES:
        check(case, "cpu")
        print(case, flush=True)
