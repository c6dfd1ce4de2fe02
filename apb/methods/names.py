"""Methods by name, with settings as text: "ring-zigzag", "star:anchor=1024", "ape:temperature=1,scale=1"."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from apb.attend import AShape, BlockSparse, Pattern, VerticalSlash
from apb.compress import TRAINING_FREE, Compressor, load_retaining_head
from apb.compress.retaining_head import PACKAGED
from apb.methods.apb import APB
from apb.methods.ape import APE
from apb.methods.flash import Flash
from apb.methods.method import Method
from apb.methods.minference import MInference
from apb.methods.ring import Ring
from apb.methods.spava import Spava
from apb.methods.star import Star
from apb.methods.ulysses import Ulysses

__all__ = ["METHODS", "Named", "make_method", "split_method"]


@dataclass(frozen=True, kw_only=True)
class Named:
    """What stands behind a name.

    Attributes:
        title: what people call it.
        make: makes the method of its settings.
        settings: the names of those that can be given as text, and what reads each.
        one_host: its methods' `one_host`, known without making one.
    """

    title: str
    make: Callable[..., Method]
    settings: dict[str, Callable[[str], Any]] = field(default_factory=dict)
    one_host: bool = False


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"expected an integer, got {text!r}") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"expected a number, got {text!r}") from None


def _flag(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(f"expected true or false, got {text!r}")
    return text == "true"


def _compressor(name: str) -> Compressor:
    if name not in TRAINING_FREE:
        names = ", ".join((*TRAINING_FREE, "retaining-head"))
        raise ValueError(f"compressor: expected one of {names}, got {name!r}")
    return TRAINING_FREE[name]()


def _apb(
    make: type[APB], *, compressor: Compressor | str | None = None, heads: str | Path | None = None, **settings: Any
) -> APB:
    if compressor == "retaining-head":
        if heads is None:
            raise ValueError(
                f"heads: the retaining head needs a checkpoint; give its file as heads=FILE (--heads FILE), or "
                f"one that comes with this package: {', '.join(PACKAGED)}"
            )
        compressor = load_retaining_head(heads)
    elif heads is not None:
        raise ValueError(f"heads: {heads} is for the compressor 'retaining-head', got {compressor!r}")
    if isinstance(compressor, str):
        compressor = _compressor(compressor)
    return make(**settings) if compressor is None else make(compressor=compressor, **settings)


def _minference(pattern: str = "vertical-slash", **settings: Any) -> MInference:
    if pattern not in _PATTERNS:
        raise ValueError(f"pattern: expected one of {', '.join(_PATTERNS)}, got {pattern!r}")
    make, budgets = _PATTERNS[pattern]
    own = {name: settings.pop(name) for name in list(settings) if name not in ("backend", "dense_below")}
    strangers = [name for name in own if name not in budgets]
    if strangers:
        raise ValueError(f"pattern: {pattern} takes {', '.join(budgets)}, got {', '.join(strangers)}")
    return MInference(pattern=make(**(budgets | own)), **settings)


_PATTERNS: dict[str, tuple[Callable[..., Pattern], dict[str, int]]] = {
    "vertical-slash": (VerticalSlash, {"vertical": 512, "slash": 2048}),
    "a-shape": (AShape, {"sink": 128, "local": 3968}),
    "block-sparse": (BlockSparse, {"blocks": 100}),
}

_APB_SETTINGS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("anchor", "passing"), _integer),
    **dict.fromkeys(("compressor", "heads", "query_in", "layout"), str),
    "split_anchor": _flag,
}

METHODS: dict[str, Named] = {
    "flash": Named(title="Exact attention", make=Flash, one_host=True),
    "ring": Named(title="Ring Attention", make=Ring),
    "ring-zigzag": Named(title="Zigzag Ring Attention", make=lambda **settings: Ring(layout="zigzag", **settings)),
    "ulysses": Named(title="Ulysses", make=Ulysses),
    "star": Named(title="Star Attention", make=Star, settings={"anchor": _integer}),
    "ape": Named(title="APE", make=APE, settings={"prefix": _integer, "temperature": _number, "scale": _number}),
    "minference": Named(
        title="MInference",
        make=_minference,
        one_host=True,
        settings={
            "pattern": str,
            **dict.fromkeys(("vertical", "slash", "sink", "local", "blocks", "dense_below"), int),
        },
    ),
    "apb": Named(title="APB", make=partial(_apb, APB), settings=_APB_SETTINGS),
    "spava": Named(title="Spava", make=partial(_apb, Spava), settings=_APB_SETTINGS),
}


def split_method(text: str) -> tuple[str, dict[str, str]]:
    """Split a method's text into its name and its settings, neither of them checked.

    >>> split_method("apb: anchor = 1/4, passing=8")
    ('apb', {'anchor': '1/4', 'passing': '8'})

    Args:
        text: a name; after a colon, settings as `name=value`, separated by commas. A value may be missing: "".

    Raises:
        ValueError: a setting that is given twice.
    """
    name, _, rest = text.partition(":")
    settings: dict[str, str] = {}
    for part in filter(str.strip, rest.split(",")):
        key, _, value = (side.strip() for side in part.partition("="))
        if key in settings:
            raise ValueError(f"{key}: expected it once, got {settings[key]!r} and {value!r} in {text!r}")
        settings[key] = value
    return name.strip(), settings


def make_method(text: str, **settings: Any) -> Method:
    """Make a method of its name and its settings.

    >>> make_method("star:anchor=1024")
    Star(backend='auto', anchor=1024)

    Args:
        text: a name of `METHODS`; after a colon, settings as `name=value`, separated by commas.
        settings: further settings, as text or as values; those in `text` come first. `backend` is known to all.

    Raises:
        ValueError: no such method, no such setting, or a value that it cannot have.
    """
    name, own = split_method(text)
    if name not in METHODS:
        hint = "; separate methods by spaces" if "," in name else ""
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {name!r}{hint}")
    known, given = METHODS[name], settings | own
    for key, value in own.items():
        if key in known.settings and not value:
            raise ValueError(f"{key}: expected {key}=VALUE, got {key!r} without a value")
    for key in [key for key in given if key != "backend"]:
        if key not in known.settings:
            takes = ", ".join(known.settings) or "no settings"
            raise ValueError(f"{key}: {name} does not know it; it takes {takes}")
        if not isinstance(given[key], str):
            continue
        try:
            given[key] = known.settings[key](given[key])
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
    return known.make(**given)
