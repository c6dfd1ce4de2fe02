"""Ways to attend to a long document on several hosts: one short file each, one signature.

`plan(tokens=, hosts=, query=, query_offset=) → ContextPlan` says who holds what;
`attend(q, k, v, context) → out` runs one layer of the prefill on one host's rows;
`decode(q, k, v, context) → out` lets later rows attend to what all hosts hold;
`cost(plan, rank, shape) → HostCost` counts pairs, FLOPs, bytes and messages of one host and layer.
"""

from apb.methods.apb import APB
from apb.methods.ape import APE
from apb.methods.flash import Flash
from apb.methods.method import Method
from apb.methods.minference import MInference
from apb.methods.names import METHODS, make_method, split_method
from apb.methods.ring import Ring
from apb.methods.spava import Spava
from apb.methods.star import Star
from apb.methods.ulysses import Ulysses

__all__ = [
    "APB",
    "APE",
    "METHODS",
    "Flash",
    "MInference",
    "Method",
    "Ring",
    "Spava",
    "Star",
    "Ulysses",
    "make_method",
    "split_method",
]
