"""One option system: a dataclass field is a flag, a YAML key, a check and a line of the reference.

Options that belong together are a frozen dataclass derived from :class:`Options`, whose fields
:func:`option` makes. Their :class:`Kind` reads what is typed, as a flag or in a YAML file, and
raises ``UsageError`` with what would be understood.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from wsm_megatron.errors import UsageError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_NUMBER = r"([+-]?[0-9]+(?:_[0-9]+)*(?:\.[0-9]+)?(?:e[+-]?[0-9]{1,3})?)"
_COUNT = re.compile(_NUMBER + r"\s*([kmbt]?)", re.IGNORECASE)
_SIZE = re.compile(_NUMBER + r"\s*(?:([kmgt])(i?)b?|b)?", re.IGNORECASE)
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""``s3://bucket/run``; of two slashes, ``pathlib`` leaves one."""
_LARGEST = 2**63
_SWITCH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_NULL = "tag:yaml.org,2002:null"
_RENAMED = "renamed_flags"
"""Where a namespace says which flags were given under their old name."""


def count(text: str) -> int:
    """A whole number: 20000, 20_000, 20k, 500M, 1e9, 2.5B (of tokens: billions)."""
    found = _COUNT.fullmatch(text.strip())
    value = Fraction("0.5")
    if found is not None:
        value = _fraction(found[1]) * 1000 ** " kmbt".index(found[2].lower() or " ")
    if value.denominator != 1:
        raise UsageError(f"{text!r} is not a whole number such as 20000, 20k, 500M, 1e9 or 2.5B")
    if abs(value) >= _LARGEST:
        raise UsageError(f"{text!r} is too large")
    return int(value)


def size(text: str) -> int:
    """Bytes: 1000000, 256MiB, 1.5GB."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise UsageError(f"{text!r} is not a size such as 256MiB")
    number, unit, binary = found.groups()
    scale = (1024 if binary else 1000) ** (" kmgt".index(unit.lower()) if unit else 0)
    value = int(_fraction(number) * scale)
    if value >= _LARGEST:
        raise UsageError(f"{text!r} is too large")
    return value


def number(text: str) -> float:
    """A number: 0.25, -0.5, 1/3, 25%."""
    try:
        if text.strip().endswith("%"):
            return float(text.strip()[:-1]) / 100
        above, slash, below = text.partition("/")
        return float(above) / float(below if slash else 1)
    except (ValueError, ZeroDivisionError):
        raise UsageError(f"{text!r} is not a number such as 0.25, 1/3 or 25%") from None


def switch(text: str) -> bool:
    """``true`` or ``false``, as in YAML."""
    if text.lower() not in _SWITCH:
        raise UsageError(f"{text!r} is neither true nor false")
    return _SWITCH[text.lower()]


def several(one: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    """What reads values separated by commas, each by ``one``."""

    def read(text: str) -> tuple[T, ...]:
        parts = [part.strip() for part in text.split(",")]
        if not all(parts):
            raise UsageError(f"{text!r} lacks a value before or after a comma")
        return tuple(map(one, parts))

    return read


def local_path(text: str | Path, option: str = "") -> Path:
    """A path of a mounted file system, not an address; ``option`` it was given to, for messages."""
    if _ADDRESS.match(str(text)):
        raise UsageError(
            f"{option}{' ' if option else ''}{text} is an address, not a path: only mounted file "
            "systems are read and written. Mount the storage or copy the checkpoints, and give the "
            "folder"
        )
    return Path(text)


def _fraction(text: str) -> Fraction:
    return Fraction(text.replace("_", ""))


@dataclass(frozen=True)
class Kind:
    """What values an option takes.

    Attributes:
        what: such a value, for messages.
        read: makes one of text. holds: whether a value that Python gives is one.
        form: what is kept of it.
        choices: all that there are, where they are few.
        item: the kind of each, where the value is a tuple of several.
        repeated: each of several has a flag of its own.
    """

    what: str
    read: Callable[[str], Any]
    holds: Callable[[Any], bool]
    form: Callable[[Any], Any] = lambda value: value
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    item: Kind | None = None
    repeated: bool = False

    def take(self, value: Any) -> Any:
        """A value that Python gives, in the form that is kept. One of several may stand alone."""
        if self.item is not None:
            values = value if isinstance(value, (list, tuple)) else (value,)
            return tuple(map(self.item.take, values))
        if not self.holds(value):
            raise UsageError(f"must be {self.what}, not {value!r}")
        return self.form(value)


def _is(*types: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, types) and (bool in types or not isinstance(value, bool))


COUNT = Kind("a whole number", count, _is(int), metavar="N")
SIZE = Kind("a whole number of bytes", size, _is(int), metavar="SIZE")
NUMBER = Kind("a number", number, _is(int, float), metavar="X")
SWITCH = Kind("true or false", switch, _is(bool))
TEXT = Kind("text", str, _is(str), metavar="TEXT")
PATH = Kind("a path", local_path, _is(str, Path), local_path, "PATH")


def one_of(choices: tuple[str, ...]) -> Kind:
    """One of a few words."""
    what = f"one of {', '.join(choices)}"

    def read(text: str) -> str:
        if text not in choices:
            raise UsageError(f"{text!r} is not {what}")
        return text

    return Kind(what, read, lambda value: value in choices, choices=choices)


def list_of(item: Kind) -> Kind:
    """Several values, separated by commas."""
    return replace(item, read=several(item.read), item=item, metavar=f"{item.metavar},...")


def repeated(item: Kind) -> Kind:
    """Several values, each with a flag of its own."""
    return replace(item, item=item, repeated=True)


def option(help: str, kind: Kind, default: Any = MISSING, **more: Any) -> Any:
    """A field of :class:`Options`, required without a default; ``more``: see :class:`Option`."""
    return field(default=default, metadata={"help": help, "kind": kind, **more})


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option, for everything that shows or reads it.

    Attributes:
        default_text: what happens without it, where the default's value does not say it.
        group: heading in help. least: smallest value, of each where there are several.
        old_name: understood too, for one release, with a notice.
    """

    name: str
    prefix: str
    help: str
    kind: Kind
    default: Any
    default_text: str = ""
    group: str = ""
    metavar: str | None = None
    least: int | None = None
    old_name: str | None = None

    @property
    def key(self) -> str:
        """Its name in a YAML file."""
        return self.name.strip("_")

    @property
    def flag(self) -> str:
        return self.prefix + self.key.replace("_", "-")

    @property
    def old_flag(self) -> str | None:
        return self.old_name and self.prefix + self.old_name.replace("_", "-")

    @property
    def dest(self) -> str:
        """Its name in a parser's namespace."""
        return self.flag.lstrip("-").replace("-", "_")

    @property
    def required(self) -> bool:
        return self.default is MISSING

    @property
    def said_default(self) -> str:
        """What happens without it, in words; empty where nothing does."""
        if self.default_text or self.required:
            return self.default_text or "required"
        nothing = self.default is None or self.default is False or self.default == ()
        return "" if nothing else f"{self.default}"

    def take(self, value: Any) -> Any:
        """The value to keep. Raises ``UsageError`` that does not name the option."""
        if value is None and self.default is None:
            return None
        value = self.kind.take(value)
        if self.least is not None:
            for one in value if isinstance(value, tuple) else (value,):
                if one < self.least:
                    raise UsageError(f"must be at least {self.least}, not {one}")
        return value


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base of dataclasses whose fields are options. Every value is checked, however it is given."""

    prefix: ClassVar[str] = "--"

    def __post_init__(self) -> None:
        for one in self.options():
            try:
                value = one.take(getattr(self, one.name))
            except UsageError as error:
                raise UsageError(f"{one.flag} {error}") from None
            object.__setattr__(self, one.name, value)
        self.check()

    def check(self) -> None:
        """Raise ``UsageError`` for options that contradict each other or have no effect."""

    @classmethod
    def options(cls) -> tuple[Option, ...]:
        return tuple(
            Option(name=f.name, prefix=cls.prefix, default=f.default, **f.metadata)
            for f in fields(cls)
        )


@dataclass(frozen=True)
class Given:
    """Values that were given, by option name; and the options given under their old name."""

    values: dict[str, Any]
    renamed: tuple[Option, ...] = ()

    def __or__(self, other: Given) -> Given:
        """Both; ``other`` wins."""
        renamed = {one.name: one for one in (*self.renamed, *other.renamed)}
        return Given({**self.values, **other.values}, tuple(renamed.values()))

    def of(self, options: type[Options]) -> dict[str, Any]:
        """Those of one class."""
        names = [one.name for one in options.options()]
        return {name: self.values[name] for name in names if name in self.values}

    def tell_renamed(self) -> None:
        """A notice in the log for each option that was given under its old name."""
        for one in self.renamed:
            logger.warning(
                "%s is now %s; the old name goes with the next release", one.old_flag, one.flag
            )


def add_flags(parser: Any, options: Sequence[Option]) -> None:
    """Add flags to a parser or one of its groups. What is not given leaves no trace."""
    for one in options:
        default = f" ({'' if one.required else 'default: '}{one.said_default})"
        help = (one.help + (default if one.said_default else "")).replace("%", "%%")
        parser.add_argument(one.flag, help=help, **_how_parsed(one))
        if one.old_flag is not None:
            parser.add_argument(one.old_flag, help=argparse.SUPPRESS, **_how_parsed(one, _OldFlag))


def _how_parsed(one: Option, action: Any = None) -> dict[str, Any]:
    """Of ``add_argument``: all but the flag and its help."""
    how: dict[str, Any] = {"dest": one.dest, "default": argparse.SUPPRESS}
    if one.kind is SWITCH:
        return how | ({"action": action, "nargs": 0} if action else {"action": "store_true"})
    how["type"] = typed(one.kind.read)
    how["metavar"] = one.metavar or one.kind.metavar
    how["choices"] = one.kind.choices or None
    return how | {"action": action or ("append" if one.kind.repeated else "store")}


def typed(read: Callable[[str], T]) -> Callable[[str], T]:
    """For argparse, which shows the message of its own exception only."""

    def read_argument(text: str) -> T:
        try:
            return read(text)
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read_argument


class _OldFlag(argparse.Action):
    """A flag under its old name: remembered, and otherwise the same."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, True if self.nargs == 0 else values)
        setattr(namespace, _RENAMED, [*getattr(namespace, _RENAMED, []), self.dest])


def given_flags(namespace: argparse.Namespace, options: Sequence[Option]) -> Given:
    """What :func:`add_flags`' parser found."""
    there = [one for one in options if getattr(namespace, one.dest, None) is not None]
    values = {one.name: getattr(namespace, one.dest) for one in there}
    renamed = getattr(namespace, _RENAMED, [])
    return Given(
        {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()},
        tuple(one for one in there if one.dest in renamed),
    )


def read_yaml(path: str | Path, options: Sequence[Option], flag: str) -> Given:
    """Options of a YAML file: one mapping of their names to values, written as after the flags.

    Names are those of the flags, with underscores or hyphens. Several values may be a list;
    ``null`` leaves the default.

    Args:
        flag: the file was given to, for messages.

    Raises:
        UsageError: naming the file, and the name in it.
    """
    import yaml

    where = f"{flag} {path}"
    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{where}: {' '.join(str(error).split())}") from error
    if not isinstance(root, yaml.MappingNode):
        raise UsageError(f"{where}: expected a mapping of option names to values")
    values: dict[str, Any] = {}
    renamed = []
    for name, node in root.value:
        key = str(name.value)
        one = _named(key, options, where)
        if one.name in values:
            raise UsageError(f"{where}: {key}: {one.key} is given twice")
        try:
            values[one.name] = None if node.tag == _NULL else one.take(_value(one.kind, node))
        except UsageError as error:
            raise UsageError(f"{where}: {key}: {error}") from None
        if key.replace("-", "_") == one.old_name:
            renamed.append(one)
    return Given({k: v for k, v in values.items() if v is not None}, tuple(renamed))


def _named(key: str, options: Sequence[Option], where: str) -> Option:
    name = key.replace("-", "_")
    for one in options:
        if name in (one.key, one.old_name):
            return one
    (close,) = difflib.get_close_matches(name, [one.key for one in options], n=1, cutoff=0.0)
    raise UsageError(f"{where}: there is no option {key}; did you mean {close}?")


def _value(kind: Kind, node: Any) -> Any:
    """What a node of YAML gives an option: its text is read as a flag's would be."""
    if node.id == "scalar":
        return (kind.read(node.value),) if kind.repeated else kind.read(node.value)
    if node.id == "sequence" and kind.item is not None:
        return tuple(_value(kind.item, item) for item in node.value)
    wanted = kind.what if kind.item is None else f"{kind.what}, or a list of them"
    raise UsageError(f"must be {wanted}, not a {'list' if node.id == 'sequence' else node.id}")
