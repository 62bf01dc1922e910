import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from masformer import MasformerError
from masformer.data.packing import IGNORED, PackedRows, Schedule, collate, make_rows
from masformer.data.pairs import PairRows, cut_tokens
from masformer.data.report import report_rows, report_text
from masformer.data.store import TokenStore

lengths = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=8), min_size=1, max_size=3)


def stores_of(sources):
    """Stores whose tokens are all different, so that a lost or repeated one shows."""
    stores, first = [], 0
    for number, documents in enumerate(sources):
        offsets = np.cumsum([0, *documents])
        tokens = np.arange(first, first + offsets[-1], dtype=np.uint32)
        stores.append(TokenStore(str(number), tokens, offsets.astype(np.int64), None, 0, 0, None))
        first += int(offsets[-1])
    return stores


def documents_of(stores):
    return [store.document(index).tolist() for store in stores for index in range(len(store))]


@given(lengths, st.integers(2, 40), st.booleans())
def test_no_token_is_lost_or_repeated(sources, length, separate):
    stores = stores_of(sources)
    rows = PackedRows(stores, length, separate)
    stream = [token for document in documents_of(stores) for token in document]
    examples = [rows[index] for index in range(len(rows))]
    assert [token for example in examples for token in example["input_ids"].tolist()] == stream
    assert all(len(example["input_ids"]) == length for example in examples[:-1])
    predicted = [token for example in examples for token in example["shift_labels"].tolist() if token != IGNORED]
    firsts = {document[0] for document in documents_of(stores)} if separate else {stream[0]}
    assert predicted == [token for token in stream if token not in firsts]


@given(lengths, st.integers(2, 40))
def test_separate_documents_start_at_position_0_and_predict_only_themselves(sources, length):
    stores = stores_of(sources)
    rows = PackedRows(stores, length, separate=True)
    owner = {token: index for index, document in enumerate(documents_of(stores)) for token in document}
    for index in range(len(rows)):
        example = rows[index]
        inputs, targets, positions = (example[name].tolist() for name in ("input_ids", "shift_labels", "position_ids"))
        for place, (token, target, position) in enumerate(zip(inputs, targets, positions, strict=True)):
            before = [owner[earlier] == owner[token] for earlier in inputs[:place]]
            assert position == sum(before)
            assert target == (token + 1 if owner.get(token + 1) == owner[token] else IGNORED)


@given(st.integers(1, 20), st.integers(0, 50), st.integers(0, 3))
def test_a_schedule_takes_every_row_once_before_any_comes_again(rows, extra, seed):
    packed = PackedRows(stores_of([[rows * 4]]), 4)
    schedule = Schedule(packed, rows + extra, seed)
    order = [schedule.row(place) for place in range(len(schedule))]
    for start in range(0, len(order), rows):
        part = order[start : start + rows]
        assert len(set(part)) == len(part)
    assert order == [Schedule(packed, rows + extra, seed).row(place) for place in range(len(schedule))]
    assert [Schedule(packed, 9, seed, shuffle=False).row(place) for place in range(9)] == [
        place % rows for place in range(9)
    ]


def test_a_schedule_depends_on_its_seed_and_changes_each_time_round():
    packed = PackedRows(stores_of([[400]]), 4)
    first, second = Schedule(packed, 200, 0), Schedule(packed, 200, 1)
    order = [first.row(place) for place in range(200)]
    assert order != [second.row(place) for place in range(200)]
    assert order[:100] != order[100:]


def pair_store(pairs, end=0):
    """Pairs (before, prompt, after, target) of token counts; the target's last token is the end token."""
    tokens, offsets, parts = [], [0], []
    for before, prompt, after, target in pairs:
        count = before + prompt + after + target
        tokens += [*range(1 + 100 * len(parts), 100 * len(parts) + count), end]
        offsets.append(len(tokens))
        parts.append((before, before + prompt, before + prompt + after))
    ids = np.array(tokens, dtype=np.uint32)
    return TokenStore("pairs", ids, np.array(offsets), np.array(parts).reshape(-1, 3), 0, 0, end)


counts = st.tuples(st.integers(0, 3), st.integers(1, 30), st.integers(0, 3), st.integers(1, 12))


@given(st.lists(counts, min_size=1, max_size=8), st.integers(12, 30), st.sampled_from(["tail", "head", "middle"]))
def test_pairs_predict_their_target_alone_and_see_only_themselves(pairs, length, cut):
    store = pair_store(pairs)
    rows = PairRows([store], length, cut)
    seen = 0
    for index in range(len(rows)):
        example = rows[index]
        assert len(example["input_ids"]) <= length
        starts = [place for place, position in enumerate(example["position_ids"].tolist()) if position == 0]
        for start, stop in zip(starts, [*starts[1:], len(example["input_ids"])], strict=True):
            before, prompt, after, target = pairs[seen]
            tokens = example["input_ids"][start:stop].tolist()
            targets = example["shift_labels"][start:stop].tolist()
            whole = store.document(seen).tolist()
            wanted = min(target, length - before - after - 1)
            kept = min(prompt, length - before - after - wanted)
            assert tokens[:before] == whole[:before]
            assert (
                tokens[before : before + kept]
                == cut_tokens(np.array(whole[before : before + prompt]), kept, cut).tolist()
            )
            assert tokens[before + kept : before + kept + after] == whole[before + prompt : before + prompt + after]
            assert tokens[-1] == 0
            assert tokens[-wanted:-1] == whole[before + prompt + after :][: wanted - 1]
            assert targets == [IGNORED] * (len(tokens) - wanted - 1) + tokens[-wanted:] + [IGNORED]
            seen += 1
    assert seen == len(pairs)
    over = sum(sum(pair) for pair in pairs) - rows.tokens
    assert over == rows.cut.prompt_tokens + rows.cut.target_tokens


@pytest.mark.parametrize(("cut", "kept"), [("tail", [0, 1, 2]), ("head", [7, 8, 9]), ("middle", [0, 1, 9])])
def test_each_rule_cuts_what_its_name_says(cut, kept):
    assert cut_tokens(np.arange(10), 3, cut).tolist() == kept
    assert cut_tokens(np.arange(3), 3, cut).tolist() == [0, 1, 2]
    assert cut_tokens(np.arange(3), 0, cut).tolist() == []


def test_a_longest_target_keeps_the_end_token():
    rows = PairRows([pair_store([(1, 4, 1, 6)])], 20, "tail", max_target=3)
    assert rows[0]["input_ids"].tolist()[-3:] == [7, 8, 0]
    assert (rows.cut.targets, rows.cut.target_tokens, rows.cut.prompts) == (1, 3, 0)


def test_wrong_rows_are_named():
    texts, pairs = stores_of([[5]])[0], pair_store([(2, 3, 2, 4)])
    for stores, options, message in [
        ([texts, pairs], {}, "the sources mix plain texts and prompt/target pairs"),
        ([pairs], {"packing": "across"}, "pairs cannot be packed across documents"),
        ([texts], {"packing": "dense"}, "unknown packing 'dense'; allowed: across, separate"),
        ([texts], {"cut": "end"}, "unknown cut 'end'; allowed: tail, head, middle"),
        ([texts], {"length": 1}, "length of a row must be at least 2, got 1"),
        ([pairs], {"length": 5}, "rows of 5 tokens are too short: the template alone takes 4"),
        ([pairs], {"max_target": 20}, "max_target 20 leaves no room for a prompt in rows of 20 tokens"),
    ]:
        with pytest.raises(MasformerError, match=message):
            make_rows(stores, **({"length": 20, "packing": None, "cut": "tail"} | options))


def test_a_batch_is_filled_on_the_right_with_a_document_of_its_own():
    rows = PackedRows(stores_of([[3, 2]]), 3, separate=True)
    batch = collate([rows[0], rows[1]], pad=99)
    assert batch["input_ids"].tolist() == [[0, 1, 2], [3, 4, 99]]
    assert batch["shift_labels"].tolist() == [[1, 2, IGNORED], [4, IGNORED, IGNORED]]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 1, 0]]
    assert torch.equal(batch["labels"], batch["shift_labels"])


def test_the_report_counts_what_was_read_and_cut():
    report = report_rows(stores := stores_of([[3, 9], [4]]), make_rows(stores, 8, None, "tail"))
    assert [source["tokens"] for source in report["sources"]] == [12, 4]
    assert report["sources"][0]["histogram"] == {4: 1, 16: 1}
    assert (report["rows"], report["empty_places"], report["documents_across_rows"]) == (2, 0, 1)
    assert "1 document in several rows" in report_text(report)
    pairs = [pair_store([(1, 30, 1, 4), (0, 2, 0, 2)])]
    report = report_rows(pairs, make_rows(pairs, 16, None, "head"))
    assert "1 prompt cut (head, 20 tokens), 0 targets cut (0 tokens)" in report_text(report)
    assert json.loads(json.dumps(report))["cut"]["prompts"] == 1
