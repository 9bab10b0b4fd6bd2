"""From `argv`, and a YAML file that it may name, to an options object."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

from meshpeft.parallel.errors import blamed_on, reason_of, shown
from meshpeft.training.config import ConfigError

__all__ = ["parse"]

T = TypeVar("T")

_MOST_BYTES = 1 << 18


def parse(options: type[T], argv: Sequence[str], prog: str, description: str | None = None) -> T:
    """Read `options`, a dataclass, from the command line.

    A field called `config` names a YAML file whose values stand before those of the command line, which therefore
    override them. `description` stands above the options in the help; by default the dataclass's docstring does.

    An option that takes several values (`--data`) may be repeated: all are taken. Of any other the last one is. An
    option that is also a switch (`SWITCHES` of the dataclass) needs no value.

    Raises:
        ConfigError: The YAML file cannot be read, or has a key that is no option.
        SystemExit: The command line is wrong (code 2, explained on stderr), or requests help (code 0).
    """
    arguments = [*_yaml_arguments(options, argv), *_joined(options, argv)]
    arguments = _with_values(getattr(options, "SWITCHES", {}), arguments)
    return tyro.cli(options, args=arguments, prog=prog, description=description, config=(tyro.conf.DisallowNone,))


def _joined(options: type[Any], argv: Sequence[str]) -> list[str]:
    """Gather the values of a repeated option that takes several behind one occurrence of it."""
    several = {"--" + field.name.replace("_", "-") for field in fields(options) if "tuple[" in str(field.type)}
    others: list[str] = []
    values: dict[str, list[str]] = {}
    into = others
    for argument in argv:
        name, equals, value = argument.partition("=")
        option = name.replace("_", "-")
        if option in several:
            into = values.setdefault(option, [])
            into += [value] if equals else []
        elif argument.startswith("--"):
            into = others
            others.append(argument)
        else:
            into.append(argument)
    return others + [argument for option, given in values.items() for argument in (option, *given)]


def _with_values(switches: Mapping[str, tuple[str, str]], argv: Sequence[str]) -> list[str]:
    """Give each switch that has no value the one that it means."""
    meanings: dict[str, tuple[str, str]] = {}
    for name, (alone, negated) in switches.items():
        option = "--" + name.replace("_", "-")
        meanings |= {option: (option, alone), option.replace("--", "--no-", 1): (option, negated)}
    found = []
    for argument, following in zip(argv, [*argv, "--"][1:], strict=True):
        option, value = meanings.get(argument.replace("_", "-"), (argument, None))
        is_given = option == argument.replace("_", "-") and not following.startswith("--")
        found += [argument] if value is None or is_given else [option, value]
    return found


def _yaml_arguments(options: type[Any], argv: Sequence[str]) -> list[str]:
    names = [field.name for field in fields(options)]
    if "config" not in names:
        return []
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--config", nargs="?", type=Path)
    path: Path | None = finder.parse_known_args(list(argv))[0].config
    if path is None:  # not given, or without a value, which the real parser explains
        return []
    arguments: list[str] = []
    for key, value in _read(path).items():
        name = (key if isinstance(key, str) else shown(key)).replace("-", "_")
        if name not in names or name == "config":
            raise ConfigError(f"{path}: no option is called {shown(key)}{_nearest(name, names)}")
        option = "--" + name.replace("_", "-")
        if value is None:
            continue
        for part in value if isinstance(value, list) else [value]:
            # What is nested, through aliases of YAML too, would be written out; a number of 5,000 digits has no text.
            if not isinstance(part, str | int | float | date) or (isinstance(part, int) and abs(part) >= 2**63):
                raise ConfigError(f"{path}: {shown(key)}: {shown(part)} is no value of an option")
        if isinstance(value, bool):
            arguments.append(option if value else option.replace("--", "--no-", 1))
        elif isinstance(value, list):
            arguments += [option, *map(str, value)]
        else:
            arguments.append(f"{option}={value}")
    return arguments


def _read(path: Path) -> dict[Any, Any]:
    try:
        with open(path, "rb") as file:
            text = file.read(_MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {reason_of(error)}") from error
    if len(text) > _MOST_BYTES:
        raise ConfigError(f"{path}: is larger than {_MOST_BYTES >> 10} KiB, which no file of options is")
    with blamed_on(f"{path}: is not YAML", ConfigError):
        try:
            values = yaml.safe_load(text.decode("utf-8"))
        except yaml.MarkedYAMLError as error:
            if error.problem_mark is None:
                raise
            where = f"{path}, line {error.problem_mark.line + 1}"
            raise ConfigError(f"{where}: is not YAML: {error.problem}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected options and their values, `name: value` a line")
    return values


def _nearest(name: str, names: Sequence[str]) -> str:
    found = difflib.get_close_matches(name[:200], names, n=1)
    return f"; did you mean {found[0]}?" if found else f"; the options are {', '.join(names)}"
