"""Parsers made of typed functions: a command's signature gives its options, its docstring their help and an example."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, get_args, get_type_hints

import jsonargparse
from docstring_parser import parse as parse_docstring

from masformer.cli.options import Figures, PlanOptions

Command = Callable[..., Any]
Commands = Mapping[str, Any]
"""Name -> command, or the commands below that name."""

SHARED = {
    "model": "hub id, folder or .gguf file.",
    "plan": "plan as text (full@0-3,17; window:512+4) or file; may be repeated. Default: the model's own spans.",
    "full": "number of full layers, in place of --plan.",
    "placement": "which layers are full: bottom, top, middle (default), spread, or a list like 0-3,17.",
    "local": "span of the other layers, for example window:512+4 or block:1024x2.",
    "max_positions": "N or N:METHOD, positions beyond the trained length.",
    "dtype": "dtype of the weights.",
    "backend": "implementation of attention.",
}
"""What options mean that several commands have."""

SPECIAL: dict[str, dict[str, Any]] = {
    "plan": {"action": "append", "type": str},
    "span": {"action": "append", "type": str},
    "stage": {"action": "extend", "nargs": "+", "type": str},
    "set": {"action": "append", "type": str, "metavar": "NAME=VALUE"},
    "where": {"action": "append", "type": str, "metavar": "FIELD=VALUE"},
    "shot_where": {"action": "append", "type": str, "metavar": "FIELD=VALUE"},
    "data": {"nargs": "+", "type": str, "metavar": "FILE"},
    "test": {"nargs": "+", "type": str, "metavar": "FILE"},
}
"""Options that are lists, and how each is written."""


INSTEAD: dict[Command, dict[str, tuple[Callable[[], None], str]]] = {}
"""Command -> options that show something in place of running it, as --help does, with their help."""


class Help(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of examples as they are."""


class Show(argparse.Action):
    """Calls `const`, a function, and stops."""

    def __init__(self, option_strings: Sequence[str], dest: str, const: Any, help: str | None = None) -> None:
        super().__init__(option_strings, dest=dest, nargs=0, const=const, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        self.const()
        parser.exit()


def example(command: Command) -> str:
    """The command line in the docstring's section `Example`."""
    meta = parse_docstring(command.__doc__ or "").meta
    return next(str(part.description) for part in meta if part.args == ["examples"])


def option_groups(command: Command) -> dict[str, type[PlanOptions]]:
    """Parameter -> its type, of the parameters that stand for several options."""
    hints = get_type_hints(command)
    return {name: hint for name, hint in hints.items() if isinstance(hint, type) and issubclass(hint, PlanOptions)}


def option_parameters(command: Command) -> dict[str, inspect.Parameter]:
    """A command's options by name, with their types; those of a group in its place."""
    groups = option_groups(command)
    found: dict[str, inspect.Parameter] = {}
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        if name in groups:
            found |= dict(inspect.signature(groups[name], eval_str=True).parameters)
        else:
            found[name] = parameter
    return found


def grouped(command: Command, options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a command from its options: those of a group become one."""
    options = dict(options)
    for name, kind in option_groups(command).items():
        options[name] = kind(**{field.name: options.pop(field.name) for field in fields(kind)})
    return options


def command_parser(command: Command) -> jsonargparse.ArgumentParser:
    """The parser of one command: parameters without default are positional, or required options where they are lists
    or keywords."""
    docs = parse_docstring(command.__doc__ or "")
    texts = SHARED | {each.arg_name: each.description for each in docs.params}
    hints = get_type_hints(command)
    shown = example(command).replace("\n", "\n      ")
    parser = jsonargparse.ArgumentParser(
        description=docs.short_description,
        epilog=f"example:\n  {shown}",
        formatter_class=Help,
        exit_on_error=False,
    )
    for name, parameter in option_parameters(command).items():
        hint = parameter.annotation
        options: dict[str, Any] = {"help": texts[name], "type": hint}
        needed = parameter.default is parameter.empty
        if not needed:
            options["default"] = parameter.default
        if hint is bool:
            options = {"help": texts[name], "action": "store_true"}
        positional = is_positional(name, parameter)
        if needed and not positional:
            options["required"] = True
        options |= SPECIAL.get(name, {})
        parser.add_argument(name if positional else option_name(name), **options)
    for name, (show, text) in INSTEAD.get(command, {}).items():
        parser.add_argument(f"--{name}", action=Show, const=show, help=text)
    if hints["return"] == Figures:
        parser.add_argument("--json", type=str | None, default=None, help="file for the raw figures")
    return parser


def is_positional(name: str, parameter: inspect.Parameter) -> bool:
    """Whether a parameter is given by its place on the command line."""
    return parameter.default is parameter.empty and name not in SPECIAL and parameter.kind is not parameter.KEYWORD_ONLY


def option_name(name: str) -> str:
    """`max_positions` -> `--max-positions`."""
    return f"--{name.replace('_', '-')}"


def add_commands(
    parser: jsonargparse.ArgumentParser, commands: Commands, passed_on: Mapping[str, Command] | None = None
) -> None:
    """Adds a tree of commands below a parser; those passed on are listed, but read their words themselves."""
    choices = parser.add_subcommands(dest="command", required=True)
    for name, command in commands.items():
        if callable(command):
            below = command_parser(command)
            choices.add_subcommand(name, below, help=below.description)
        else:
            below = jsonargparse.ArgumentParser(exit_on_error=False)
            choices.add_subcommand(name, below, help=f"one of: {', '.join(command)}")
            add_commands(below, command)
    for name, command in (passed_on or {}).items():
        about = parse_docstring(command.__doc__ or "").short_description
        choices.add_subcommand(name, jsonargparse.ArgumentParser(exit_on_error=False), help=about)


def all_commands(commands: Commands) -> Iterator[Command]:
    """Every command of a tree."""
    for command in commands.values():
        if callable(command):
            yield command
        else:
            yield from all_commands(command)


def error_line(error: Exception, commands: Commands) -> str:
    """An error's message in one line, in the words of the command line."""
    text = " ".join(str(error).split())
    if missing := re.fullmatch(r"the following arguments are required: ([\w., ]+)", text):
        return _missing(missing[1].split(", "), commands)
    if alone := re.match(r'expected "([\w.]*?)\.?command" to be one of', text):
        words = [word for word in alone[1].split(".") if word]
        return f"{' '.join(['masformer', *words])} needs a command: {', '.join(_below(words, commands))}"
    found = re.match(r'Parser key "([\w.]+)":.*?(?:Given value|Got value): ?(.*)$', text)
    if not found:
        return text
    name, value = found[1].rpartition(".")[2], found[2]
    allowed = "a whole number"
    for command in all_commands(commands):
        if parameter := option_parameters(command).get(name):
            choices = (parameter.annotation, *get_args(parameter.annotation))
            strings = [choice for choice in choices if isinstance(choice, str)]
            allowed = ", ".join(strings) or ("a number" if float in choices else allowed)
    return f"{option_name(name)} {value!r} is not allowed; allowed: {allowed}"


def _missing(keys: Sequence[str], commands: Commands) -> str:
    """Of parser keys that were not given: `search.data` is `--data` of the command `search`."""
    *words, _ = keys[0].split(".")
    parameters = option_parameters(_below(words, commands))
    names = [key.rpartition(".")[2] for key in keys]
    needed = [name.upper() if is_positional(name, parameters[name]) else option_name(name) for name in names]
    line = " ".join(["masformer", *words])
    return f"{line} needs {', '.join(needed)}; see {line} --help"


def _below(words: Sequence[str], commands: Commands) -> Any:
    """The command of that name, or the commands below it."""
    found: Any = commands
    for word in words:
        found = found[word]
    return found
