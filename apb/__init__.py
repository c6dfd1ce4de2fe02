"""apb: sequence-parallel approximate attention, in modules that stand alone.

Data flows one way: plan (who holds what) → compress → pass → attend → method → model → command line.
"""

from apb import compress, methods, parallel
from apb.attend import choose_backend, decode_attention, masked_attention
from apb.context import Context, Trace
from apb.merge import merge, merge_pair
from apb.plan import ContextPlan, plan_context

__version__ = "0.1.0"

__all__ = [
    "Context",
    "ContextPlan",
    "Trace",
    "__version__",
    "choose_backend",
    "compress",
    "decode_attention",
    "masked_attention",
    "merge",
    "merge_pair",
    "methods",
    "parallel",
    "plan_context",
]
