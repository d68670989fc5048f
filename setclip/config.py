"""Commands from dataclasses: flags with help (tyro), named recipes, an optional YAML file, and errors in one line.

A file's entries become flags placed before those of the command line, so both are checked alike, the last wins, and a
mistyped key in a file gets the same "Perhaps you meant" as a mistyped flag. Used by every command.
"""

import dataclasses
import errno
import os
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, overload

import tyro
import yaml

from setclip import quick_start
from setclip.errors import InputError
from setclip.log import say
from setclip.lookup import look_up

T = TypeVar("T")

CONFIG_NAME = "config.yaml"
"""Of a run's settings in its folder"""

# A full disk and the like: what a user mends, not we.
_OF_THE_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)

# Booleans are `--resume True|False`, alike in files and on the command line; a bare `--resume` means True.
_MARKERS = (tyro.conf.FlagConversionOff,)


@overload
def parse(
    config: type[T], args: Sequence[str] | None = None, description: str | None = None, name: str | None = None
) -> T: ...
@overload
def parse(
    config: T, args: Sequence[str] | None = None, description: str | None = None, name: str | None = None
) -> T: ...
def parse(
    config: Any, args: Sequence[str] | None = None, description: str | None = None, name: str | None = None
) -> Any:
    """Returns the config from command-line flags (and a YAML file given by --config).

    `config` is a dataclass or an instance whose values are the defaults. A wrong flag prints the nearest one and exits
    with status 2, as tyro does.
    """
    args = list(sys.argv[1:] if args is None else args)
    args = _flags_of_file(args) + _without_config(args)
    default = None if isinstance(config, type) else config
    kind = config if isinstance(config, type) else type(config)
    args = _with_values(args, _switches(kind))
    kwargs: dict[str, Any] = {} if default is None else {"default": default}
    program = _program() + (f" {name}" if name else "")
    return tyro.cli(kind, prog=program, args=args, description=description, config=_MARKERS, **kwargs)


def parse_recipe(
    recipes: Mapping[str, Callable[[], T]],
    args: Sequence[str] | None = None,
    description: str = "",
    what: str = "recipe",
) -> tuple[str, T]:
    """Returns (recipe name, config): the first argument names the recipe, whose values are the defaults of the flags."""
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help"):
        say(f"{description.strip()}\n\n{what}s: {', '.join(recipes)}\n")
        say(f"`{what.upper()} --help` lists the flags with that {what}'s values.")
        raise SystemExit(0 if args else 2)
    if args[0].startswith("-"):
        raise InputError(f"expected a {what} first, found {args[0]!r}; known: {', '.join(recipes)}")
    recipe = look_up(recipes, args[0], what)
    # A dataclass itself has values without defaults, which its flags must then give.
    return args[0], parse(recipe if isinstance(recipe, type) else recipe(), args[1:], description, name=args[0])


def save(path: str | Path, config: Any) -> None:
    """Writes the resolved config as YAML, which --config reads back to an equal config."""
    Path(path).write_text(yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True), encoding="utf-8")


def flags_of(args: Sequence[str]) -> dict[str, str]:
    """Returns each flag's last value, by its name without dashes in front, of a command line with a --config file or without.

    For those who need one value of another command's line; nothing is checked. A bare flag has the value "True".
    """
    words = _flags_of_file(args) + _without_config(args)
    found: dict[str, str] = {}
    for word, following in zip(words, [*words, "--"][1:], strict=True):
        if word.startswith("--"):
            name, equals, value = word.removeprefix("--").partition("=")
            found[name.replace("_", "-")] = value if equals else "True" if following.startswith("--") else following
    return found


def words_of(args: Sequence[str], name: str) -> list[str]:
    """Returns all words behind the last flag `name` of such a command line, for flags that take several."""
    found: list[str] = []
    is_inside = False
    for word in _flags_of_file(args) + _without_config(args):
        if word.startswith("--"):
            flag, equals, value = word.removeprefix("--").partition("=")
            is_inside = flag.replace("_", "-") == name
            found = ([value] if equals else []) if is_inside else found
        elif is_inside:
            found.append(word)
    return [word for word in found if word != "None"]


def to_dict(config: Any) -> dict[str, Any]:
    """Returns a config as plain dicts, lists, strings and numbers."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, tuple | list):
            return [plain(v) for v in value]
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return value

    return plain(dataclasses.asdict(config))


def command(main: Callable[[], None]) -> None:
    """Runs a command's `main`; an InputError becomes one line and exit status 2 (SETCLIP_TRACEBACK=1 shows it all)."""
    quick_start.end()
    try:
        main()
    except InputError as error:
        if os.environ.get("SETCLIP_TRACEBACK"):
            raise
        _fail(str(error), error.exit_status)
    except OSError as error:
        if error.errno not in _OF_THE_MACHINE or os.environ.get("SETCLIP_TRACEBACK"):
            raise
        _fail(f"expected to read and write files, found {error}; mend that (free space, permissions) and start again")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _fail(message: str, status: int = 2) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(status)


def _switches(kind: type, prefix: str = "") -> set[str]:
    """Returns the flags of all booleans in a config tree."""
    hints = typing.get_type_hints(kind)
    flags: set[str] = set()
    for entry in dataclasses.fields(kind):
        name = f"{prefix}{entry.name.replace('_', '-')}"
        if hints[entry.name] is bool:
            flags.add(f"--{name}")
        elif dataclasses.is_dataclass(hints[entry.name]):
            flags |= _switches(hints[entry.name], f"{name}.")
    return flags


def _with_values(args: Sequence[str], switches: set[str]) -> list[str]:
    """Returns `args` with True after each boolean flag that stands bare."""
    result: list[str] = []
    for arg, following in zip(args, [*args, "--"][1:], strict=True):
        result.append(arg)
        if arg.replace("_", "-") in switches and following.startswith("-"):
            result.append("True")
    return result


def _program() -> str:
    """Returns what the user typed: `python -m pretrain.run`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name}" if spec else Path(sys.argv[0]).name


def _config_path(args: Sequence[str]) -> Path | None:
    for position, arg in enumerate(args):
        if arg == "--config":
            if position + 1 == len(args):
                raise InputError("expected a YAML file after --config, found nothing")
            return Path(args[position + 1])
        if arg.startswith("--config="):
            return Path(arg.removeprefix("--config="))
    return None


def _without_config(args: Sequence[str]) -> list[str]:
    result = list(args)
    for position, arg in enumerate(result):
        if arg == "--config":
            return result[:position] + result[position + 2 :]
        if arg.startswith("--config="):
            return result[:position] + result[position + 1 :]
    return result


def _flags_of_file(args: Sequence[str]) -> list[str]:
    path = _config_path(args)
    if path is None:
        return []
    if not path.exists():
        raise InputError(f"expected a YAML file at {path}, found none; --config takes the path of one")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise InputError(f"{path}: expected YAML, found {error}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected a mapping of sections to values, found {type(tree).__name__}")
    return _flags(tree, "")


def _flags(tree: Mapping[str, Any], prefix: str) -> list[str]:
    flags: list[str] = []
    for name, value in tree.items():
        flag = f"{prefix}{str(name).replace('_', '-')}"
        if isinstance(value, Mapping):
            flags += _flags(value, f"{flag}.")
        elif isinstance(value, list):
            flags += [f"--{flag}", *map(str, value)]
        else:
            flags += [f"--{flag}", str(value)]
    return flags
