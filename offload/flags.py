"""Command-line flags made from dataclasses whose fields say how each option is written."""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import Field, dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

from offload.errors import OptionError

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Spelling:
    """How one option is written and explained."""

    usage: str  # like `-c --ctx-size N`; empty if the option is for Python only
    help: str
    group: str | None = None  # heading in --help
    unit: str = ""  # what a number counts
    unset: str = ""  # what the default None stands for, or "required"
    parse: Callable[[str], Any] | None = None  # None: what the field's type says, see `PARSERS`
    choices: tuple[str, ...] | None = None
    action: str = "store"  # "append" and "extend" allow the option several times

    @property
    def flags(self) -> list[str]:
        """The ways to write the option; the last one is its full word."""
        return [word for word in self.usage.split() if word.startswith("-")]

    @property
    def metavar(self) -> str | None:
        """What stands for the value in --help; a switch has none."""
        words = self.usage.split()
        return words[-1] if len(words) > len(self.flags) else None


def path(text: str) -> Path:
    """An argparse type: a path, with the home folder for `~`."""
    from offload.files import user_path  # imported here because `offload.main` imports this file

    return user_path(text)


def _reader(kind: type, what: str) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not {what}") from None

    return read


# By the field's type; others are text.
PARSERS: dict[str, Callable[[str], Any]] = {
    "int": _reader(int, "a whole number"),
    "float": _reader(float, "a number"),
    "Path": path,
}


def option(usage: str, help: str, default: Any = None, **more: Any) -> Any:
    """A dataclass field that is also a command-line option; `more` is as in `Spelling`."""
    return field(default=default, metadata={"spelling": Spelling(usage, help, **more)})


def options_of(kind: type) -> list[tuple[Field[Any], Spelling]]:
    """The fields of the dataclass `kind` in order, each with its spelling."""
    return [(each, each.metadata["spelling"]) for each in fields(kind)]


def parser_of(each: Field[Any]) -> Callable[[str], Any]:
    """What makes a value of the option's text."""
    parse: Callable[[str], Any] | None = each.metadata["spelling"].parse
    return parse or PARSERS.get(str(each.type).removesuffix(" | None"), str)


# What messages call the types of fields; `_is_a` tells which values are of a type.
KINDS = {
    "int": "a whole number",
    "float": "a share like 0.25",
    "str": "a text",
    "Path": "a path",
    "bool": "True or False",
    "Sequence": "a list",
    "device": "a torch.device",
    "dtype": "a torch.dtype",
}


def _is_a(value: object, kind: str) -> bool:
    """Whether `value` is of the type `kind` of `KINDS`. torch's types are known by name."""
    if kind in ("int", "float"):
        return isinstance(value, Integral if kind == "int" else Real) and not _is_a(value, "bool")
    if kind == "Sequence":
        return isinstance(value, Sequence) and not isinstance(value, str | bytes)
    return kind in [base.__name__ for base in type(value).__mro__]


def check_values(options: Any) -> None:
    """Raise `OptionError` for a value of `options` that is not of its field's type or range."""
    for each, spelling in options_of(type(options)):
        value = getattr(options, each.name)
        kinds = re.findall(r"\w+", re.sub(r"torch\.|\[.*?\]", "", str(each.type)))
        if value is None and "None" in kinds:
            continue
        known = [kind for kind in kinds if kind in KINDS]
        if not any(_is_a(value, kind) for kind in known):
            example = f", like {each.default}" if type(each.default) is int else ""
            words = " or ".join(KINDS[kind] for kind in known)
            raise OptionError(f"{each.name} is {value!r}: it must be {words}{example}")
        if spelling.parse is not None and "int" in kinds:
            try:
                spelling.parse(str(value))
            except argparse.ArgumentTypeError as error:
                raise OptionError(f"{each.name}: {error}") from None


def is_switch(each: Field[Any]) -> bool:
    """Whether the option takes no value."""
    return str(each.type).startswith("bool")


def has_no(each: Field[Any]) -> bool:
    """Whether the option is a switch that can also be written `--no-...`."""
    return is_switch(each) and each.default is not False


def default_text(default: Any, spelling: Spelling) -> str:
    """A default as people read it, or "" if nothing need be said."""
    if default is None or default == ():
        return spelling.unset
    if isinstance(default, bool):
        return "on" if default else "off"
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def explained(each: Field[Any], default: Any) -> str:
    """The help of an option, followed by its default in brackets."""
    spelling: Spelling = each.metadata["spelling"]
    told = default_text(default, spelling)
    if not told or each.default is False:
        return spelling.help
    return f"{spelling.help} ({told if told == 'required' else f'default: {told}'})"


def add_options(
    parser: argparse.ArgumentParser,
    kind: type,
    names: Container[str] | None = None,
    *,
    group: str | None = None,
    **defaults: Any,
) -> None:
    """Give `parser` the options of the dataclass `kind`, or only those in `names`.

    `group` replaces the heading of each option, and `defaults` the default values. An option that
    the user leaves out does not appear in the namespace, so that the default of the dataclass
    applies.
    """
    headings = {each.title: each for each in parser._action_groups}
    for each, spelling in options_of(kind):
        if not spelling.flags or (names is not None and each.name not in names):
            continue
        title = group or spelling.group
        if title and title not in headings:
            headings[title] = parser.add_argument_group(title)
        settings: dict[str, Any] = {
            "dest": each.name,
            "default": defaults.get(each.name, argparse.SUPPRESS),
            "help": explained(each, defaults.get(each.name, each.default)).replace("%", "%%"),
            "action": spelling.action,
        }
        if is_switch(each):
            settings["action"] = argparse.BooleanOptionalAction if has_no(each) else "store_true"
        else:
            settings |= {"metavar": spelling.metavar, "type": parser_of(each)}
            settings |= {"choices": spelling.choices, "required": spelling.unset == "required"}
        (headings[title] if title else parser).add_argument(*spelling.flags, **settings)


def add_command(
    commands: Any,
    name: str,
    line: str,
    run: Callable[[argparse.Namespace], int] | None = None,
    example: str = "",
) -> argparse.ArgumentParser:
    """Add the command `name` to argparse's `commands`, with `line` as its help.

    Without `run`, the command is only listed. Returns its parser.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=line,
        description=f"{line[0].upper()}{line[1:]}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if run is not None:
        parser.epilog = f"example: {example}"
        parser.set_defaults(run=run)
        parser.add_argument(
            "--debug", action="store_true", help="show a traceback when something fails"
        )
    return parser


MODEL_HELP = "checkpoint folder, .gguf file, pack, hub id, short name like gpt-oss-20b, or demo"


def add_model(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the model that a command runs."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)


def options_from(arguments: argparse.Namespace, kind: type[Kind]) -> Kind:
    """The dataclass `kind`, filled with what the user gave."""
    given = vars(arguments)
    values = {each.name: given[each.name] for each, _ in options_of(kind) if each.name in given}
    return kind(**{n: tuple(v) if isinstance(v, list) else v for n, v in values.items()})


def words_of(options: Any, names: Iterable[str]) -> list[str]:
    """The words that a user writes for those of `names` whose values are not the defaults."""
    known = {each.name: (each, spelling) for each, spelling in options_of(type(options))}
    words: list[str] = []
    for name in names:
        value, (each, spelling) = getattr(options, name), known[name]
        flag = spelling.flags[0]
        if value == each.default:
            continue
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-"))
        else:
            words += [flag, str(value)]
    return words


def described(kind: type) -> str:
    """The options of the dataclass `kind` as lines for its docstring."""
    lines = []
    for each, spelling in options_of(kind):
        unit = "" if spelling.unit in spelling.help else f", in {spelling.unit}"
        text = f"{each.name}: {explained(each, each.default)}{unit}"
        lines.append(textwrap.fill(text, 92, initial_indent="- ", subsequent_indent="  "))
    return "\n".join(lines)
