"""Holds an export against the model it was made of: the tool runs it in a process of its own, in float32.

Compared are the logits past the window and a greedy continuation. Where two tokens are as likely as rounding can tell,
the tool may take either: its continuation is greedy when masformer's own logits for it say so.
"""

from __future__ import annotations

import copy
import inspect
import io
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor
from transformers import PreTrainedModel

from masformer.errors import MasformerError
from masformer.export import llama_cpp
from masformer.export.choose import find_target
from masformer.export.llama_cpp.files import read_gguf
from masformer.export.llama_cpp.weights import rounded
from masformer.export.stock import SAMPLE
from masformer.export.targets import TARGETS, Target
from masformer.models.bridge import apply_plan
from masformer.models.positions import position_limit
from masformer.models.sinks import is_sink
from masformer.models.wrappers import bare_model
from masformer.plan import AttentionPlan
from masformer.spans import FullSpan

TEXT: dict[str, Any] = {"encoding": "utf-8", "errors": "replace"}
"""Of what other programs say, whatever the encoding of this one is."""
NEW_TOKENS, POSITIONS, SEED = 16, 48, 0
TOLERANCE = {"transformers": 1e-4, "mlx-lm": 1e-4, "vllm": 1e-3, "llama.cpp": 1e-3}
"""Target -> the largest difference of logits (vllm, llama.cpp: log-probabilities) that is rounding, per largest logit
above 1."""
COARSE = {GGMLQuantizationType.F16: 0.02, GGMLQuantizationType.BF16: 0.2}
"""The same for llama.cpp's files whose matrices are no float32: it rounds what they are multiplied with as well."""
MOST = 1.0
"""The same for all others."""
SEEN = 0.25
"""How far a difference that is put down to such rounding may go, as a share of what full attention would differ by."""
LLAMA_CPP_POSITIONS, BATCH = 4, 64
"""llama.cpp's server reads the prompt up to each position, this many tokens at a time."""


@dataclass(frozen=True)
class Verification:
    """What the tool computed, against masformer.

    Attributes:
        target: the tool.
        version: of it.
        tokens: length of the prompt, random tokens.
        window: the longest reach of a layer that is not full; 0 where all are.
        difference: largest difference of the logits (vllm: log-probabilities of the next token; llama.cpp: of the
            likeliest 1000).
        full_difference: the same, had the tool run full attention in every layer.
        continuation: the greedy tokens.
    """

    target: str
    version: str
    tokens: int
    window: int
    difference: float
    full_difference: float
    continuation: list[int]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def check_installed(target: str, python: str | os.PathLike[str] | None = None) -> str:
    """The version of the tool in an environment.

    Args:
        target: key of `TARGETS`.
        python: interpreter of that environment; by default the running one.

    Raises:
        MasformerError: it is not there.
    """
    tool, python = find_target(target), _interpreter(python)
    if not tool.package:
        raise MasformerError(f"there is nothing to verify an export for {target} with")
    code = (
        "import importlib.metadata as m, importlib.util as u, sys; p = sys.argv[1]; "
        "d = m.packages_distributions().get(p); print(m.version(d[0]) if d and u.find_spec(p) else '')"
    )
    try:
        done = subprocess.run([python, "-I", "-c", code, tool.package], capture_output=True, check=False, **TEXT)
    except OSError as error:
        raise MasformerError(f"cannot run {python}: {error.strerror}") from None
    if done.returncode or not done.stdout.strip():
        raise MasformerError(
            f"{target} is not installed in {python}, so the export cannot be verified; install it there, or name the "
            "Python that has it"
        )
    found: str = done.stdout.strip()
    return found


def verify_export(
    model: PreTrainedModel,
    path: str | os.PathLike[str],
    target: str,
    python: str | os.PathLike[str] | None = None,
    *,
    tokenizer: Any = None,
) -> Verification:
    """Loads an export in its tool and compares.

    Args:
        model: the model with its plan, as it was given to `export_model`.
        path: the exported folder or file.
        target: the tool, key of `TARGETS`.
        python: interpreter of the environment that has it; by default the running one.
        tokenizer: for llama.cpp, whose files have tokenizers of their own: must split a text alike.

    Raises:
        MasformerError: the tool is not installed, cannot load the export, or computes something else.
    """
    model = bare_model(model)
    version, tool = check_installed(target, python), find_target(target)
    plan = AttentionPlan.from_dict(model.config.masformer)
    window = max((span.max_visible or 0) for span in plan.kinds)
    limit = position_limit(model.config) or 10**9
    length = min(limit - NEW_TOKENS, window + min(window, 256) + 64)
    if length < 2:
        raise MasformerError(f"the model has {limit} positions, too few to verify a continuation of {NEW_TOKENS}")
    vocabulary = model.get_input_embeddings().num_embeddings
    tokens = torch.randint(min(3, vocabulary - 1), vocabulary, (length,), generator=torch.manual_seed(SEED))
    many = LLAMA_CPP_POSITIONS if target == llama_cpp.NAME else POSITIONS
    positions = torch.linspace(0, length - 2, min(many, length - 1)).long().unique()
    more: dict[str, Any] = {}
    kinds: set[GGMLQuantizationType] = set()
    if target == llama_cpp.NAME:
        content = read_gguf(path)
        kinds = {each.kind for each in content.tensors.values()} - {GGMLQuantizationType.F32}
        text = SAMPLE if hasattr(tokenizer, "encode") else None
        more = {"vocabulary": content.tensors["token_embd.weight"].shape[0], "batch": BATCH, "text": text}
    answer = _run(tool, Path(path), tokens, positions, python, more)
    continuation = torch.from_numpy(answer["continuation"]).long()
    whole = torch.cat([tokens, continuation])
    kept = torch.cat([positions, torch.arange(length - 1, len(whole) - 1)])
    exact = model
    if model.dtype != torch.float32 or kinds:
        exact = copy.deepcopy(model).float()
    if GGMLQuantizationType.Q8_0 in kinds <= {GGMLQuantizationType.Q8_0, GGMLQuantizationType.F16}:  # what was stored
        for name, parameter in exact.named_parameters():
            if not is_sink(name):
                parameter.data = rounded(parameter.data, GGMLQuantizationType.Q8_0)
    logits = _logits(exact, whole, kept)
    try:
        full = _logits(apply_plan(exact, AttentionPlan.uniform(len(plan), FullSpan())), whole, kept)
    finally:
        apply_plan(exact, plan)
    count = len(positions)
    ours, others = logits[:count], full[:count]
    theirs = torch.from_numpy(answer[next(key for key in ANSWERS if key in answer)]).float()
    if "logprobs" in answer:
        ours, others = (each.log_softmax(-1).gather(-1, tokens[positions + 1, None])[:, 0] for each in (ours, others))
    if "distributions" in answer:
        known = ~theirs.isnan()
        ours, others, theirs = logits.log_softmax(-1)[known], full.log_softmax(-1)[known], theirs[known]
    greedy = logits[count:]
    tolerance = TOLERANCE[target] * max(1.0, float(logits.abs().max()))
    if kinds:
        tolerance = max(tolerance, *(COARSE.get(kind, MOST) for kind in kinds))
        if not plan.is_full:
            tolerance = min(tolerance, SEEN * float((ours - others).abs().max()))
    found = Verification(
        target=target,
        version=version,
        tokens=length,
        window=window,
        difference=float((ours - theirs).abs().max()),
        full_difference=float((ours - others).abs().max()),
        continuation=continuation.tolist(),
    )
    if not found.difference <= tolerance:
        raise MasformerError(
            f"{target} {version} computes something else from {os.fspath(path)}: the logits differ by "
            f"{found.difference:.2g}; full attention would by {found.full_difference:.2g}, rounding by {tolerance:.2g}"
        )
    if "tokenised" in answer and answer["tokenised"].tolist() != list(tokenizer.encode(SAMPLE)):
        raise MasformerError(f"{target} {version} splits text in another way with {os.fspath(path)}")
    missed = greedy.amax(-1) - greedy.gather(-1, continuation[:, None])[:, 0]
    if len(continuation) != NEW_TOKENS or bool((missed > 2 * tolerance).any()):
        raise MasformerError(f"{target} {version} continues the text from {os.fspath(path)} in another way")
    return found


def _logits(model: PreTrainedModel, tokens: Tensor, positions: Tensor) -> Tensor:
    """[positions, vocabulary], on the CPU."""
    tokens, positions = tokens.to(model.device)[None], positions.to(model.device)
    logits: Tensor
    with torch.no_grad():
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            logits = model(tokens, logits_to_keep=positions, use_cache=False).logits[0]
        else:
            logits = model(tokens, use_cache=False).logits[0, positions]
    return logits.float().cpu()


def _interpreter(python: str | os.PathLike[str] | None) -> str:
    """Its path, not through links: an environment is known by the name of its interpreter."""
    name = os.fspath(python or sys.executable)
    return os.path.abspath(name) if os.path.dirname(name) else name


def _run(
    tool: Target,
    folder: Path,
    tokens: Tensor,
    positions: Tensor,
    python: str | os.PathLike[str] | None,
    more: dict[str, Any],
) -> dict[str, Any]:
    job = {
        "folder": str(folder.resolve()),
        "tokens": tokens.tolist(),
        "positions": positions.tolist(),
        "new_tokens": NEW_TOKENS,
        **more,
    }
    script = f"run_{tool.name.replace('-', '_').replace('.', '_')}.py"
    answer, _ = run_script(script, [job], tool.name, python)
    with np.load(io.BytesIO(answer), allow_pickle=False) as arrays:
        return dict(arrays)


def run_script(
    name: str, job: dict[str, Any] | list[dict[str, Any]], tool: str, python: str | os.PathLike[str] | None = None
) -> tuple[bytes, str]:
    """Runs a script of `runners` in a process of its own.

    Args:
        name: of the script.
        job: what it is to do, or a list of one such; `answer` is added.
        tool: for messages.
        python: interpreter of the environment that has the tool; by default the running one.

    Returns:
        The answer, and what it said on standard error.

    Raises:
        MasformerError: it failed, with the last line that it said.
    """
    script = Path(__file__).parent / "runners" / name
    with tempfile.TemporaryDirectory() as temporary:
        jobs, answer = Path(temporary) / "jobs.json", Path(temporary) / "answer.npz"
        only = job[0] if isinstance(job, list) else job
        only["answer"] = str(answer)
        jobs.write_text(json.dumps(job), encoding="utf-8")
        command = [_interpreter(python), "-I", str(script), str(jobs)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, env=environment, cwd=temporary, check=False, **TEXT)
        if done.returncode or not answer.is_file():
            last = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
            raise MasformerError(f"{tool} cannot run {only['folder']}: {last}")
        return answer.read_bytes(), done.stderr


ANSWERS = ("logits", "logprobs", "distributions")
"""What a tool gives, see the runners."""
assert set(TOLERANCE) == {name for name, target in TARGETS.items() if target.package}
