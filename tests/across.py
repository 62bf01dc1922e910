"""What processes that share sequences do in tests: each case once by all of them together, once by the first alone."""

import random
import sys
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import aten_flash
from masformer import AttentionPlan, MasformerError, apply_plan, attend
from masformer.attention import ConstantSinks, Layout, flash
from masformer.cost import ModelShape, communication
from masformer.models.across import across_devices
from masformer.parallel.forward import SlicedPass, sequence_mesh
from masformer.parallel.ring import Ring
from masformer.spans import BlockSpan, FullSpan, UnitSpans, WindowSpan
from masformer.training.loss import use_chunked_loss
from tiny import ARCHITECTURES, VOCABULARY, kv_heads_of, random_plan, random_unit_plan, tiny, with_sinks

CASES = 16
SINKS = AttentionPlan((WindowSpan(5, 2, True), FullSpan(), BlockSpan(6, 1, True), WindowSpan(90, constant_sink=True)))
"""Whose constant sinks have weights, which are trained."""
ODD = [{"num_attention_heads": heads, "num_key_value_heads": heads // 3, "hidden_size": 8 * heads} for heads in (3, 9)]
"""Heads that 2 and 4 devices, or none, share evenly."""
ROTARY = {
    "phi3": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [1.0, 4.0, 16.0, 64.0],
            "original_max_position_embeddings": 11,
        },
        "original_max_position_embeddings": 11,
    },
    "llama": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 8.0},
        "max_position_embeddings": 11,
    },
}
"""Models whose rotary positions depend on the length of the text, which is beyond 11 here, and of a slice below."""


def random_span(choose):
    return choose.choice(
        [
            FullSpan(),
            WindowSpan(choose.randint(1, 30), choose.choice([0, 0, 1, 4, 14]), choose.random() < 0.3),
            BlockSpan(choose.randint(1, 12), choose.randint(0, 3), choose.random() < 0.3),
        ]
    )


def wide_span(choose):
    """A span that sees all keys of a short row."""
    wide = [FullSpan(), WindowSpan(36 + choose.randint(0, 9), 0, True), WindowSpan(30, 6), BlockSpan(12, 2)]
    return choose.choice(wide)


def random_positions(choose, rows, length, world):
    """Of packed documents of any lengths, also of a slice, [rows, length]."""
    found = []
    for _ in range(rows):
        row = []
        while len(row) < length:
            row += range(choose.choice([1, 3, 8, 20, 50, length // world]))
        found.append(row[:length])
    return torch.tensor(found)


def part(x, rank, world, dim=1):
    """The slice of a process."""
    return x.chunk(world, dim)[rank]


def attention_case(seed, mesh, random_span=random_span, dtype=torch.double):
    """The largest error of output and gradients of attention; of all slices, in the first process."""
    rank, world = mesh.get_local_rank(), mesh.size()
    choose = random.Random(f"{seed} {world}")
    torch.manual_seed(seed)
    rows, length = choose.choice([1, 1, 2, 3]), choose.randint(1, 9) * world
    kv_heads = choose.choice([1, 2, 3, 4])
    heads, wide = kv_heads * choose.choice([1, 2, 3]), choose.choice([4, 6])
    spans = [random_span(choose) for _ in range(kv_heads)]
    span = UnitSpans(tuple(spans)) if choose.random() < 0.4 and len(set(spans)) > 1 else spans[0]
    query, key, value, weight = (
        torch.randn(rows, some, length, dim, dtype=dtype)
        for some, dim in ((heads, 4), (kv_heads, 4), (kv_heads, wide), (heads, wide))
    )
    constants = [torch.randn(heads, dtype=dtype), torch.randn(kv_heads, wide, dtype=dtype)]
    positions = real = None
    if choose.random() < 0.6:
        positions = random_positions(choose, rows, length, world)
    if choose.random() < 0.3:
        real = torch.arange(length) >= torch.tensor([choose.randrange(length) for _ in range(rows)])[:, None]
        real = real if choose.random() < 0.5 else real.flip(1)
    documents = None if positions is None else (positions == 0).long().cumsum(-1)
    softcap = choose.choice([None, None, 2.0])

    def gradients(call, tensors, weight):
        inputs = [x.clone().requires_grad_() for x in tensors]
        sinks = ConstantSinks(*inputs[3:])
        found = call(*inputs[:3], span, sinks=sinks.under(span), softcap=softcap, scale=0.5)
        return [found.detach(), *torch.autograd.grad(found, inputs, weight, allow_unused=True, materialize_grads=True)]

    def sliced(query, key, value, span, **options):
        given = [None if x is None else part(x, rank, world) for x in (positions, real)]
        whole = SlicedPass(mesh, *given, rows, length // world, "cpu")
        whole.begin(documents)
        return whole.attend(query, key, value, span, **options)

    mine = [part(x, rank, world, 2) for x in (query, key, value, weight)]
    out, *grads = gradients(sliced, [*mine[:3], *constants], mine[3])
    found = [gathered(x, world, 2) for x in (out, *grads[:3])] + [summed(x) for x in grads[3:]]
    if rank:
        return 0.0

    def alone(query, key, value, span, **options):
        layout = Layout.of(real, documents)
        return attend(query, key, value, span, layout=layout, backend="reference", **options)

    expected = gradients(alone, [query, key, value, *constants], weight)
    return max(float((one - two).abs().max()) for one, two in zip(found, expected, strict=True))


@contextmanager
def flash_stand_in():
    """Within it, rings compute as on a GPU, but for soft caps."""
    library, objection, is_right = aten_flash.register(), flash._objection, flash._is_right
    flash._objection = lambda *given: "no soft caps" if given[-1] else None
    flash._is_right = lambda *given: True
    try:
        yield
    finally:
        flash._objection, flash._is_right = objection, is_right
        library._destroy()


def gathered(x, world, dim):
    each = [torch.empty_like(x.contiguous()) for _ in range(world)]
    dist.all_gather(each, x.contiguous())
    return torch.cat(each, dim)


def summed(x):
    x = x.clone()
    dist.all_reduce(x)
    return x


def model_case(kind, plan, mesh, packed=True, rows=2, trained="", checkpointing=False, padded=False, **changes):
    """The largest error of the loss and of any gradient of a model, of which the weights of these names are trained."""
    rank, world = mesh.get_local_rank(), mesh.size()
    model = tiny(kind, **changes).double()
    apply_plan(with_sinks(model) if plan is SINKS else model, plan)
    use_chunked_loss(model, 5)
    for name, weight in model.named_parameters():
        weight.requires_grad_(trained in name)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    choose = random.Random(f"{kind} {world}")
    length = world * choose.randint(6, 9)
    tokens = torch.randint(0, VOCABULARY, (rows, length))
    labels = torch.randint(0, VOCABULARY, (rows, length)).masked_fill_(torch.rand(rows, length) < 0.2, -100)
    positions = random_positions(choose, rows, length, world) if packed else torch.arange(length).expand(rows, -1)

    def gradients(**given):
        model.zero_grad()
        loss = model(**given, num_items_in_batch=7).loss
        loss.backward()
        return [loss.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in model.parameters())]

    given = {"input_ids": tokens, "shift_labels": labels, "position_ids": positions}
    if not packed:
        del given["position_ids"]
    if padded:  # on the left; in the second row more than a slice
        real = torch.arange(length) >= torch.arange(rows)[:, None] * (length // world + 1)
        given |= {"attention_mask": real.long(), "shift_labels": labels.where(real, -100)}
    with across_devices(model, mesh):
        found = list(map(summed, gradients(**{name: part(x, rank, world) for name, x in given.items()})))
    if rank:
        return 0.0
    expected = gradients(**given, use_cache=False)
    return max(float((one - two).abs().max()) for one, two in zip(found, expected, strict=True))


class Wire(TorchDispatchMode):
    """Counts the bytes that leave this process, and those that come."""

    def __init__(self, rank, world):
        super().__init__()
        self.rank, self.world = rank, world
        self.sent = self.received = self.gathered = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        name = str(function)
        if name.startswith("_c10d_functional.all_to_all_single"):
            x, received, sent, _ = args
            row = x[:1].nbytes if len(x) else found[:1].nbytes
            self.sent += row * (sum(sent) - sent[self.rank])
            self.received += row * (sum(received) - received[self.rank])
        elif name.startswith("c10d.alltoall_base_"):
            output, x, _, received, sent, *_ = args
            row = (x if len(x) else output)[:1].nbytes
            self.sent += row * (sum(sent) - sent[self.rank])
            self.received += row * (sum(received) - received[self.rank])
        elif name.startswith("c10d.allgather_"):
            self.gathered += (self.world - 1) * sum(x.nbytes for x in args[1])
        elif name.startswith(("c10d", "_c10d")) and "wait" not in name and "wrap" not in name:
            raise AssertionError(f"{name} is not counted")
        return found


def wire_case(plan, length, mesh, checkpointing, query_heads, kv_heads):
    """The bytes that a training step sends, counted, and those of the cost model; of slices of a length."""
    rank, world = mesh.get_local_rank(), mesh.size()
    heads = {"num_attention_heads": query_heads, "num_key_value_heads": kv_heads, "hidden_size": 8 * query_heads}
    model = apply_plan(use_chunked_loss(tiny("llama", **heads).double()), plan)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    rows = 2
    tokens = torch.randint(0, VOCABULARY, (rows, length))
    with across_devices(model, mesh), Wire(rank, world) as wire:
        model(tokens, shift_labels=tokens).loss.backward()
    options = {"rows": rows, "bytes_per_value": 8, "recompute": checkpointing}
    expected = communication(ModelShape.of(model.config), plan, world * length, world, **options)
    busiest = torch.tensor(max(wire.sent, wire.received))
    dist.all_reduce(busiest, op=dist.ReduceOp.MAX)
    found = [int(summed(torch.tensor(x))) for x in (wire.sent, wire.received, wire.gathered)]
    wanted = [expected.total, expected.total, expected.positions, expected.busiest]
    return [*found, int(busiest)], wanted


def refusals(mesh):
    """(What is refused, the words of the message), each tried by all processes."""
    rank, world = mesh.get_local_rank(), mesh.size()
    model = apply_plan(tiny("llama"), "window:4")
    tokens = torch.ones(1, 6, dtype=torch.long)
    holes = part(torch.arange(6 * world)[None] != 2, rank, world)
    layer = model.model.layers[1]
    handed = layer.self_attn.forward
    tries = {
        "slices of different sizes": ("pad them alike", {"input_ids": tokens[:, rank:]}),
        "holes": ("padding between the tokens", {"input_ids": tokens, "attention_mask": holes.long()}),
        "whole positions": ("position_ids must be those of the slice", {"position_ids": torch.arange(6 * world)[None]}),
        "a mask that is not handed on": ("is not handed the mask", {"input_ids": tokens}),
    }
    for name, (words, given) in tries.items():
        if name.startswith("a mask"):
            layer.self_attn.forward = lambda **options: handed(**options | {"attention_mask": None})
        try:
            with across_devices(model, mesh):
                model(**{"input_ids": tokens} | given)
        except MasformerError as error:
            yield name, words in str(error)
        else:
            yield name, False
    heads = [torch.ones(1, heads, 4, 4) for heads in (3, 1, 1)]
    for name, words, span, options in (
        ("a sink without weights", "its weights are missing", WindowSpan(99, constant_sink=True), {}),
        ("a backend without pieces", "allowed: auto, flash, tiled", FullSpan(), {"backend": "flex"}),
    ):
        whole = SlicedPass(mesh, None, None, 1, 4, "cpu")
        whole.begin(None)
        try:
            whole.attend(*heads, span, **options)
        except MasformerError as error:
            yield f"{name} in a ring", words in str(error)
        else:
            yield f"{name} in a ring", False


def turns_case(mesh):
    """How many slices of keys a device holds beside its own, above two, in a ring; and what it says without a graph."""
    rank, world = mesh.get_local_rank(), mesh.size()
    held, most, send = [], [0], dist.all_to_all_single

    def counted(output, *given, **options):
        held.append(StorageWeakRef(output.untyped_storage()))
        most[0] = max(most[0], sum(not each.expired() for each in held))
        return send(output, *given, **options)

    query, both = (torch.randn(1, heads, world * 4, 4, dtype=torch.double) for heads in (3, 1))
    whole = SlicedPass(mesh, None, None, 1, 4, "cpu")
    whole.begin(None)
    dist.all_to_all_single = counted
    try:
        with torch.inference_mode():
            found = whole.attend(*(part(x, rank, world, 2) for x in (query, both, both)), FullSpan())
    finally:
        dist.all_to_all_single = send
    assert len(held) == world - 1, "all slices passed by"
    error = float((found - part(attend(query, both, both, "full"), rank, world, 2)).abs().max())
    return max(error, most[0] - 2.0)


def dropout_case(mesh):
    """How far a loss under dropout goes another way than its gradients say; of all devices together."""
    rank, world = mesh.get_local_rank(), mesh.size()
    torch.manual_seed(0)
    tensors = [torch.randn(2, heads, world * 5, 4, dtype=torch.double) for heads in (3, 1, 1)]
    inputs = [part(x, rank, world, 2).clone().requires_grad_() for x in tensors]
    steps = [torch.randn_like(x) for x in inputs]

    def loss(size, dropout=0.5):
        torch.manual_seed(3)
        whole = SlicedPass(mesh, None, None, 2, 5, "cpu")
        whole.begin(None)
        moved = [x + size * step for x, step in zip(inputs, steps, strict=True)]
        return whole.attend(*moved, FullSpan(), dropout=dropout).square().sum()

    middle = loss(0.0)
    grads = torch.autograd.grad(middle, inputs)
    slope = sum((grad * step).sum() for grad, step in zip(grads, steps, strict=True))
    with torch.no_grad():
        found = summed((loss(1e-5) - loss(-1e-5)) / 2e-5)
        assert abs(loss(0.0, 0.0) - middle) > 1e-3, "some weights are dropped"
    return float((found - summed(slope)).abs())


def memory_case(plan, length, mesh, **heads):
    """How much more the device that keeps most for the backward pass keeps than its share of what one device keeps."""
    rank, world = mesh.get_local_rank(), mesh.size()
    changes = {"hidden_size": 16, "head_dim": 4, "num_key_value_heads": 4, "num_hidden_layers": 2} | heads
    model = apply_plan(tiny("llama", **changes), AttentionPlan.parse(plan, 2)).model

    def kept(tokens):
        saved = {}

        def pack(x):
            saved[x.untyped_storage().data_ptr()] = x
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(tokens, use_cache=False)
        weights = {x.untyped_storage().data_ptr() for x in model.parameters()}
        return sum(x.untyped_storage().nbytes() for place, x in saved.items() if place not in weights)

    tokens = torch.zeros(1, length, dtype=torch.long)
    with across_devices(model, mesh):
        most = torch.tensor(kept(part(tokens, rank, world)))
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most) * world / kept(tokens) - 1 if rank == 0 else 0.0


def main():
    """All cases; the first process says the largest error of each."""
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    mesh = sequence_mesh(world, "cpu")
    for seed in range(2):
        report("rounding of bfloat16", attention_case(seed, mesh, wide_span, torch.bfloat16))
    # Norms and rotary tables of most models are float32 in any dtype: a last bit in float64 may be one of theirs.
    torch.float32, torch.Tensor.float = torch.float64, torch.Tensor.double
    rings, attend_ring = [], Ring.attend
    Ring.attend = lambda *given: rings.append(None) or attend_ring(*given)
    for seed in range(CASES):
        report(f"attention {seed}", attention_case(seed, mesh))
    for seed in range(CASES // 2):
        report(f"attention to all keys {seed}", attention_case(seed, mesh, wide_span))
    report("rings", float(len(rings) < CASES // 4))
    with flash_stand_in():
        for seed in range(CASES, CASES + 6):
            report(f"attention by FlashAttention {seed}", attention_case(seed, mesh, wide_span))
    report("slices of keys in a ring", turns_case(mesh))
    report("rounding of slopes under dropout", dropout_case(mesh))
    for number, kind in enumerate(ARCHITECTURES if world > 2 else ARCHITECTURES[::3]):
        plan = random_unit_plan(f"{kind} {world}", kv_heads_of(kind)) if number % 2 else random_plan(f"{kind} {world}")
        report(f"{kind} {plan}", model_case(kind, plan, mesh, packed=number % 3 != 1))
    plan = random_plan(f"rotary {world}")
    for kind, changes in ROTARY.items():
        report(f"{kind} of long texts", model_case(kind, plan, mesh, packed=False, **changes))
    report("llama of sinks", model_case("llama", AttentionPlan.parse("full,window:5+3,full,window:40+2"), mesh))
    report("llama of constant sinks", model_case("llama", SINKS, mesh))
    for kind in ("llama", "gpt2"):
        report(f"{kind} of padded rows", model_case(kind, plan, mesh, packed=False, padded=True))
    report("llama of rings", model_case("llama", AttentionPlan.parse("full,window:5+3,full,window:90"), mesh, **ODD[0]))
    plan = random_unit_plan(f"odd {world}", 3)
    report(f"llama of rings {plan}", model_case("llama", plan, mesh, packed=False, checkpointing=True, **ODD[1]))
    for name in ("2.self_attn.q", "2.self_attn.v"):
        report(f"llama of which {name} is trained", model_case("llama", "full", mesh, trained=name, **ODD[1]))
    for seed, heads in enumerate([(8, 4), (3, 1), (9, 3), (8, 4)]):
        plan = random_unit_plan(f"wire {seed} {world}", heads[1])
        found, wanted = wire_case(plan, 8 + seed % 2, mesh, seed % 2 == 1, *heads)
        report(f"bytes {seed} {heads}", max(abs(one - two) for one, two in zip(found, wanted, strict=True)))
    windows = [wire_case("window:7+2", length, mesh, False, 4, 2)[0] for length in (8, 32)]
    report("bytes of windows in four times the tokens", abs(windows[0][0] - windows[1][0]) or float(not windows[0][0]))
    for name, right in refusals(mesh):
        report(f"refused: {name}", float(not right))
    if world != 3:
        report("memory of windows", memory_case("window:64+4,block:128x2", 32768, mesh))
        report("memory of full attention", memory_case("full,window:64", 2048, mesh))
        report("memory of a ring", memory_case("full,window:64", 2048, mesh, **ODD[0]))
    dist.destroy_process_group()


def report(name, error):
    if dist.get_rank() == 0:
        print(f"{error} {name}")
        sys.stdout.flush()
