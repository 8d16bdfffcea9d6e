"""Values of options that the user keeps in a file or in the environment.

If an option has several values, the first of these counts: its flag, its variable in the
environment (`OFFLOAD_CTX_SIZE`), the file's table of the model (`[models."NAME"]`), the rest of the
file, the built-in value.
"""

from __future__ import annotations

import argparse
import difflib
import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from offload.errors import SourceError
from offload.files import read_text, short
from offload.flags import is_switch, options_of
from offload.lines import did_you_mean
from offload.options import BITS, AnswerOptions, LoadOptions, SharedOptions
from offload.pack.recipe import AskedBits
from offload.quant.errors import OffloadError
from offload.sampling import PARAMETERS, Sampling

PREFIX = "OFFLOAD_"
OPTIONS = {
    each.name: each
    for kind in (LoadOptions, AnswerOptions, SharedOptions)
    for each, spelling in options_of(kind)
    if spelling.flags
}
# What a file calls an option: the word of its flag, like ctx_size, or its name in Python.
NAMES = {name: name for name in OPTIONS} | {
    each.metadata["spelling"].flags[-1].strip("-").replace("-", "_"): name
    for name, each in OPTIONS.items()
}
TRUTH = {"1": True, "true": True, "yes": True, "on": True}
TRUTH |= {"0": False, "false": False, "no": False, "off": False}


def config_file() -> Path:
    """`$XDG_CONFIG_HOME/offload/config.toml`, by default in `~/.config`."""
    # Unlike `Path.expanduser`, this leaves `~` alone where the home is unknown: there is no file.
    folder = os.path.expanduser(os.environ.get("XDG_CONFIG_HOME") or "~/.config")  # noqa: PTH111
    return Path(folder, "offload", "config.toml")


def fill_in(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Give `arguments` what file and environment say about options that the user left out.

    `parser` is the command's, whose options are filled in; values for other commands are ignored.
    An option for which the command has a default of its own keeps it. Raises `OffloadError`, which
    names the file or variable, for a name that no option has and for a value that it cannot take.
    """
    actions = {a.dest: a for a in reversed(parser._actions) if a.option_strings}
    for where, name, value in (*_environment(), *_file(getattr(arguments, "model", None))):
        action = actions.get(name)
        if action is None or hasattr(arguments, name):
            continue
        try:
            setattr(arguments, name, _value(action, value))
            _check(name, getattr(arguments, name))
        except (OffloadError, argparse.ArgumentTypeError) as error:
            raise OffloadError(f"{where}: {error}") from None
        except (TypeError, ValueError):
            raise OffloadError(f"{where}: {value!r} is not a value of this option") from None


def _environment() -> Iterator[tuple[str, str, str]]:
    """Name, option and text of each variable for an option."""
    variables = {PREFIX + word.upper(): name for word, name in NAMES.items()}
    for variable in sorted(os.environ):
        if variable in variables:
            yield variable, variables[variable], os.environ[variable]
        elif variable.startswith(PREFIX) and (
            close := difflib.get_close_matches(variable, variables, n=1, cutoff=0.85)
        ):
            raise OffloadError(
                f"{variable} is not an option (did you mean {close[0]}?): rename or unset it"
            )


def _file(model: str | None) -> Iterator[tuple[str, str, Any]]:
    """Place, option and value of each line of the file, those for `model` first."""
    file = config_file()
    try:
        with file.open(encoding="utf-8-sig") as handle:
            table = tomllib.loads(read_text(handle, short(file)))
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError, RecursionError) as error:
        why = getattr(error, "strerror", None) or error
        raise SourceError(f"{short(file)} cannot be read: {why}") from None
    models = table.pop("models", {})
    if not isinstance(models, dict) or not all(isinstance(own, dict) for own in models.values()):
        raise OffloadError(f'{short(file)}: models: write a table for each, like [models."demo"]')
    found: list[tuple[str, str, Any]] = []
    for name, own in models.items():
        read = list(_entries(f'{short(file)}, models."{name}"', own))
        found += read if name == model else []
    yield from (*found, *_entries(short(file), table))


def _entries(where: str, table: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    for word, value in table.items():
        name = NAMES.get(word.replace("-", "_"))
        if name is None:
            raise OffloadError(
                f"{where}: there is no option {word!r}{did_you_mean(word, [*NAMES, 'models'])}"
            )
        yield f"{where}, {word}", name, value


def _value(action: argparse.Action, value: Any) -> Any:
    """What the command line would make of `value`. Raises what argparse's types raise."""
    parse: Any = action.type or str
    if is_switch(OPTIONS[action.dest]):
        if str(value).lower() not in TRUTH:
            raise OffloadError(f"{value!r} is neither true nor false")
        truth = TRUTH[str(value).lower()]
        return parse("on" if truth else "off") if action.type else truth  # bench takes a list
    if isinstance(value, dict | bool):
        raise ValueError
    if isinstance(action, argparse._AppendAction):
        return [parse(str(each)) for each in (value if isinstance(value, list) else [value])]
    return parse(",".join(map(str, value)) if isinstance(value, list) else str(value))


def _check(name: str, value: Any) -> None:
    """Raise `OffloadError` for a value that loading or sampling would refuse later."""
    if name in PARAMETERS and value is not None:
        Sampling(**{name: value})
    elif name in BITS and not isinstance(value, list):
        AskedBits(**{name: value})
    elif hasattr(LoadOptions, name) and isinstance(value, int | str):
        LoadOptions(**{name: value})  # type: ignore[arg-type]
