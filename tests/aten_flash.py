"""A stand-in for the two operators of torch's FlashAttention, on the CPU: dense, in any dtype, with log-sum-exps.

It does what their kernels do on a GPU, down to what they leave to the caller: the last queries and keys of a sequence
lie together, a query without keys gets zeros and a log-sum-exp of infinity, the backward pass takes output and
log-sum-exps as they are given, and what is returned lies in memory in the order of what was given.
"""

import math

import torch

NAMES = ("_flash_attention_forward", "_flash_attention_backward")


def _sequences(cum_q, cum_k):
    ends_q, ends_k = cum_q.tolist(), cum_k.tolist()
    assert len(ends_q) == len(ends_k)
    assert ends_q[0] == ends_k[0] == 0
    pairs = zip(ends_q[:-1], ends_q[1:], ends_k[:-1], ends_k[1:], strict=True)
    return [(slice(a, b), slice(c, d)) for a, b, c, d in pairs]


def _scores(q, k, scale, causal, left, right):
    """[heads, queries, keys]; q [queries, heads, dim], k [keys, kv_heads, dim]."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    distance = torch.arange(len(k))[None] - torch.arange(len(q))[:, None] - (len(k) - len(q))
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if causal:
        hidden |= distance > 0
    if right is not None and right >= 0:
        hidden |= distance > right
    if left is not None and left >= 0:
        hidden |= distance < -left
    return scores.masked_fill(hidden, -torch.inf)


def forward(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask,
    *, scale=None, window_size_left=None, window_size_right=None, **rest
):  # fmt: skip
    assert not dropout_p
    assert not any(option is not None for option in rest.values())
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    options = scale, is_causal, window_size_left, window_size_right

    def run(q, k, v):
        assert len(q) <= max_q
        assert len(k) <= max_k
        scores = _scores(q, k, *options)
        sums = scores.logsumexp(-1) if len(k) else scores.new_full(scores.shape[:2], -torch.inf)
        weights = (scores - sums.masked_fill(sums == -torch.inf, 0)[..., None]).exp()
        out = torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(q.shape[1] // v.shape[1], 1))
        return out, sums.masked_fill(sums == -torch.inf, torch.inf)

    if cum_seq_q is None:
        found = [run(*row) for row in zip(query, key, value, strict=True)]
        out, sums = (torch.stack(each) for each in zip(*found, strict=True))
    else:
        found = [run(query[a], key[b], value[b]) for a, b in _sequences(cum_seq_q, cum_seq_k)]
        out = torch.cat([each for each, _ in found])
        sums = torch.cat([each for _, each in found], 1)
        assert len(out) == len(query)
    state = torch.zeros(2, dtype=torch.uint64)
    if out.shape == query.shape:  # the kernels take values of no other width
        out = torch.empty_like(query).copy_(out)
    return out, sums, state, torch.zeros((), dtype=torch.uint64), torch.zeros(0)


def backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
    rng_state, unused, *, scale=None, window_size_left=None, window_size_right=None
):  # fmt: skip
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    options = scale, is_causal, window_size_left, window_size_right
    assert logsumexp.is_contiguous()

    def run(g, q, k, v, o, sums):
        group = q.shape[1] // k.shape[1]
        keys, values = (x.repeat_interleave(group, 1) for x in (k, v))
        weights = (_scores(q, k, *options) - sums[..., None]).exp()
        delta = (g * o).sum(-1).T[..., None]
        slopes = weights * (torch.einsum("qhd,khd->hqk", g, values) - delta) * scale
        of_keys = torch.einsum("hqk,qhd->khd", slopes, q).unflatten(1, (-1, group)).sum(2)
        of_values = torch.einsum("hqk,qhd->khd", weights, g).unflatten(1, (-1, group)).sum(2)
        return torch.einsum("hqk,khd->qhd", slopes, keys), of_keys, of_values

    if cum_seq_q is None:
        rows = zip(grad_out, query, key, value, out, logsumexp, strict=True)
        grads = [torch.stack(each) for each in zip(*(run(*row) for row in rows), strict=True)]
    else:
        found = [
            run(grad_out[a], query[a], key[b], value[b], out[a], logsumexp[:, a])
            for a, b in _sequences(cum_seq_q, cum_seq_k)
        ]
        grads = [torch.cat(each) for each in zip(*found, strict=True)]
    return tuple(torch.empty_like(like).copy_(x) for like, x in zip((query, key, value), grads, strict=True))


def register():
    """Puts the stand-in under torch's names for tensors on the CPU, as long as what it returns is kept."""
    library = torch.library.Library("aten", "IMPL")
    for name, function in zip(NAMES, (forward, backward), strict=True):
        library.impl(name, function, "CPU")
    return library
