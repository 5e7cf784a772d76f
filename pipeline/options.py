"""The constants at the top of a script as command-line options, their bounds as annotations.

    BATCH_SIZE: Count = 8192  # activations per step
    DTYPE: Literal["bfloat16", "float32"] = "bfloat16"  # of the computation
    BETAS: tuple[Share, Share] = (0.85, 0.9999)  # of AdamW

`parse_constants(globals())` turns them into --batch_size, --dtype and --betas, and refuses a value out of bounds,
wherever it was set. Floats are finite unless the annotation says otherwise.
"""

import argparse
import ast
import difflib
import math
import sys
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn

from pipeline.errors import InputError

_LARGEST = 2**63 - 1  # the largest whole number that torch and numpy accept, also as a seed


class Bounds(NamedTuple):
    """The values an option may have. `above` and `below` are excluded, `least` and `most` included."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def complaint(self, value: float) -> str | None:
        """What is wrong with a value, as the end of a sentence; None if nothing is."""
        if isinstance(value, int) and abs(value) > _LARGEST:
            return f"is too large; a whole number is at most {_LARGEST}."
        if not math.isfinite(value):
            return "is not a finite number; give one."
        if value < self.least:
            return f"is too small; it must be at least {self.least:g}."
        if value > self.most:
            return f"is too large; it must be at most {self.most:g}."
        if value <= self.above:
            return f"is too small; it must be above {self.above:g}."
        if value >= self.below:
            return f"is too large; it must be below {self.below:g}."
        return None


Count = Annotated[int, Bounds(least=1)]
CountOrZero = Annotated[int, Bounds(least=0)]
Positive = Annotated[float, Bounds(above=0)]
NotNegative = Annotated[float, Bounds(least=0)]
Share = Annotated[float, Bounds(least=0, most=1)]
ShareBelowOne = Annotated[float, Bounds(least=0, below=1)]
Seed = Annotated[int, Bounds(least=0)]
Size = Annotated[float, Bounds(above=0, most=1e9)]  # in MB or GB
Port = Annotated[int, Bounds(least=0, most=65535)]


class Option(NamedTuple):
    """The type of an option, taken from a constant's annotation."""

    item: Any  # the type of a value, or of each of several: str, int, float or bool
    bounds: Bounds  # of each number
    choices: tuple  # the allowed values; empty for any
    length: int | None  # 1 for a single value, None for any number of values
    is_list: bool
    may_be_none: bool


def option_of(annotation: Any, default: Any) -> Option:
    """Read an annotation: a plain type, Annotated with Bounds, Literal, list, tuple, each also `| None`."""
    may_be_none = False
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        may_be_none = True
        (annotation,) = (t for t in typing.get_args(annotation) if t is not types.NoneType)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in (tuple, list) or origin in (tuple, list):
        items = [t for t in arguments if t is not Ellipsis] or [type(default[0])]
        any_length = origin is not tuple or Ellipsis in arguments
        return option_of(items[0], None)._replace(
            length=None if any_length else len(items), is_list=True, may_be_none=may_be_none
        )
    bounds, choices = Bounds(), ()
    if origin is Annotated:
        annotation, bounds = arguments
    elif origin is typing.Literal:
        annotation, choices = type(arguments[0]), arguments
    return Option(annotation, bounds, choices, 1, False, may_be_none)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message.rstrip('.')}; --help lists the options.")


def parse_constants(
    module_globals: dict[str, Any],
    argv: list[str] | None = None,
    commands: dict[str, str] | None = None,
    argument: str | None = None,
) -> argparse.Namespace:
    """Turn the upper-case constants of a script into options of the same name in lower case.

    A constant's value is the option's default, its annotation (or the value's type) the option's type and bounds, and
    the comment on its line the help text. `NAME: str` without a value is a required option. Names starting with _ are
    not options. commands: name -> help text of the words allowed as first argument, `command`; the first is the
    default. argument: an option whose value may follow the command without its name. Raises InputError for an unknown
    option and for a value that its annotation does not allow.
    """
    source = Path(module_globals["__file__"]).read_text(encoding="utf-8")
    lines = source.splitlines()
    parser = _Parser(description=module_globals["__doc__"], formatter_class=argparse.RawDescriptionHelpFormatter)
    if commands:
        text = "; ".join(f"{name}: {about}" for name, about in commands.items())
        parser.add_argument("command", nargs="?", choices=list(commands), default=next(iter(commands)), help=text)
    options: dict[str, Option] = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        if not isinstance(target, ast.Name) or not target.id.isupper() or target.id.startswith("_"):
            continue
        name, default = target.id.lower(), module_globals.get(target.id)
        annotation = module_globals.get("__annotations__", {}).get(target.id, type(default))
        option = options[name] = option_of(annotation, default)
        assert node.end_lineno is not None
        _, _, comment = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode().partition("#")
        required = isinstance(node, ast.AnnAssign) and node.value is None
        choices = f"one of {', '.join(map(str, option.choices))}; " if option.choices else ""
        after = "" if required else f" ({choices}default: {default})"
        about = (comment.strip() + after).replace("%", "%%")
        if option.item is bool:
            parser.add_argument(f"--{name}", type=_parse_bool, nargs="?", const=True, default=default, help=about)
        elif option.is_list:
            parser.add_argument(f"--{name}", type=option.item, nargs="+", default=default, help=about)
        else:
            parser.add_argument(f"--{name}", type=option.item, default=default, required=required, help=about)
    words = sys.argv[1:] if argv is None else argv
    if argument and len(words) > 1 and words[0] in (commands or ()) and not words[1].startswith("--"):
        words = [words[0], f"--{argument}", *words[1:]]
    refuse_unknown(words, options)
    config = parser.parse_args(words)
    for name, option in options.items():
        check_option(name, getattr(config, name), option)
    return config


def refuse_unknown(argv: list[str], options: Iterable[str]) -> None:
    """Raise InputError for an option that does not exist, before argparse complains about others that are missing.

    As there, the beginning of a name may stand for the whole.
    """
    flags = ["--help", *(f"--{name}" for name in options)]
    for flag in (word.partition("=")[0] for word in argv if word.startswith("--") and word != "--"):
        if not any(known.startswith(flag) for known in flags):
            similar = difflib.get_close_matches(flag, flags, 1)
            hint = f"did you mean {similar[0]}?" if similar else "--help lists the options."
            raise InputError(f"unrecognized arguments: {flag}; {hint}")


def check_option(name: str, value: Any, option: Option) -> None:
    """Raise InputError for a value that an option does not allow."""
    if value is None and option.may_be_none:
        return
    values: list[Any] = list(value) if option.is_list and value is not None else [value]
    if option.length is not None and len(values) != option.length:
        raise InputError(f"--{name} has {len(values)} values but takes {option.length}; correct it.")
    for each in values:
        if option.choices and each not in option.choices:
            *most, last = map(str, option.choices)
            raise InputError(f"--{name} {each} is unknown; write {', '.join(most)} or {last}.")
        if option.item in (int, float) and (complaint := option.bounds.complaint(each)):
            raise InputError(f"--{name} {each} {complaint}")


def _parse_bool(text: str) -> bool:
    if text.lower() in ("1", "true", "yes"):
        return True
    if text.lower() in ("0", "false", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
