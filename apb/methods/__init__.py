"""Ways to attend to a long document on several hosts: one short file each, one signature.

`plan(tokens=, hosts=, query=, query_offset=) → ContextPlan` says who holds what;
`attend(q, k, v, context) → out` runs one layer on one host's rows.
"""

from typing import Protocol

from torch import Tensor

from apb.attend import Backend
from apb.compress.compressor import Need
from apb.context import Context
from apb.methods.apb import APB
from apb.methods.flash import Flash
from apb.plan import ContextPlan

__all__ = ["APB", "Flash", "Method"]


class Method(Protocol):
    """What every file of this folder provides."""

    @property
    def backend(self) -> Backend:
        """Who computes the attention."""
        ...

    @property
    def needs(self) -> frozenset[Need]:
        """What `attend` reads from the context beside q, k and v."""
        ...

    def plan(self, *, tokens: int, hosts: int, query: int = 0, query_offset: int = 0) -> ContextPlan:
        """Split the document."""
        ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Run one layer's attention on this host's rows `[batch, heads, rows, dim]`."""
        ...
