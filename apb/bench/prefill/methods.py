"""The line-up: methods by name, with the paper's budgets for a length and a number of hosts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from apb.attend import Backend
from apb.compress.compressor import Candidates, Compressor, Need
from apb.compress.retaining_head import RetainingHead
from apb.costs import ModelShape
from apb.methods import METHODS, Method, make_method, split_method

__all__ = ["PRESETS", "QUERY_TOKENS", "Contender", "RandomHead", "line_up"]

QUERY_TOKENS = 64
"""Tokens of the question."""
_WIDTH = 1024  # the paper's
_PREFIX = 64  # APE's: a system prompt

PRESETS = (
    "flash", "minference", "ring", "ring-zigzag", "ulysses", "star", "ape", "apb", "apb-balanced", "spava",
)  # fmt: skip
"""The methods by name, and `apb-balanced`; their budgets follow from the length and the number of hosts."""


@dataclass(frozen=True, kw_only=True)
class RandomHead(Compressor):
    """A retaining head of the paper's size without a checkpoint: `prepare` draws its weights."""

    @property
    def needs(self) -> frozenset[Need]:
        """The projections before RoPE."""
        return frozenset({"projections"})

    @staticmethod
    def weight_bytes(shape: ModelShape) -> int:
        """Bytes of all layers' weights."""
        inputs = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        return shape.layers * _WIDTH * (inputs + shape.kv_heads) * shape.bytes_per_value

    def prepare(self, shape: ModelShape, device: torch.device, dtype: torch.dtype) -> RetainingHead:
        """Return a head with random weights, the same for all layers."""
        generator = torch.Generator(device).manual_seed(0)
        inputs = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        fc1, fc2 = (
            torch.randn(*size, device=device, dtype=dtype, generator=generator) * size[1] ** -0.5
            for size in ((_WIDTH, inputs), (shape.kv_heads, _WIDTH))
        )
        return RetainingHead(pool=self.pool, fc1=(fc1,) * shape.layers, fc2=(fc2,) * shape.layers)

    def score(self, candidates: Candidates) -> Tensor:
        """Refuse: there are no weights yet."""
        raise ValueError("RandomHead: its weights are drawn by prepare(shape, device, dtype); use what that returns")


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A method of the line-up.

    Attributes:
        label: its name, with the settings that were given.
        hosts: how many it runs on: one, if it knows no more.
        backend: who computes its attention.
        make: makes it; may raise if it cannot run with these numbers.
    """

    label: str
    hosts: int
    backend: str
    make: Callable[[], Method]


def line_up(names: Sequence[str], tokens: int, hosts: int, *, backend: Backend = "auto") -> list[Contender]:
    """Return the methods of these names for `tokens` tokens on `hosts` hosts.

    A preset has the paper's budgets: l_a = min(n / 4H, 8192) anchor tokens, l_p = n / 8H passed by each block.

    Args:
        names: of `PRESETS`; settings may follow as `apb.methods.make_method` reads them ("apb:passing=512"), and take
            the place of the preset's; what they do not name stays as in the preset.
        tokens: n ≥ 1.
        hosts: H ≥ 1.
        backend: who computes the attention, where no setting says so.

    Raises:
        ValueError: no such preset, or a setting given twice.
    """
    settings, found = _settings(tokens, hosts), []
    for label in names:
        name, own = split_method(label)
        if name not in PRESETS:
            raise ValueError(
                f"methods: expected one of {', '.join(PRESETS)}, or one with settings such as apb:passing=512, "
                f"got {label!r}"
            )
        method = name if name in METHODS else "apb"
        text = f"{method}:{label.partition(':')[2]}"
        found.append(
            Contender(
                label=label,
                hosts=1 if METHODS[method].one_host else hosts,
                backend=own.get("backend", backend),
                make=partial(make_method, text, backend=backend, **settings.get(name, {})),
            )
        )
    return found


def _settings(tokens: int, hosts: int) -> dict[str, dict[str, Any]]:
    """Return what the presets choose; of those that are not there, the method chooses itself."""
    passing = tokens // (8 * hosts)
    apb = {"anchor": min(tokens // (4 * hosts), 8192), "compressor": RandomHead()}
    return {
        "ape": {"prefix": _PREFIX},
        "apb": {**apb, "passing": passing},
        # Two blocks a host, so that half as much from each is as much in all.
        "apb-balanced": {**apb, "passing": passing // 2, "layout": "zigzag", "split_anchor": True},
    }
