"""Parsers made of typed functions: a command's signature gives its options, its docstring their help and an example."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from textwrap import fill
from typing import Any, get_args, get_type_hints

import jsonargparse
from docstring_parser import parse as parse_docstring

from masformer.cli.options import Figures, Options
from masformer.errors import shown
from masformer.extras import need
from masformer.files import meant

Command = Callable[..., Any]
Commands = Mapping[str, Any]
"""Name -> command, or the commands below that name."""

SHARED = {
    "model": "hub id, folder or .gguf file.",
    "plan": "plan as text (full@0-3,17,window:512+4, or with a ; in quotes) or file. Default: the model's own spans.",
    "full": "number of full layers, in place of --plan.",
    "placement": "which layers are full: bottom, top, middle, spread, or a list like 0-3,17. Default: middle.",
    "local": "span of the other layers, for example window:512+4 or block:1024x2.",
    "max_positions": "N or N:METHOD, positions beyond the trained length.",
    "dtype": "dtype of the weights.",
    "device": "cpu, cuda, cuda:1, ... or mps. Default: cuda where there is one, else cpu.",
    "backend": "implementation of attention.",
    "quiet": "print no progress.",
    "json": "file for the raw figures.",
}
"""What options mean that several commands have."""

SPECIAL: dict[str, dict[str, Any]] = {
    "span": {"action": "append", "type": str},
    "stage": {"action": "extend", "nargs": "+", "type": str},
    "set": {"action": "append", "type": str, "metavar": "NAME=VALUE"},
    "where": {"action": "append", "type": str, "metavar": "FIELD=VALUE"},
    "shot_where": {"action": "append", "type": str, "metavar": "FIELD=VALUE"},
    "data": {"nargs": "+", "type": str, "metavar": "FILE"},
    "test": {"nargs": "+", "type": str, "metavar": "FILE"},
    "pairs": {"nargs": "+", "type": str, "metavar": "FILE"},
    "for_": {"metavar": "TOOL"},
}
"""Options that are lists, and how each is written."""

GROUPS = {
    "plan": ("plan", "full", "placement", "local", "max_positions"),
    "data": ("data", "field", "documents", "where", "document_field", "target_field", "query_field", "max_tokens"),
    "running": ("dtype", "device", "backend", "batch", "batch_size", "compile", "random_weights", "seed"),
    "output": ("out", "plot", "json", "overwrite", "quiet"),
}
"""Headings of a command's help, and the options below each; the others come first."""

ABOUT = {
    "eval": "How well a model does under plans: perplexity, summarization, retrieval.",
    "bench": "Times in one run: attention, prefill, decode, train, eval.",
}
"""What the commands below a name have in common."""

SHELLS = ("bash", "zsh", "fish")
"""That commands can be completed in."""

NOWHERE = {
    "--sequence-devices": "devices share a sequence in training alone (training.sequence_devices; masformer plan "
    "--devices counts what they send): a cache across them would need another layout, and local layers keep only their "
    "window anyway"
}
"""Options that no command has -> why."""

WIDTH = 80
"""Columns that the help fits into."""

INSTEAD: dict[Command, dict[str, tuple[Callable[[], None], str]]] = {}
"""Command -> options that show something in place of running it, as --help does, with their help."""


class Help(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of examples as they are; says a default where it is one, and no types."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        says = "default" in text.lower() or not action.option_strings
        if says or any(action.default is nothing for nothing in (None, False, argparse.SUPPRESS)):
            return text
        return f"{text.rstrip('.')} (default: %(default)s)."


class Once(argparse.Action):
    """An option whose second value would take the place of the first."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        if getattr(namespace, self.dest, None) is not None:
            raise jsonargparse.ArgumentError(None, f"{option} is given twice; {parser.prog.split()[-1]} takes one")
        setattr(namespace, self.dest, values)


class Show(argparse.Action):
    """Calls `const`, a function, and stops."""

    def __init__(self, option_strings: Sequence[str], dest: str, const: Any, help: str | None = None) -> None:
        super().__init__(option_strings, dest=dest, nargs=0, const=const, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        self.const()
        parser.exit()


class Complete(argparse.Action):
    """Prints the script that completes the commands of the parser that `const` makes in a shell, and stops."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        need("completion", str(option))
        print(self.const().get_completion_script(f"shtab-{values}"))
        parser.exit()


def example(command: Command) -> str:
    """The command line in the docstring's section `Example`, in lines that narrow terminals hold."""
    meta = parse_docstring(command.__doc__ or "").meta
    text = next(str(part.description) for part in meta if part.args == ["examples"])
    lines = [""]
    for part in re.split(r" (?=--)", " ".join(text.replace("\\\n", " ").split())):
        if lines[-1] and len(lines[-1]) + len(part) > WIDTH - 8:
            lines.append("")
        lines[-1] = f"{lines[-1]} {part}".lstrip()
    return " \\\n".join(lines)


def summary(command: Command) -> str:
    """The first sentence of a command's help."""
    return " ".join((command.__doc__ or "").partition("\n\n")[0].split())


def option_groups(command: Command) -> dict[str, type[Options]]:
    """Parameter -> its type, of the parameters that stand for several options."""
    hints = get_type_hints(command)
    return {name: hint for name, hint in hints.items() if isinstance(hint, type) and issubclass(hint, Options)}


def option_parameters(command: Command) -> dict[str, inspect.Parameter]:
    """A command's options by name, with their types; those of a group in its place."""
    groups = option_groups(command)
    found: dict[str, inspect.Parameter] = {}
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        if name in groups:
            found |= dict(inspect.signature(groups[name], eval_str=True).parameters)
        else:
            found[name] = parameter
    if get_type_hints(command)["return"] == Figures:
        found["json"] = inspect.Parameter("json", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=str | None)
    return found


def grouped(command: Command, options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a command from its options: those of a group become one."""
    options = dict(options)
    for name, kind in option_groups(command).items():
        options[name] = kind(**{field.name: options.pop(field.name) for field in fields(kind)})
    return options


def usage(words: str, command: Command) -> str:
    """The line above a command's help: what it needs; the rest stands below."""
    needed = [
        each.upper()
        if is_positional(each, parameter)
        else f"{option_name(each)} {SPECIAL.get(each, {}).get('metavar', each.upper())}"
        for each, parameter in option_parameters(command).items()
        if parameter.default is parameter.empty
    ]
    line = fill(" ".join(["masformer", words, *needed, "[options]"]), WIDTH - 8, break_on_hyphens=False)
    return line.replace("\n", "\n           ")


def command_parser(words: str, command: Command) -> jsonargparse.ArgumentParser:
    """The parser of one command, by its words: parameters without default are positional, or required options where
    they are lists or keywords."""
    docs = parse_docstring(command.__doc__ or "")
    texts = SHARED | {each.arg_name: each.description for each in docs.params}
    shown_example = example(command).replace("\n", "\n      ")
    parser = jsonargparse.ArgumentParser(
        usage=usage(words, command),
        description=fill(summary(command), WIDTH - 2, break_on_hyphens=False),
        epilog=f"example:\n  {shown_example}",
        formatter_class=Help,
        exit_on_error=False,
    )
    places: dict[str, Any] = {}
    found = option_parameters(command)
    order = [each for names in GROUPS.values() for each in names]
    for name in sorted(found, key=lambda each: order.index(each) if each in order else -1):
        parameter = found[name]
        hint = parameter.annotation
        heading = next((heading for heading, names in GROUPS.items() if name in names), None)
        if heading is not None and heading not in places:
            places[heading] = parser.add_argument_group(heading)
        place = parser if heading is None else places[heading]
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
        if name == "plan":
            several = hint == list[str] | None
            options |= {"type": str, "action": "append" if several else Once}
            options["help"] += " May be repeated." if several else ""
        if not positional:
            options["dest"] = name
        place.add_argument(name if positional else option_name(name), **options)
    for name, (show, text) in INSTEAD.get(command, {}).items():
        parser.add_argument(f"--{name}", action=Show, const=show, help=text)
    return parser


def is_positional(name: str, parameter: inspect.Parameter) -> bool:
    """Whether a parameter is given by its place on the command line."""
    return parameter.default is parameter.empty and name not in SPECIAL and parameter.kind is not parameter.KEYWORD_ONLY


def option_names(command: Command) -> list[str]:
    """Every option of a command, as it is written."""
    parameters = option_parameters(command)
    names = [option_name(each) for each in parameters if not is_positional(each, parameters[each])]
    return [*names, *(f"--{each}" for each in INSTEAD.get(command, {}))]


def option_name(name: str) -> str:
    """`max_positions` -> `--max-positions`; `for_`, which Python has for itself without its end -> `--for`."""
    return f"--{name.removesuffix('_').replace('_', '-')}"


def add_commands(
    parser: jsonargparse.ArgumentParser,
    commands: Commands,
    passed_on: Mapping[str, Command] | None = None,
    above: Sequence[str] = (),
    words: Sequence[str] | None = None,
) -> None:
    """Adds a tree of commands below a parser; those passed on are listed, but read their words themselves.

    Args:
        parser: where.
        commands: the tree.
        passed_on: commands that read their words themselves.
        above: names of the tree.
        words: what follows them on the command line; commands that it does not name are listed alone, for their options
            take time. None: all are whole.
    """
    choices = parser.add_subcommands(dest="command", required=True, title="commands", description="", metavar="COMMAND")
    for name, command in {**commands, **(passed_on or {})}.items():
        here = [*above, name]
        about = summary(command) if callable(command) else ABOUT[name]
        if name not in commands or (words is not None and words[:1] != [name]):
            below = jsonargparse.ArgumentParser(exit_on_error=False)
            choices.add_subcommand(name, below, help=about)
        elif callable(command):
            choices.add_subcommand(name, command_parser(" ".join(here), command), help=about)
        else:
            line = f"masformer {' '.join(here)} COMMAND [options]"
            below = jsonargparse.ArgumentParser(
                usage=line, description=about, formatter_class=Help, exit_on_error=False
            )
            choices.add_subcommand(name, below, help=about)
            add_commands(below, command, above=here, words=None if words is None else words[1:])


def all_commands(commands: Commands) -> Iterator[Command]:
    """Every command of a tree."""
    for command in commands.values():
        if callable(command):
            yield command
        else:
            yield from all_commands(command)


def error_line(error: Exception, commands: Commands, words: Sequence[str] = ()) -> str:
    """An error's message in one line, in the words of the command line, which were these."""
    text = " ".join(str(error).split())
    if unknown := re.fullmatch(r"(?:argument [\w.]*: )?invalid choice: '(.*?)' \(choose from (.*)\)", text):
        return _unknown(unknown[1], re.findall(r"'(.*?)'", unknown[2]))
    if strange := re.match(r"unrecognized arguments: (.*)$", text, re.IGNORECASE):
        return _strange(strange[1], words, commands)
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
            parts = get_args(parameter.annotation)
            choices = (parameter.annotation, *parts, *(choice for part in parts for choice in get_args(part)))
            strings = [choice for choice in choices if isinstance(choice, str)]
            allowed = ", ".join(strings) or ("a number" if float in choices else allowed)
    return f"{option_name(name)} {value!r} is not allowed; allowed: {allowed}"


def _unknown(name: str, names: Sequence[str]) -> str:
    return f"no command {shown(name)}; {meant(name, names) or 'allowed: ' + ', '.join(names)}"


def _strange(left: str, words: Sequence[str], commands: Commands) -> str:
    """Of words that no option took."""
    found: Any = commands
    name = ["masformer"]
    for word in words:
        if not isinstance(found, Mapping) or word not in found:
            break
        found = found[word]
        name.append(word)
    option = left.split()[0].partition("=")[0]
    line = f"{' '.join(name)} does not take {shown(left)}"
    if option in NOWHERE:
        return f"{line}: {NOWHERE[option]}"
    if callable(found) and (hint := meant(option, [*option_names(found), "--help"])):
        return f"{line}; {hint}"
    return f"{line}; see {' '.join(name)} --help"


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
