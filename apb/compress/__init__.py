"""Choose which keys and values a block passes on: one scorer a file, one protocol (`compressor.py`)."""

from apb.compress.compressor import Candidates, Compressor, Document, Kept, Projections
from apb.compress.key_norm import KeyNorm
from apb.compress.nan import NanWatch
from apb.compress.oracle import Oracle
from apb.compress.pool import MaxPool, MeanPool, Pool, no_pool
from apb.compress.query_aware import QueryAware
from apb.compress.random import Random
from apb.compress.recency import Recency
from apb.compress.retaining_head import RetainingHead, load_retaining_head
from apb.compress.select import select
from apb.compress.snapkv import SnapKV

__all__ = [
    "TRAINING_FREE",
    "Candidates",
    "Compressor",
    "Document",
    "Kept",
    "KeyNorm",
    "MaxPool",
    "MeanPool",
    "NanWatch",
    "Oracle",
    "Pool",
    "Projections",
    "QueryAware",
    "Random",
    "Recency",
    "RetainingHead",
    "SnapKV",
    "load_retaining_head",
    "no_pool",
    "select",
]

TRAINING_FREE: dict[str, type[Compressor]] = {
    "query-aware": QueryAware,
    "snapkv": SnapKV,
    "key-norm": KeyNorm,
    "random": Random,
    "recency": Recency,
    "oracle": Oracle,
}
"""Compressors that need no checkpoint, by the name that the command line knows them by."""
