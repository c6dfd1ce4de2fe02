"""Where a real model's attention goes, and what is lost with what no block passes on.

    python -m apb.bench.mass --out benchmarks/attention_mass.csv    # minutes on a CPU; the demo's model, once fetched

Each layer is looked at twice: alone, on the q, k and v of exact attention; and in a whole run of APB, whose layers have
the errors of those before them.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from apb.bench import append, environment, read_rows
from apb.compress import Oracle, QueryAware, Random
from apb.compress.compressor import Candidates, Compressor, Document
from apb.compress.pool import Pool
from apb.compress.select import pool_and_select
from apb.hf import IMPLEMENTATION, register, run_layers, share_weights
from apb.methods import APB
from apb.parallel import Host, run_threads
from apb.plan import ContextPlan
from apb.reference import attention
from apb.session import Session

__all__ = [
    "COMPRESSORS", "QKV", "MassRow", "block_scores", "exact_layers", "kept_positions", "layer_masses", "measure",
    "read", "whole_errors",
]  # fmt: skip

COMPRESSORS: Mapping[str, Compressor] = {"query-aware": QueryAware(), "random": Random(), "oracle": Oracle()}
"""What chooses, by name; the oracle knows what later blocks attend to."""
_QUESTION = "Who is the queen?"
_TOKENS, _HOSTS, _EVERY = 4096, 4, 32
_CHARACTERS = 20_000  # more than that many tokens


class QKV(NamedTuple):
    """One layer's input of attention, after RoPE: the document's rows, and behind them the question's."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float | None


@dataclass(frozen=True, kw_only=True)
class MassRow:
    """One layer, or the mean of all: a line of `benchmarks/attention_mass.csv`.

    Means are over query heads and over rows at equal distances in all blocks but the first. Errors are Euclidean norms
    over the largest ‖v‖ of the KV head.

    Attributes:
        date, device, torch, triton, commit: as in `apb.bench.Row`.
        model, text: what read what.
        tokens, hosts, anchor: n, H and l_a.
        compressor: its name.
        passing: l_p.
        layer: from 0; −1 is the mean of all.
        anchor_mass, block_mass, passed_mass, dropped_mass: shares of a row's exact attention; they add up to 1.
        error: ‖o − õ‖ in this layer alone.
        bound: 2 · dropped mass, which no error exceeds.
        worst: largest error over bound of any row and head.
        whole_error: ‖o − õ‖ in a whole run of APB; NaN where none was made.
    """

    date: str
    device: str
    torch: str
    triton: str
    commit: str
    model: str
    text: str
    tokens: int
    hosts: int
    anchor: int
    compressor: str
    passing: int
    layer: int
    anchor_mass: float
    block_mass: float
    passed_mass: float
    dropped_mass: float
    error: float
    bound: float
    worst: float
    whole_error: float


def read(path: Path) -> list[MassRow]:
    """Read the rows of `benchmarks/attention_mass.csv` or a file like it, as `apb.bench.read_rows` does."""
    return read_rows(path, MassRow)


def exact_layers(model: Any, document: Tensor, query: Tensor) -> list[QKV]:
    """Run a model over `[1, tokens]` and `[1, query]` under exact attention; return each layer's q, k and v."""
    found: list[QKV] = []

    class Exact:
        def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
            found.append(QKV(q, k, v, scale))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)

    ids = torch.cat((document, query), dim=1)
    register()
    model.set_attn_implementation(IMPLEMENTATION)
    with torch.inference_mode():
        run_layers(model, ids, torch.arange(ids.shape[1]), Exact())
    return found


def block_scores(layer: int, x: QKV, compressor: Compressor, plan: ContextPlan) -> dict[int, Tensor]:
    """Return what a compressor says of each block's candidates, `[kv_heads, tokens]`; of the last there are none.

    The question's vectors are those behind the document, as where it runs along with the prefill.
    """
    q, k = (t[:, :, : plan.tokens] for t in x[:2])
    found = {}
    for block in plan.blocks[:-1]:
        start = block.start + block.skipped
        mine = slice(start, block.stop)
        candidates = Candidates(
            q=x.q[:, :, mine],
            k=x.k[:, :, mine],
            v=x.v[:, :, mine],
            layer=layer,
            block=block.index,
            scale=x.scale,
            query=x.q[:, :, plan.tokens :],
            document=Document(q=q, k=k, start=start, later=block.stop),
        )
        found[block.index] = compressor.score(candidates)[0]
    return found


def kept_positions(scores: Mapping[int, Tensor], pool: Pool, plan: ContextPlan) -> dict[int, Tensor]:
    """Return the document positions `[kv_heads, kept]` that each block passes on, given its candidates' scores."""
    found = {}
    for block in plan.blocks[:-1]:
        indices, _ = pool_and_select(scores[block.index][None], block.kept_tokens, pool)
        found[block.index] = indices[0] + block.start + block.skipped
    return found


def layer_masses(x: QKV, method: APB, plan: ContextPlan, kept: Mapping[int, Tensor], rows: Tensor) -> dict[str, float]:
    """Return the masses, error and bound of one layer alone, in float64.

    Args:
        x: its q, k and v under exact attention.
        method: whose mask it is.
        plan: made by it.
        kept: what each block passes on, document positions `[kv_heads, kept]`.
        rows: document positions outside the first block.
    """
    column, n, group = torch.arange(plan.tokens), plan.tokens, x.q.shape[1] // x.k.shape[1]
    causal, start = column <= rows[:, None], rows // plan.block_tokens * plan.block_tokens
    masks = {"anchor": causal & (column < plan.anchor), "block": causal & (column >= start[:, None])}
    scale, found = x.q.shape[-1] ** -0.5 if x.scale is None else x.scale, []
    for head in range(x.k.shape[1]):
        q = x.q[0, head * group : (head + 1) * group, rows].double()
        k, v = (t[0, head, :n].double() for t in (x.k, x.v))
        seen = method.mask(plan, rows, {index: where[head] for index, where in kept.items()})
        masks |= {"passed": seen & ~masks["anchor"] & ~masks["block"], "dropped": causal & ~seen}
        p = torch.softmax((scale * (q @ k.T)).masked_fill(~causal, -math.inf), dim=-1)
        mass = {f"{name}_mass": (p * mask).sum(dim=-1) for name, mask in masks.items()}
        left = p * seen
        error = (p @ v - left @ v / left.sum(dim=-1, keepdim=True)).norm(dim=-1) / v.norm(dim=-1).max()
        bound = 2 * mass["dropped_mass"]
        worst = torch.where(bound > 1e-9, error / bound, 0.0)  # of rows that lose something
        found.append(mass | {"error": error, "bound": bound, "worst": worst})
    whole = {name: torch.cat([each[name] for each in found]) for name in found[0]}
    return {name: float(t.max() if name == "worst" else t.mean()) for name, t in whole.items()}


class _Noting(Session):
    """A session that notes what attention gives for some of the document's rows, layer by layer."""

    def __init__(self, *arguments: Any, rows: Tensor) -> None:
        super().__init__(*arguments)
        share = self.plan.host(self.host.rank)
        block, span = share.blocks[0], share.block_spans[0]
        self.rows = rows[(block.start <= rows) & (rows < block.stop)] - block.start + span.start
        self.noted: list[Tensor] = []

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """Attend as a session does."""
        out = super().attend(layer, q, k, v, scale)
        self.noted.append(out[:, :, self.rows])
        return out


def whole_errors(
    model: Any, layers: Sequence[QKV], document: Tensor, query: Tensor, method: APB, plan: ContextPlan, rows: Tensor
) -> list[float]:
    """Run the model with APB; return each layer's mean ‖o − õ‖ / max ‖v‖ against exact attention's."""

    def body(host: Host) -> list[Tensor]:
        session = _Noting(share_weights(model), method, plan, host, rows=rows)
        session.prefill(document, query)
        return session.noted

    errors = []
    for x, parts in zip(layers, zip(*run_threads(plan.hosts, body), strict=True), strict=True):
        n, group = plan.tokens, x.q.shape[1] // x.k.shape[1]
        out, _ = attention(x.q[:, :, rows], x.k[:, :, :n], x.v[:, :, :n], torch.arange(n) <= rows[:, None], x.scale)
        largest = x.v[:, :, :n].double().norm(dim=-1).amax(dim=-1).repeat_interleave(group, dim=1)
        error = (out - torch.cat(parts, dim=2)).norm(dim=-1) / largest[..., None]
        errors.append(float(error.mean()))
    return errors


def measure(
    model: Any,
    document: Tensor,
    query: Tensor,
    *,
    hosts: int,
    every: int,
    passings: Sequence[int],
    compressors: Mapping[str, Compressor] = COMPRESSORS,
    whole: Sequence[tuple[str, int]] = (),
) -> Iterator[dict[str, Any]]:
    """Yield what was found, a dict for each row of the ledger; `MassRow` says what is in it.

    Args:
        model: a causal language model.
        document: `[1, tokens]`.
        query: `[1, query]`, at least one token.
        hosts: H ≥ 2.
        every: how far apart the rows stand that are looked at.
        passings: budgets l_p.
        compressors: by name.
        whole: compressor and budget of whole runs; these have a row for each layer, the others one of all.
    """
    layers, n = exact_layers(model, document, query), document.shape[1]
    for name, compressor in compressors.items():
        method = APB(passing=0, compressor=compressor, query_in="prefill")
        plan = method.plan(tokens=n, hosts=hosts, query=query.shape[1])
        rows = torch.arange(plan.block_tokens, n, every)
        scores = [block_scores(layer, x, compressor, plan) for layer, x in enumerate(layers)]
        for passing in passings:
            method = replace(method, passing=passing)
            plan = method.plan(tokens=n, hosts=hosts, query=query.shape[1])
            kept = [kept_positions(one, compressor.pool, plan) for one in scores]
            found = [layer_masses(x, method, plan, one, rows) for x, one in zip(layers, kept, strict=True)]
            head = {"compressor": name, "passing": passing, "tokens": n, "hosts": hosts, "anchor": plan.anchor}
            mean = {key: sum(one[key] for one in found) / len(found) for key in found[0]}
            mean |= {"worst": max(one["worst"] for one in found), "whole_error": math.nan, "layer": -1}
            if (name, passing) in whole:
                errors = whole_errors(model, layers, document, query, method, plan, rows)
                for layer, (one, error) in enumerate(zip(found, errors, strict=True)):
                    yield head | one | {"layer": layer, "whole_error": error}
                mean["whole_error"] = sum(errors) / len(errors)
            yield head | mean


def main(out: Path) -> None:
    """Measure the demo's model on the Book of Esther, and write the ledger."""
    from apb.models import DEMO_MODEL, load_model, load_tokenizer
    from apb.prompt import build_prompt

    text = files("apb").joinpath("data/esther.txt").read_text(encoding="utf-8")[:_CHARACTERS]
    prompt = build_prompt(load_tokenizer(DEMO_MODEL), text, _QUESTION)
    model, run = load_model(DEMO_MODEL, device="cpu", dtype=torch.float32), environment(torch.device("cpu"))
    block = _TOKENS // _HOSTS
    default = block // 8
    passings = (0, default // 4, default // 2, default, 2 * default, 4 * default, block)
    whole = (("query-aware", 0), ("query-aware", default), ("random", default), ("oracle", default))
    document = prompt.document[:, :_TOKENS]
    for found in measure(model, document, prompt.query, hosts=_HOSTS, every=_EVERY, passings=passings, whole=whole):
        row = MassRow(**run, model=DEMO_MODEL, text="esther.txt", **found)
        print(replace(row, date=row.date[:10]), file=sys.stderr)
        append(out, [row])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="append the rows to this CSV file")
    main(parser.parse_args().out)
