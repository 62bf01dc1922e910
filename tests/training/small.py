"""Recipes of runs that take a second: a tiny model from scratch on some of Python's own pages."""

import copy
import json
import os
import subprocess
import sys

import forked
import yaml

from masformer.training.recipe import Recipe

SETTINGS = {
    "output": "OUT",
    "model": {
        "config": {
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
        },
        "tokenizer": "bytes",
        "plan": "full@1; window:16+2",
    },
    "data": {"sources": {"python": {"builtin": "python-topics", "limit": 3}}, "length": 64},
    "training": {"steps": 6, "rows": 4, "learning_rate": 1e-2, "warmup_steps": 2, "seed": 3},
    "checkpoints": {"every": 2, "keep": 3},
    "logging": {"every": 1},
}


def settings(folder, **changes):
    """Plain settings that write below `folder`; a change's name joins parts by two underscores."""
    found = copy.deepcopy(SETTINGS)
    found["output"] = str(folder / "out")
    found["data"]["cache"] = str(folder / "cache")
    for name, value in changes.items():
        *parts, last = name.split("__")
        place = found
        for part in parts:
            place = place.setdefault(part, {})
        if value is None:
            place.pop(last, None)
        else:
            place[last] = value
    return found


def recipe(folder, **changes):
    return Recipe.from_dict(settings(folder, **changes))


def recipe_file(folder, **changes):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings(folder, **changes)))
    return path


def train_words(folder, settings, *words):
    """The command that trains with some settings in a folder; folders beside it share the cache of data."""
    folder.mkdir(exist_ok=True)
    return "train", "--config", recipe_file(folder, **settings, data__cache=str(folder.parent / "cache")), *words


def trained(folder, settings, *words, processes=1, start=None):
    """What it printed, in as many processes, forked or as `start` starts them."""
    words = train_words(folder, settings, *words)
    result = start(*words, processes=processes) if start else forked.run(forked.command, *words, count=processes)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def metrics(folder, name="loss"):
    """Step -> figure, from the lines of metrics.jsonl that are written; a run that goes on may be at the next one."""
    *lines, _ = (folder / "out" / "metrics.jsonl").read_text().split("\n")
    return {row["step"]: row[name] for row in map(json.loads, lines) if name in row}


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def torchrun(*words, processes):
    """The command in as many processes, as torchrun starts them."""
    options = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    line = list(map(str, [sys.executable, *options, "-m", "masformer", *words]))
    return subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=300)
