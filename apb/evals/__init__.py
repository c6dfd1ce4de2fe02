"""Tasks that measure long-context methods: RULER's and InfiniteBench's, written on the spot, scored officially."""

from apb.evals.sample import Sample, Sources, Task
from apb.evals.tasks import OFFLINE, TASKS, make_sample

__all__ = ["OFFLINE", "TASKS", "Sample", "Sources", "Task", "make_sample"]
