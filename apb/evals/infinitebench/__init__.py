"""The six synthetic tasks of InfiniteBench (arXiv 2402.13718): one family a file."""

from apb.evals.infinitebench.code_run import CodeRun
from apb.evals.infinitebench.maths import MathCalc, MathFind
from apb.evals.infinitebench.retrieval import HiddenDigits, KeyValue

__all__ = ["CodeRun", "HiddenDigits", "KeyValue", "MathCalc", "MathFind"]
