"""Refuse an evaluation that cannot be run, before the model is loaded."""

from itertools import product

from apb.adapter import check_adapter
from apb.compress.retaining_head import warn_of_another_model
from apb.evals.evaluate import Evaluation, method_for
from apb.evals.sample import Sample
from apb.evals.tasks import TASKS, make_sample
from apb.methods import Method
from apb.models import load_tokenizer, model_positions

__all__ = ["FILES", "check"]

FILES = ("haystack", "squad", "hotpotqa")
"""The sources that are files."""


def check(setting: Evaluation) -> None:
    """Make a sample of every task and length, and every method's plan of it; warn of heads for another model.

    Another seed's sample may still not fit: `evaluate` says so when it comes to it.

    Raises:
        ValueError: naming the option, what came, and what was expected.
    """
    for name in ("samples", "batch_tokens", "max_new_tokens"):
        value = getattr(setting, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    for hosts in setting.hosts:
        if hosts < 1:
            raise ValueError(f"--hosts: expected at least 1, got {hosts}")
    for name in FILES:
        path, needing = getattr(setting.sources, name), [task for task in setting.tasks if TASKS[task].needs == name]
        if path is None and needing:
            raise ValueError(f"--{name}: {', '.join(needing)} need a file; give one with --{name} FILE")
        if path is not None and not path.is_file():
            raise ValueError(f"--{name}: there is no file {path}")
    if setting.adapter is not None:
        check_adapter(setting.adapter)
    positions = model_positions(setting.model)
    if positions is not None and max(setting.lengths) > positions:
        raise ValueError(f"--length: expected at most {positions}, the model's positions, got {max(setting.lengths)}")
    tokenizer = load_tokenizer(setting.model)
    for length, task in product(setting.lengths, setting.tasks):
        sample = make_sample(task, tokenizer, length=length, seed=setting.seed, sources=setting.sources)
        for method, hosts in product(setting.methods, setting.hosts):
            made = _check_plan(sample, length, method, hosts)
            warn_of_another_model(getattr(made, "compressor", None), model=setting.model, adapter=setting.adapter)


def _check_plan(sample: Sample, length: int, method: str, hosts: int) -> Method:
    """Make a method and its plan of a sample, and return the method."""
    prompt = sample.prompt
    tokens = prompt.document.shape[1]
    try:
        made = method_for(method, tokens=tokens, hosts=hosts)
        made.plan(
            tokens=tokens,
            hosts=1 if made.one_host else hosts,
            query=prompt.query.shape[1],
            query_offset=prompt.prefix_tokens,
        )
    except ValueError as error:
        where = f"{method} on {hosts} hosts, {sample.task} at {length} tokens"
        raise ValueError(f"--methods, --hosts: {where}: {error}") from None
    return made
