"""How windows run through a model: precision, how many together, and what happens where memory is not enough."""

import io
import json
import random
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from small import recipe

from masformer import MasformerError, apply_plan
from masformer.cli import main
from masformer.defaults import LOSS_CHUNK
from masformer.evaluation import room as rooms
from masformer.evaluation.perplexity import compare_plans, paired_differences, perplexity
from masformer.evaluation.room import MOST_TOKENS, Room, autocast_dtype, fitting
from masformer.placement import SearchResult
from masformer.placement.measure import Measurer
from masformer.placement.texts import Window
from masformer.training.evaluation import Task, evaluate
from masformer.training.loss import use_chunked_loss
from masformer.training.run import train
from masformer.training.trainer import autocast_by_step, read_evaluations
from tiny import ARCHITECTURES, PLAN, VOCABULARY, letter_tokenizer, tiny

PREFIX = 1
FLOAT, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16


def tokens(count, seed=0):
    return torch.randint(3, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


# Of nearly equal and of very unequal lengths, some of more than one window
DOCUMENTS = [tokens(count, count) for count in (75, 31, 64, 30, 29, 1, 40, 28, 3, 27, 96)] + [[]]


def as_on_cuda(monkeypatch, free):
    """A device with so much memory, wherever the model is; its precision stays, which `bfloat16_by_default` changes."""
    monkeypatch.setattr(rooms, "free_memory", lambda device: free)


def bfloat16_by_default(monkeypatch):
    """The precision of a CUDA device on the CPU, which has autocast too."""
    monkeypatch.setattr(
        rooms, "autocast_dtype", lambda precision, device, *rest: autocast_dtype(precision, "cuda", *rest)
    )


def shapes_of(model):
    """The shapes of all inputs from now on."""
    found = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: found.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return found


def short_of_memory(model, most):
    """Passes of more than so many tokens fail from now on as they do on CUDA."""

    def check(module, args, kwargs):
        ids = args[0] if args else kwargs["input_ids"]
        if ids.numel() > most:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.base_model.register_forward_pre_hook(check, with_kwargs=True)
    return model


@pytest.mark.parametrize(
    ("precision", "device", "weights", "able", "expected"),
    [
        ("auto", "cuda", FLOAT, True, BRAIN),
        ("auto", "cuda", FLOAT, False, None),
        ("auto", "cpu", FLOAT, True, None),
        ("auto", "mps", FLOAT, True, None),
        ("auto", "cuda", BRAIN, True, None),
        ("auto", "cuda", HALF, True, None),
        ("auto", "cuda", torch.float64, True, None),
        ("float32", "cuda", FLOAT, True, None),
        ("bfloat16", "cuda", FLOAT, True, BRAIN),
        ("bfloat16", "cpu", FLOAT, True, BRAIN),
        ("bfloat16", "cuda", BRAIN, True, None),
    ],
)
def test_float32_weights_are_multiplied_in_bfloat16_on_cuda(precision, device, weights, able, expected):
    assert autocast_dtype(precision, device, weights, able) == expected


@pytest.mark.parametrize(("precision", "weights"), [("float32", BRAIN), ("float32", HALF), ("bfloat16", HALF)])
def test_a_precision_that_does_nothing_is_refused(precision, weights):
    with pytest.raises(MasformerError, match=f"precision {precision} does nothing for weights in {weights}"):
        autocast_dtype(precision, "cuda", weights)
    with pytest.raises(MasformerError, match="precision 'float8' is not allowed; allowed: auto, float32, bfloat16"):
        autocast_dtype("float8", "cuda", weights)


@given(st.lists(st.integers(1, 300), max_size=30), st.integers(1, 2000), st.booleans(), st.none() | st.integers(1, 9))
def test_every_window_is_in_one_batch_of_alike_windows(lengths, most, pads, rows):
    room = Room(most, rows=rows, pads=pads)
    batches = list(room.batches(lengths))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        mine = [lengths[index] for index in batch]
        assert mine[0] == max(mine)
        assert len(batch) == 1 or (len(batch) * mine[0] <= most if rows is None else len(batch) <= rows)
        assert min(mine) >= mine[0] * 7 / 8 if pads else set(mine) == {mine[0]}


def test_room_grows_with_memory_and_is_one_window_without_a_figure():
    model = tiny("llama")
    assert fitting(model, None) == Room(1, LOSS_CHUNK)
    small, large = fitting(model, 10**7), fitting(model, 2 * 10**7)
    assert 1 < small.tokens < large.tokens < MOST_TOKENS
    assert 1 < small.positions < large.positions
    assert fitting(model, 10**7, kept=1000).tokens < small.tokens
    assert fitting(model, 10**15).tokens == MOST_TOKENS
    wide = tiny("llama", vocab_size=50 * VOCABULARY, intermediate_size=4800)
    assert fitting(wide, 10**7).tokens < small.tokens / 10
    assert fitting(wide, 10**7).positions == pytest.approx(small.positions / 50, rel=0.01)


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("length", [32, 96])
def test_windows_together_have_the_losses_that_they_have_alone(kind, length, monkeypatch):
    model = apply_plan(tiny(kind), PLAN)
    shapes = shapes_of(model)
    alone = perplexity(model, DOCUMENTS, length, prefix=PREFIX)
    assert {rows for rows, _ in shapes} == {1}
    passes, inputs = len(shapes), sum(length for _, length in shapes)
    as_on_cuda(monkeypatch, 10**7)
    together = perplexity(model, DOCUMENTS, length, prefix=PREFIX)
    shapes = shapes[passes:]
    assert max(rows for rows, _ in shapes) >= 4
    assert inputs < sum(rows * length for rows, length in shapes) < inputs * 8 / 7
    assert together.by_document.tokens == alone.by_document.tokens
    for one, other in ((alone.by_document, together.by_document), (alone.buckets[0], together.buckets[0])):
        count = torch.tensor(one.tokens)
        mine, theirs = (torch.tensor(each.nll, dtype=torch.float64) for each in (one, other))
        assert float((mine / count - theirs / count).abs().max()) < 1e-6
    assert together.second_half.tokens == alone.second_half.tokens
    assert together.second_half.nll == pytest.approx(alone.second_half.nll, abs=1e-6)


@pytest.mark.parametrize("method", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_length_are_never_padded(method, monkeypatch):
    rope = {"rope_type": method, "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
    if method == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    model = apply_plan(tiny("llama", rope_parameters=rope, max_position_embeddings=64), PLAN)
    as_on_cuda(monkeypatch, 10**7)
    shapes = shapes_of(model)
    documents = [tokens(count) for count in (17, 16, 15, 15)]
    perplexity(model, documents, 40, prefix=PREFIX)
    assert sorted(shapes) == [(1, 16), (1, 17), (2, 15)]


def test_nor_are_those_of_a_model_without_a_plan(monkeypatch):
    """Nothing says that its attention is causal."""
    as_on_cuda(monkeypatch, 10**7)
    model = tiny("llama")
    shapes = shapes_of(model)
    perplexity(model, [tokens(30), tokens(29), tokens(30)], 40, prefix=PREFIX)
    assert sorted(shapes) == [(1, 29), (2, 30)]


@pytest.mark.parametrize("batch_size", [None, 11])
def test_where_memory_is_not_enough_half_of_the_windows_run(batch_size, monkeypatch):
    model = apply_plan(tiny("llama"), PLAN)
    expected = perplexity(model, DOCUMENTS, 16, prefix=PREFIX)
    as_on_cuda(monkeypatch, 10**7)
    shapes, done = shapes_of(model), []
    short_of_memory(model, 4 * 16)
    found = perplexity(model, DOCUMENTS, 16, prefix=PREFIX, batch_size=batch_size, progress=done.append)
    assert found.nll == pytest.approx(expected.nll, abs=1e-6)
    assert found.by_document.tokens == expected.by_document.tokens
    assert sum(done) == expected.tokens
    failed = [rows for rows, length in shapes if rows * length > 64]
    assert 1 <= len(failed) <= 4, "what did not fit once is not tried again"


def test_a_window_that_does_not_fit_alone_is_named(monkeypatch):
    model = short_of_memory(apply_plan(tiny("llama"), PLAN), 15)
    as_on_cuda(monkeypatch, 10**7)
    with pytest.raises(MasformerError, match="a window of 16 tokens does not fit into the device's memory"):
        perplexity(model, DOCUMENTS, 16, prefix=PREFIX)
    with pytest.raises(MasformerError, match="a window of 20 tokens does not fit into the device's memory"):
        Measurer(model).scores([PLAN], [Window(tuple(tokens(21)), 5)])


def test_logits_have_less_room_too_where_memory_was_not_enough():
    room, tried = Room(64, positions=4 * LOSS_CHUNK), []

    def work(items):
        tried.append((len(items), room.positions))
        if room.positions > LOSS_CHUNK or len(items) > 2:
            raise torch.OutOfMemoryError
        return sum(items)

    assert [found for _, found in room.run(range(8), 8, work)] == [1, 5, 9, 13]
    assert tried[:3] == [(8, 2048), (4, 1024), (2, 512)]
    assert len(tried) == 6


@pytest.mark.parametrize("kl", [False, True])
def test_a_search_measures_the_same_in_any_room(kl, monkeypatch):
    windows = [Window(tuple(tokens(25, seed)), 12) for seed in range(7)] + [Window(tuple(tokens(20, 9)), 4)]
    plans = [PLAN, type(PLAN)(PLAN.spans[::-1])]
    expected = Measurer(tiny("llama"), kl=kl).scores(plans, windows)
    as_on_cuda(monkeypatch, 10**7)
    model = tiny("llama")
    shapes = shapes_of(model)
    roomy = Measurer(model, kl=kl)
    for found in (
        roomy.scores(plans, windows),
        Measurer(short_of_memory(tiny("llama"), 3 * 24), kl=kl).scores(plans, windows),
    ):
        for row, other in zip(found, expected, strict=True):
            for one, same in zip(row, other, strict=True):
                assert one.nll == pytest.approx(same.nll, abs=1e-6)
                assert one.right == same.right
                assert one.kl == (None if same.kl is None else pytest.approx(same.kl, abs=1e-6))
    assert (7, 24) in shapes
    assert roomy.measured == 16


def test_measurements_that_were_made_before_memory_was_not_enough_count_once(monkeypatch, tmp_path):
    """The second plan does not fit; the first one of the same windows is not measured again."""
    as_on_cuda(monkeypatch, 10**7)
    model = tiny("llama")
    passes = []

    def fail_once(module, args, kwargs):
        passes.append(kwargs["input_ids"].shape[0])
        if len(passes) == 3:  # one for the first plan, and one that checks the last layer
            raise torch.OutOfMemoryError

    model.base_model.register_forward_pre_hook(fail_once, with_kwargs=True)
    windows = [Window(tuple(tokens(25, seed)), 12) for seed in range(4)]
    advanced = []
    measurer = Measurer(model, journal=tmp_path / "journal", advance=advanced.append)
    scores = measurer.scores([PLAN, type(PLAN)(PLAN.spans[::-1])], windows)
    assert all(len(row) == 4 for row in scores)
    assert measurer.measured == sum(advanced) == 8
    lines = [json.loads(line) for line in (tmp_path / "journal").read_text().splitlines()]
    assert len({(line["window"], line["plan"]) for line in lines}) == len(lines) == 8
    assert passes == [4, 4, 4, 2, 2]


def test_a_journal_keeps_scores_of_each_precision_apart(tmp_path):
    windows = [Window(tuple(tokens(25)), 12)]
    exact = Measurer(tiny("llama"), journal=tmp_path / "journal")
    coarse = Measurer(tiny("llama"), journal=tmp_path / "journal", precision="bfloat16")
    ((one,),), ((other,),) = exact.scores([PLAN], windows), coarse.scores([PLAN], windows)
    assert (exact.measured, coarse.measured) == (1, 1)
    assert one.nll != other.nll
    assert one.nll == pytest.approx(other.nll, abs=0.02)
    for precision, score in (("auto", one), ("float32", one), ("bfloat16", other)):
        again = Measurer(tiny("llama"), journal=tmp_path / "journal", precision=precision)
        assert again.scores([PLAN], windows) == [[score]]
        assert again.measured == 0


def test_results_say_their_precision_and_are_not_compared_across():
    model, documents = tiny("llama"), DOCUMENTS[:3]
    exact = compare_plans(model, documents, {"a": PLAN}, [32], prefix=PREFIX)
    coarse = compare_plans(model, documents, {"b": PLAN}, [32], prefix=PREFIX, precision="bfloat16")
    assert (exact[0].autocast, coarse[0].autocast) == (None, "bfloat16")
    assert coarse[0].to_dict()["autocast"] == "bfloat16"
    assert exact[0].nll != coarse[0].nll
    assert exact[0].nll == pytest.approx(coarse[0].nll, abs=0.01)
    with pytest.raises(MasformerError, match="b was measured in bfloat16 and a in the precision of the weights"):
        paired_differences(exact + coarse)


def test_a_model_can_be_trained_after_it_was_measured_in_bfloat16():
    model = apply_plan(tiny("llama"), PLAN)
    perplexity(model, DOCUMENTS[:2], 32, prefix=PREFIX, precision="bfloat16")
    Measurer(model, precision="bfloat16").scores([PLAN], [Window(tuple(tokens(25)), 12)])
    batch = torch.tensor([tokens(32)])
    model.train()(input_ids=batch, labels=batch).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.dtype == FLOAT for parameter in model.parameters())


def training_tasks(packed):
    """Windows of several lengths; where packed, of documents that see only themselves."""
    choose = random.Random(0)
    rows = [tokens(count, count) for count in (40, 39, 36, 40, 20, 7, 19)]
    windows = [(row[:-1], [-100] * 3 + row[4:]) for row in rows]
    if not packed:
        return [Task("text", 40, windows)]
    starts = [choose.randint(2, 5) for _ in windows]
    return [
        Task("pairs", 40, windows, [[*range(n), *range(len(w[0]) - n)] for n, w in zip(starts, windows, strict=True)])
    ]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_evaluation_while_training_runs_windows_together_and_gives_the_same(kind, packed, monkeypatch):
    def figures(most=10**9):
        model = use_chunked_loss(apply_plan(tiny(kind), PLAN))
        passes, done = [], []
        model.base_model.register_forward_pre_hook(lambda module, args: passes.append(args[0].shape[0]))
        short_of_memory(model, most)
        found = evaluate(
            model,
            training_tasks(packed),
            torch.device("cpu"),
            lambda: False,
            lambda *each: done.append(each),
        )
        assert done[-1] == (7, 7)
        return found, passes

    alone, one = figures()
    assert one == [1] * 7
    as_on_cuda(monkeypatch, 10**7)
    together, many = figures()
    assert max(many) == 4
    halved, _ = figures(2 * 40)
    assert alone == pytest.approx(together, abs=1e-6, rel=1e-6)
    assert alone == pytest.approx(halved, abs=1e-6, rel=1e-6)


def test_all_logits_at_once_are_never_those_of_several_windows(monkeypatch):
    """Where a head cannot be run in chunks, windows run one by one whatever the memory."""
    model = apply_plan(tiny("llama"), PLAN)
    model.config.output_router_logits = True
    with pytest.warns(UserWarning, match="needs the logits of all positions at once"):
        use_chunked_loss(model)
    as_on_cuda(monkeypatch, 10**7)
    model.config.output_router_logits = False
    shapes = shapes_of(model)
    evaluate(model, training_tasks(False), torch.device("cpu"), lambda: False, lambda *done: None)
    assert {rows for rows, _ in shapes} == {1}


def test_an_evaluation_while_training_may_be_in_bfloat16():
    model = use_chunked_loss(apply_plan(tiny("llama"), PLAN))
    exact, coarse = (
        evaluate(model, training_tasks(False), torch.device("cpu"), lambda: False, lambda *done: None, precision)
        for precision in (None, "bfloat16")
    )
    assert exact != coarse
    assert exact == pytest.approx(coarse, rel=0.01)


@pytest.mark.parametrize(("dtype", "expected"), [("auto", "bfloat16"), ("float32", None), ("bfloat16", None)])
def test_commands_say_their_precision_and_keep_what_was_asked_for(dtype, expected, monkeypatch, tmp_path):
    bfloat16_by_default(monkeypatch)
    folder, record = str(tmp_path / "model"), tmp_path / "record.json"
    tiny("llama", vocab_size=256).save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    text = tmp_path / "text.txt"
    text.write_text("".join(random.Random(0).choices("abcdefgh ", k=400)))
    common = ["--data", str(text), "--dtype", dtype, "--json", str(record)]
    for words in (
        ["eval", "perplexity", folder, "--lengths", "16", "--plan", "full"],
        ["search", folder, "--budget", "1", "--local", "window:4", "--length", "16", "--out", str(tmp_path / "a.yaml"),
         "--criteria", "tail",
         "--windows", "1", "--held-out-windows", "1", "--random-placements", "1"],
    ):  # fmt: skip
        assert main([*words, *common]) == 0
        figures = json.loads(record.read_text())
        assert figures["autocast"] == expected
        assert figures["dtype"] == ("torch.bfloat16" if dtype == "bfloat16" else "torch.float32")
    assert SearchResult.from_dict(figures).autocast == expected
    del figures["autocast"]
    assert SearchResult.from_dict(figures).autocast is None, "records from before there was one"


def test_training_says_in_what_precision_it_was_evaluated(monkeypatch, tmp_path):
    held = {"evaluation__sources": {"held": {"builtin": "python-topics", "limit": 1}}, "evaluation__max_tokens": 100}
    exact, coarse = tmp_path / "exact", tmp_path / "coarse"
    train(recipe(exact, **held), console=Console(quiet=True))
    bfloat16_by_default(monkeypatch)
    train(recipe(coarse, **held), console=Console(quiet=True))
    train(recipe(coarse / "asked", **held, evaluation__precision="float32"), console=Console(quiet=True))
    cards = [(folder / "out/model/README.md").read_text() for folder in (exact, coarse, coarse / "asked")]
    assert ["| precision of evaluations | bfloat16 |" in card for card in cards] == [False, True, False]
    steps = [autocast_by_step(folder / "out/metrics.jsonl") for folder in (exact, coarse, coarse / "asked")]
    assert [set(found.values()) for found in steps] == [{None}, {"bfloat16"}, {None}]
    assert (
        read_evaluations(coarse / "out/metrics.jsonl")[0].keys()
        == read_evaluations(exact / "out/metrics.jsonl")[0].keys()
    )


def test_a_resumed_run_says_that_its_precision_changed(monkeypatch, tmp_path):
    settings = {
        "evaluation__sources": {"held": {"builtin": "python-topics", "limit": 1}},
        "evaluation__max_tokens": 100,
        "checkpoints__every": 2,
    }
    train(recipe(tmp_path, **settings), console=Console(quiet=True))
    shutil.rmtree(tmp_path / "out/model")
    shutil.rmtree(max((tmp_path / "out/checkpoints").iterdir()))  # as if it had stopped before its last steps
    bfloat16_by_default(monkeypatch)
    console = Console(record=True, width=200, file=io.StringIO())
    train(recipe(tmp_path, **settings), resume=True, console=console)
    assert "were in the precision of the weights, from now on they are in bfloat16" in console.export_text()
    assert set(autocast_by_step(tmp_path / "out/metrics.jsonl").values()) == {None, "bfloat16"}
