"""A tokenizer as llama.cpp has it: two kinds, byte-level BPE and SentencePiece, known by what tokenizer.json says.

How a text is split before merges (the pre-tokenizer) is code in llama.cpp, with a name for each. A tokenizer whose rule
has no name here is refused: another one's would split some texts in another way, and nothing would say so.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import gguf
from gguf import GGUFWriter, TokenType
from transformers import PretrainedConfig

from masformer.errors import MasformerError

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_WORDS}\p{{N}}{{1,3}}{_REST}"
_QWEN2 = rf"{_WORDS}\p{{N}}{_REST}"
_BYTES = {"type": "ByteLevel", "add_prefix_space": False}
_SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
RULES: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_BYTES | {"use_regex": True}],
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTES | {"use_regex": True}],
    "llama-bpe": [_SPLIT | {"pattern": {"Regex": _LLAMA3}}, _BYTES | {"use_regex": False}],
    "qwen2": [_SPLIT | {"pattern": {"Regex": _QWEN2}}, _BYTES | {"use_regex": False}],
}
"""llama.cpp's name of a pre-tokenizer -> what tokenizer.json says of it."""
UNMERGED = "dbrx"
"""The name of Llama 3's where a whole word that is a token is merged like any other."""
_SPACE = "▁"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def add_tokenizer(writer: GGUFWriter, tokenizer: Any, config: PretrainedConfig) -> None:
    """Writes vocabulary, merges, special tokens and chat template.

    Raises:
        MasformerError: llama.cpp has no name for its kind, or for how it splits text before merges.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise MasformerError(f"llama.cpp is written no tokenizer of the kind {type(tokenizer).__name__}")
    data = json.loads(backend.to_str())
    model = data["model"]
    if model["type"] != "BPE":
        raise MasformerError(
            f"llama.cpp is written no {model['type']} tokenizer, only byte-level BPE and SentencePiece BPE"
        )
    if not model["merges"]:
        raise MasformerError("the tokenizer has no merges, and llama.cpp reads no BPE tokenizer without")
    pieces = bool(model.get("byte_fallback"))
    if pieces:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(_prefix(data))
        scores = _scores(model, tokenizer)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_rule(data))
    tokens, types = _vocabulary(tokenizer, config.vocab_size, pieces, model.get("unk_token"))
    writer.add_token_list(tokens)
    if pieces:
        writer.add_token_scores([scores.get(token, 0.0) for token in tokens])
    writer.add_token_types(types)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        ids = {name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        (Path(folder) / "config.json").write_text(json.dumps(ids), encoding="utf-8")
        special = gguf.SpecialVocab(folder, load_merges=not pieces, n_vocab=len(tokens))
    special.add_special_token.update(_added(tokenizer))
    special.add_to_gguf(writer, quiet=True)


def _rule(data: dict[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer splits text."""
    first, normalizer = data.get("pre_tokenizer") or {}, data.get("normalizer") or {}
    parts = first.get("pretokenizers", [first])
    for name, rule in RULES.items():
        alike = len(parts) == len(rule) and all(
            part.get(key) == value
            for part, wanted in zip(parts, rule, strict=True)
            for key, value in ({"use_regex": True} | wanted if wanted["type"] == "ByteLevel" else wanted).items()
        )
        if alike and normalizer.get("type", "NFC") == "NFC":
            return UNMERGED if name == "llama-bpe" and not data["model"].get("ignore_merges") else name
    said = json.dumps({"normalizer": data.get("normalizer"), "pre_tokenizer": data.get("pre_tokenizer")})
    raise MasformerError(
        f"llama.cpp's name for how this tokenizer splits text is not known; known: {', '.join([*RULES, UNMERGED])}; "
        f"its tokenizer.json says {said if len(said) < 400 else said[:400] + '...'}"
    )


def _prefix(data: dict[str, Any]) -> bool:
    """Whether a SentencePiece tokenizer puts a space before a text."""
    first, normalizer = data.get("pre_tokenizer") or {}, data.get("normalizer") or {}
    parts = [*normalizer.get("normalizers", [normalizer]), *first.get("pretokenizers", [first])]
    prefix, replaced = False, False
    for part in filter(None, parts):
        kind = part.get("type")
        if kind == "Prepend" and part.get("prepend") == _SPACE:
            prefix = True
        elif kind == "Replace" and (part.get("pattern"), part.get("content")) == ({"String": " "}, _SPACE):
            replaced = True
        elif kind == "Metaspace" and part.get("replacement") == _SPACE and not part.get("split", True):
            prefix, replaced = part.get("prepend_scheme", "always") != "never", True
        else:
            raise MasformerError(
                f"llama.cpp's SentencePiece has no {kind} step, which this tokenizer takes before merges"
            )
    if not replaced:
        raise MasformerError(f"llama.cpp's SentencePiece writes spaces as {_SPACE}, which this tokenizer does not")
    return prefix


def _scores(model: dict[str, Any], tokenizer: Any) -> dict[str, float]:
    """Piece -> its score: SentencePiece merges first what makes the piece with the highest.

    That is what the merges say, where they are all pairs that make a piece, one piece after the other.
    """
    merges = [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    scores: dict[str, float] = {}
    last = None
    for rank, (left, right) in enumerate(merges):
        piece = left + right
        if piece in scores and piece != last:
            raise _no_pieces()
        last = piece
        scores.setdefault(piece, -float(rank))
    known, pairs = set(model["vocab"]) - set(tokenizer.all_special_tokens), set(merges)
    for piece in known:
        if _BYTE.fullmatch(piece):
            continue
        splits = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        if any(left in known and right in known and (left, right) not in pairs for left, right in splits):
            raise _no_pieces()
    return scores


def _no_pieces() -> MasformerError:
    return MasformerError("the tokenizer's merges are not those of a SentencePiece model, which llama.cpp would run")


def _vocabulary(tokenizer: Any, size: int, pieces: bool, unknown: str | None) -> tuple[list[str], list[int]]:
    """The tokens by number, and their types; numbers that the tokenizer has no token for are named and unused."""
    by_number = {number: token for token, number in tokenizer.get_vocab().items()}
    if max(by_number) >= size:
        raise MasformerError(f"the tokenizer has {max(by_number) + 1} tokens, but the model has rows for only {size}")
    added = tokenizer.added_tokens_decoder
    tokens: list[str] = []
    types: list[int] = []
    for number in range(size):
        token = by_number.get(number, f"[PAD{number}]")
        tokens.append(token)
        if number not in by_number:
            types.append(TokenType.UNUSED)
        elif pieces and token == unknown:
            types.append(TokenType.UNKNOWN)
        elif number in added:
            types.append(TokenType.CONTROL if added[number].special else TokenType.USER_DEFINED)
        elif pieces and _BYTE.fullmatch(token):
            types.append(TokenType.BYTE)
        else:
            types.append(TokenType.NORMAL)
    return tokens, types


def _added(tokenizer: Any) -> dict[str, bool]:
    """Whether the tokenizer puts its first and its last token around a text; llama.cpp has defaults of its own."""
    around, bare = tokenizer.encode("a"), tokenizer.encode("a", add_special_tokens=False)
    first, last = tokenizer.bos_token_id, tokenizer.eos_token_id
    for bos in (False, True):
        for eos in (False, True):
            if around == [*[first] * bos, *bare, *[last] * eos]:
                return {"bos": bos, "eos": eos}
    raise MasformerError(
        "llama.cpp puts no other tokens around a text than the first and the last, and this tokenizer does"
    )
