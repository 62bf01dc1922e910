"""Hypothesis strategies of small damage: to bytes, and to plain values such as settings."""

import copy

from hypothesis import strategies as st

WORDS = ["", "x", "full", "window:5", "\0", "\ud800", "../x", "1e5", "é", "a" * 300, "nan", "{{ 1 }}"]
NUMBERS = [0, 1, -1, 2, 3, 7, 2**31, 2**53, 2**63, 10**40, 0.5, -0.5, 1e-300, 1e308, float("nan"), float("inf")]
ODD = st.sampled_from([None, True, False, *NUMBERS, *WORDS, [], {}, [[]], [1, "a"], {"a": 1}, [None], {"x": {"y": []}}])


@st.composite
def changed_bytes(draw, data, start=0, end=None):
    """Bytes of which a few from `start` to `end` are changed, gone, there twice, or added; or the end is cut off."""
    end = len(data) if end is None else end
    place = draw(st.integers(start, end - 1))
    length = draw(st.sampled_from([1, 1, 1, 2, 8, 64]))
    before, part, after = data[:place], data[place : place + length], data[place + length :]
    match draw(st.sampled_from(["bit", "byte", "other", "drop", "twice", "add", "cut", "zero"])):
        case "bit":
            return before + bytes([part[0] ^ 1 << draw(st.integers(0, 7))]) + part[1:] + after
        case "byte":
            return before + bytes([draw(st.integers(0, 255))]) + part[1:] + after
        case "other":
            return before + draw(st.binary(min_size=len(part), max_size=len(part))) + after
        case "drop":
            return before + after
        case "twice":
            return before + part + part + after
        case "add":
            return before + draw(st.binary(min_size=1, max_size=4)) + part + after
        case "cut":
            return before
        case _:
            return before + bytes(len(part)) + after


def places(value, place=()):
    """All places inside plain values that hold something."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield (*place, key)
        yield from places(part, (*place, key))


@st.composite
def changed_values(draw, value, odd=ODD):
    """Plain values of which one or two are something else, gone, called otherwise, or moved; or some were added."""
    found = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 2))):
        known = list(places(found))
        if not known:
            break
        *way, last = draw(st.sampled_from(known))
        holder = found
        for step in way:
            holder = holder[step]
        match draw(st.sampled_from(["other", "other", "near", "drop", "rename", "add", "swap"])):
            case "near" if isinstance(holder[last], (int, float)) and not isinstance(holder[last], bool):
                holder[last] = draw(
                    st.sampled_from([holder[last] + 1, holder[last] - 1, holder[last] * 2, -holder[last]])
                )
            case "near" if isinstance(holder[last], str) and holder[last]:
                spot = draw(st.integers(0, len(holder[last]) - 1))
                holder[last] = (
                    holder[last][:spot] + draw(st.sampled_from(["", "x", "0", "é"])) + holder[last][spot + 1 :]
                )
            case "drop":
                del holder[last]
            case "rename" if isinstance(holder, dict):
                holder[draw(st.sampled_from(["x", last + "s", last.upper(), "_" + last]))] = holder.pop(last)
            case "add" if isinstance(holder, dict):
                holder[draw(st.sampled_from(["x", "plan", "name", "model_type"]))] = draw(odd)
            case "swap":
                *way, other = draw(st.sampled_from(known))
                there = found
                for step in way:
                    there = there[step]
                holder[last], there[other] = copy.deepcopy(there[other]), copy.deepcopy(holder[last])
            case _:
                holder[last] = draw(odd)
    return found
