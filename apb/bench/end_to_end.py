"""Measure a whole model on all GPUs of this machine: prefill a long document, then decode, method by method.

A Hugging Face Llama of a real shape with random weights; random tokens. One group and one model serve all methods, and
each is rehearsed by every host alone: one that runs out of memory is a row that says so. What exact methods write is
compared.
"""

import gc
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apb.bench import Environment, Row, append, reason
from apb.bench.hosts import find_hosts
from apb.bench.prefill import store
from apb.bench.prefill.methods import QUERY_TOKENS, Contender, line_up
from apb.bench.prefill.record import PrefillRow
from apb.bench.prefill.shapes import SHAPES, DecoderShape
from apb.device import pick_dtype
from apb.generate import generate
from apb.hf import model_shape
from apb.methods import Method
from apb.parallel import Host, LoneHost, run_processes
from apb.prompt import Prompt

__all__ = ["LINE_UP", "Answer", "agreement", "foretold", "random_llama", "run"]

LINE_UP = ("apb", "apb-balanced", "ring-zigzag", "star", "ulysses")
_TIMEOUT_S = 900.0  # of one collective: the others wait while one host runs a one-host method


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """What all methods answer, and how often."""

    shape: DecoderShape
    tokens: int
    new_tokens: int
    repeats: int


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What became of one method.

    Attributes:
        exact: whether it computes exact attention.
        tokens: what it wrote.
        logits: `[vocab]`, what the first token was chosen by, float32.
        ttft_ms: time to first token, prefill and the question's pass, of the slowest host in each repeat.
        token_ms: time of each further token, likewise.
        peak_gbytes: most memory of a host, 10⁹ bytes, weights included.
        flop: operations of the prefill, all hosts and layers.
    """

    exact: bool
    tokens: list[int]
    logits: Tensor
    ttft_ms: list[float]
    token_ms: list[float]
    peak_gbytes: float
    flop: int

    @property
    def ttft(self) -> float:
        """Median time to first token, in milliseconds."""
        return statistics.median(self.ttft_ms)

    @property
    def step(self) -> float:
        """Median time of a further token, in milliseconds."""
        return statistics.median(self.token_ms)


def run(
    quick: bool = False,
    out: Path | None = None,
    *,
    shape: str = "llama-3.1-8b",
    tokens: int = 131072,
    new_tokens: int = 64,
    hosts: int | None = None,
    methods: Sequence[str] = LINE_UP,
    repeats: int = 2,
    simulated: Path = Path("benchmarks/prefill.csv"),
) -> list[Row]:
    """Measure, print a table, extend the ledger, a method at a time.

    Args:
        quick: a quarter of the tokens.
        out: CSV file to append to, made if it is not there; None writes nothing.
        shape: name of the model's shape, in `SHAPES`.
        tokens: n, document tokens.
        new_tokens: tokens to write, ≥ 2.
        hosts: as in `find_hosts`.
        methods: as in `line_up`.
        repeats: how often to measure, after a run to warm up; medians count.
        simulated: the prefill benchmark's ledger; what it holds of the same case is set beside what is measured.

    Raises:
        RuntimeError: fewer than two CUDA devices.
        ValueError: no such shape or method, or fewer than 2 new tokens.
        HostError: a host failed in the middle of a message; the methods before are in the ledger.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape: expected one of {', '.join(SHAPES)}, got {shape!r}")
    if new_tokens < 2:
        raise ValueError(f"new_tokens: expected at least 2, since the prefill gives the first one, got {new_tokens}")
    count, transport, env = find_hosts("end-to-end", hosts)
    tokens = tokens // 4 if quick else tokens
    line_up(methods, tokens, count)
    print(f"{count} × {env['device']}, torch {env['torch']}, {shape}, {tokens} + {new_tokens} tokens")
    print(f"{'method':>28} {'TTFT ms':>9} {'tokens/s':>9} {'ms/token':>9} {'peak GB':>8}", flush=True)
    sizes = _Sizes(shape=SHAPES[shape], tokens=tokens, new_tokens=new_tokens, repeats=repeats)
    job = (methods, sizes, store.read(simulated), env, out)
    return run_processes(count, _measure, *job, backend=transport, timeout_s=_TIMEOUT_S)[0]


def _measure(
    host: Host, methods: Sequence[str], sizes: _Sizes, expected: list[PrefillRow], env: Environment, out: Path | None
) -> list[Row]:
    """Make the model and answer by one method after the other; rank 0 prints, and writes to `out`."""
    with host.together("model"):
        model = random_llama(sizes.shape, sizes.tokens + QUERY_TOKENS + sizes.new_tokens, host.device)
    host.agree([parameter.sum(dtype=torch.float32).item() for parameter in model.parameters()], what="weights")
    rows: list[Row] = []
    answers: dict[str, Answer] = {}
    for contender in line_up(methods, sizes.tokens, host.world_size):
        label, case = contender.label, f"{sizes.shape.name} {sizes.tokens} on {contender.hosts}"
        row = Row(**env, benchmark="end_to_end", case=case, backend=label, ms=math.nan, tflops=math.nan)
        found = _try(host, contender, model, sizes)
        if host.rank or found is None:
            continue
        if isinstance(found, str):
            print(f"{label:>28} {found}", flush=True)
            new = [replace(row, notes=found)]
        else:
            said = [agreement(found, answers), foretold(expected, env["device"], sizes, contender)]
            new = _report(row, found, sizes.tokens, [text for text in said if text])
            answers[label] = found
        rows += new
        if out is not None:
            append(out, new)
    return rows


def _try(host: Host, contender: Contender, model: Any, sizes: _Sizes) -> Answer | str | None:
    """Return the answer of a method, or why there is none; None on hosts that it does not run on.

    Each host rehearses alone, so that what does not fit or does not work is found on all of them before they talk.
    """
    takes_part = host.rank < contender.hosts
    group = host if contender.hosts == host.world_size else LoneHost(0, 1, host.device)
    method, found = None, None
    try:
        with host.together("rehearsal"):
            if takes_part:
                method = contender.make().prepare(model_shape(model.config), host.device, model.dtype)
                alone = LoneHost(host.rank, contender.hosts, host.device)
                generate(model, method, alone, _prompt(sizes), max_new_tokens=2)
    except Exception as error:
        said = reason(error)
    else:
        found, said = _answer(group, method, model, sizes) if method else None, ""
        host.all_gather_object(None, what="done")  # the others wait while one host runs a one-host method
    gc.collect()  # caches that hold each other
    torch.cuda.empty_cache()
    return said or found


def _report(row: Row, found: Answer, tokens: int, said: Sequence[str]) -> list[Row]:
    """Print a method's line, and return its rows: time to first token, and time of a further one."""
    peak = found.peak_gbytes
    figures = f"{found.ttft:9.1f} {1e3 * tokens / found.ttft:9.0f} {found.step:9.2f} {peak:8.2f}"
    print(f"{row.backend:>28} {figures}  {'; '.join(said)}", flush=True)
    notes = [f"least and most of {len(found.ttft_ms)} repeats", "TFLOP/s of all hosts together", f"peak {peak:.4g} GB"]
    first = replace(row, ms=found.ttft, tflops=found.flop / found.ttft / 1e9, notes="; ".join([*notes, *said]),
                    low_ms=min(found.ttft_ms), high_ms=max(found.ttft_ms))  # fmt: skip
    further = replace(row, case=f"{row.case}, a further token", ms=found.step, notes=f"{1e3 / found.step:.4g} tokens/s",
                      low_ms=min(found.token_ms), high_ms=max(found.token_ms))  # fmt: skip
    return [first, further]


def agreement(found: Answer, others: dict[str, Answer]) -> str:
    """Say whether an exact method wrote what the first exact one of `others` did; "" if there is nothing to compare.

    Weights are random, so that logits lie close together, and bfloat16 may round a near tie apart.
    """
    label, other = next(((label, other) for label, other in others.items() if other.exact), ("", None))
    if other is None or not found.exact:
        return ""
    apart = (found.logits - other.logits).abs().max().item()
    logits = f"first logits at most {apart:.2g} apart"
    pairs = enumerate(zip(found.tokens, other.tokens, strict=True))
    different = next((at for at, (mine, theirs) in pairs if mine != theirs), None)
    if different is None:
        return f"the tokens of {label}, {logits}"
    return f"other tokens than {label} from number {different + 1} of {len(found.tokens)} on, {logits}"


def foretold(rows: Sequence[PrefillRow], device: str, sizes: _Sizes, contender: Contender) -> str:
    """Say what the newest simulation of this case on this device foretold; "" if there is none.

    It is no error of the simulation if they differ: there, a decoder's small operations are fused, and in Hugging
    Face's they are not.
    """
    case = ("simulated", device, sizes.shape.name, sizes.tokens, contender.hosts, contender.label)
    same = [row for row in rows if (row.mode, row.device, row.shape, row.tokens, row.hosts, row.method) == case]
    return "" if not same or store.failed(same[-1]) else f"a fused decoder simulated {same[-1].ttft_ms:.4g} ms"


def _prompt(sizes: _Sizes) -> Prompt:
    """Return random tokens, the same on every host."""
    generator, tokens = torch.Generator().manual_seed(0), sizes.tokens
    ids = torch.randint(sizes.shape.vocab, (1, tokens + QUERY_TOKENS), generator=generator)
    return Prompt(document=ids[:, :tokens], query=ids[:, tokens:], suffix=ids[:, :0])


def _answer(host: Host, method: Method, model: Any, sizes: _Sizes) -> Answer:
    """Answer once to warm up and then `repeats` times; the same on every host."""
    prompt = _prompt(sizes)
    generate(model, method, host, prompt, max_new_tokens=2)
    found = [generate(model, method, host, prompt, max_new_tokens=sizes.new_tokens) for _ in range(sizes.repeats)]
    weights = sum(parameter.nbytes for parameter in model.parameters())
    mine = {
        "ttft_ms": [one.phase_ms["prefill"] + one.phase_ms["query"] for one in found],
        "token_ms": [one.phase_ms["decode"] / (sizes.new_tokens - 1) for one in found],
        "peak_bytes": weights + max(one.peak_bytes for one in found),
        "flop": found[0].cost.flops * sizes.shape.layers,
    }
    every = host.all_gather_object(mine, what="figures")
    return Answer(
        exact=method.exact,
        tokens=found[0].tokens[0].tolist(),
        logits=found[0].logits[0].float().cpu(),
        ttft_ms=[max(times) for times in zip(*(one["ttft_ms"] for one in every), strict=True)],
        token_ms=[max(times) for times in zip(*(one["token_ms"] for one in every), strict=True)],
        peak_gbytes=max(one["peak_bytes"] for one in every) / 1e9,
        flop=sum(one["flop"] for one in every),
    )


def random_llama(shape: DecoderShape, positions: int, device: torch.device, seed: int = 0) -> Any:
    """Make a Llama of this shape straight on a device: bfloat16 on a GPU, float32 on the CPU.

    Entries are normal with variance 1 / fan-in, those of the embedding with variance 1, so that every layer adds about
    as much as the embedding gave; the same on all devices of a kind.

    Args:
        shape: of the model; Llama has no biases.
        positions: most tokens it has to take.
        device: where it lives.
        seed: starts the draw of the weights.
    """
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=positions,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=pick_dtype("auto", device)).eval()
    generator = torch.Generator(device).manual_seed(seed)
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                std = 1.0 if parameter is embedding else parameter.shape[1] ** -0.5
                parameter.normal_(0.0, std, generator=generator)
    return model
