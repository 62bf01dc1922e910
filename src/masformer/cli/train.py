"""`masformer train`."""

from __future__ import annotations

import gc
import signal
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from masformer.cli.options import Figures, console
from masformer.cli.parser import INSTEAD, option_names
from masformer.errors import MasformerError


def train(
    *,
    config: str,
    set: list[str] | None = None,
    resume: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
) -> Figures:
    """Trains a model as a recipe says: continual training on long rows, fine-tuning on pairs, or from scratch.

    Args:
        config: recipe, a YAML file; --settings shows what it may say.
        set: a setting in place of the recipe's: NAME=VALUE; --training.steps 60 is --set training.steps=60.
        resume: go on from the newest whole checkpoint of the output folder.
        dry_run: show shapes, steps, cost and memory, and train nothing.
        quiet: say what is trained and what was written, and nothing in between.

    Example:
        masformer train --config recipes/tiny-from-scratch.yaml --training.steps 20 --output runs/tiny
    """
    from masformer.training.recipe import load_recipe

    recipe = load_recipe(config, [f"--{setting}" for setting in set or ()])
    if dry_run and (resume or quiet):
        raise MasformerError(f"{'--resume' if resume else '--quiet'} does nothing in a dry run")
    if dry_run:
        from masformer.training.dry_run import dry_run as forecast

        return {"recipe": recipe.to_dict(), "forecast": forecast(recipe, console).to_dict()}
    from masformer.training.run import train as run

    outcome = run(recipe, resume=resume, console=Console(highlight=False), quiet=quiet)
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        gc.collect()  # what is sharded holds the group, whose threads must not outlive it
        dist.destroy_process_group()
    if outcome.signal == signal.SIGINT:
        raise KeyboardInterrupt
    if outcome.signal is not None:
        raise SystemExit(128 + outcome.signal)
    evaluations = {str(step): dict(figures) for step, figures in outcome.evaluations.items()}
    return {"recipe": recipe.to_dict(), "steps": outcome.steps, "evaluations": evaluations}


def gather_settings(words: Sequence[str]) -> list[str]:
    """Of the words after `masformer train`: settings, like `--training.steps 60`, become `--set NAME=VALUE`."""
    own = {*option_names(train), "--help"}
    rest, found = list(words), []
    while rest:
        word = rest.pop(0)
        option, separator, value = word.partition("=")
        name = option.removeprefix("--")
        if name == word or option in own or not ("." in name or _is_setting(name)):
            found.append(word)
            continue
        if not separator and rest:
            value = rest.pop(0)
            separator = "="
        found += ["--set", f"{name}{separator}{value}"]
    return found


def _is_setting(name: str) -> bool:
    """Whether a recipe says it, as a whole."""
    from masformer.training.recipe import Recipe

    return name in {option.name for option in fields(Recipe)}


def gathered(words: Sequence[str]) -> list[Any]:
    """The words of any command line, with the settings of `train` gathered."""
    return ["train", *gather_settings(words[1:])] if words[:1] == ["train"] else list(words)


def show_settings() -> None:
    """Prints the settings of a recipe, with their defaults."""
    from masformer.training.recipe import recipe_settings

    for section, rows in recipe_settings().items():
        table = Table(title=section, title_justify="left", box=SIMPLE_HEAD)
        table.add_column("setting", no_wrap=True)
        for column in ("default", "what it says"):
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)


def show_schema() -> None:
    """Prints the JSON schema of a recipe."""
    from masformer.schema import schema_text
    from masformer.training.recipe import Recipe

    print(schema_text(Recipe), end="")


INSTEAD[train] = {
    "settings": (show_settings, "show every setting of a recipe with its default, and stop."),
    "schema": (show_schema, "print the JSON schema of recipes, by which editors complete and check, and stop."),
}
