"""Train retaining heads, which score the tokens that APB passes on, for a model."""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any, get_args

import torch

from apb.adapter import check_adapter
from apb.cli.table import table
from apb.device import DTYPES, pick_device, pick_dtype
from apb.evals import TASKS, Sources, make_sample
from apb.files import fingerprint
from apb.models import load_model, load_tokenizer
from apb.train.examples import Examples, GeneratedExamples
from apb.train.report import write_report
from apb.train.retaining_heads import HeadProgress, TrainedHeads, train_heads
from apb.train.settings import Decay, HeadTraining, SeenIn
from apb.train.stop import stopper
from apb.train.text_examples import TextExamples

__all__ = ["add_arguments", "run"]

_TASKS = ("niah_single_1", "niah_multikey_2", "vt", "cwe", "fwe")
_TEXT_TASKS = ("niah_multikey_1", "niah_multivalue", "niah_multiquery")  # hide their facts in a text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    fresh, add = HeadTraining(), parser.add_argument
    add("--model", required=True, help="a local directory, a hub id, or SmolLM2-135M-Instruct")
    add(
        "--adapter",
        type=Path,
        help="a LoRA merged into the weights: a directory in PEFT's format, or smollm2-135m-long",
    )
    add("--out", required=True, type=Path, help="directory of the heads, the curve and the state of the run")
    add("--steps", type=int, default=fresh.steps, help="one example each (default: %(default)s)")
    add("--width", type=int, default=fresh.width, help="hidden units of a head (default: %(default)s)")
    add("--lengths", type=_integers, default=[1024, 2048, 4096],
        help="tokens of an example, from document to answer (default: 1024,2048,4096)")  # fmt: skip
    add("--data", nargs="+", default=["generated"], metavar="generated|FILE",
        help="question-answer pairs (the default), or windows of text files")  # fmt: skip
    add("--tasks", type=_names, help=f"generated pairs' kinds (default: {','.join(_TASKS)}; with a haystack also "
        f"{','.join(_TEXT_TASKS)})")  # fmt: skip
    add("--haystack", type=Path, help="a text file that generated facts are hidden in")
    add("--query-tokens", type=int, default=32, help="of a text window, before its answer (default: %(default)s)")
    add("--answer-tokens", type=int, default=64, help="of a text window, its last (default: %(default)s)")
    add("--query-in", choices=get_args(SeenIn), default=fresh.query_in,
        help="anchor: the tokens have seen the question, as in APB's plan; after: they have not")  # fmt: skip
    add("--learning-rate", type=float, default=fresh.learning_rate, help="AdamW's (default: %(default)s)")
    add("--betas", type=float, nargs=2, default=fresh.betas, help="AdamW's (default: 0.9 0.95)")
    add("--weight-decay", type=float, default=fresh.weight_decay, help="AdamW's (default: %(default)s)")
    add("--warmup", type=int, default=fresh.warmup, help="steps until the full learning rate (default: %(default)s)")
    add("--decay", choices=get_args(Decay), default=fresh.decay, help="then to 0, or not (default: %(default)s)")
    add("--smoothing", type=float, default=fresh.smoothing, help="weight of score differences (default: %(default)s)")
    add("--clip", type=float, default=fresh.clip, help="largest element of a gradient (default: %(default)s)")
    add("--seed", type=int, default=fresh.seed, help="of weights and examples (default: %(default)s)")
    add("--eval-every", type=int, default=fresh.eval_every, help="steps between points (default: %(default)s)")
    add("--eval-examples", type=int, default=fresh.eval_examples, help="held out (default: %(default)s)")
    add("--eval-fraction", type=float, default=fresh.eval_fraction,
        help="share of the tokens whose overlap is taken (default: %(default)s)")  # fmt: skip
    add("--save-every", type=int, default=250, help="steps between saves of the state (default: %(default)s)")
    add("--save-dtype", choices=DTYPES, default="bfloat16", help="of the heads' file (default: %(default)s)")
    add("--minutes", type=float, help="stop after so long, with the state saved")
    add("--resume", action=argparse.BooleanOptionalAction, default=None,
        help="go on with the run in --out (default: if there is one), or start over")  # fmt: skip
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="of the model (default: bfloat16 on CUDA)")
    add("--workers", type=int, help="processes that write examples ahead (default: 4 with CUDA, else 0)")
    add("--device", default="auto", help="default: cuda if there is one")


def run(arguments: argparse.Namespace) -> int:
    """Train, write the heads, print the curve; 0 if every step was done or the time was up."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers are the parallelism
    names = ("steps", "width", "query_in", "learning_rate", "weight_decay", "warmup", "decay", "smoothing", "clip",
             "seed", "eval_every", "eval_examples", "eval_fraction")  # fmt: skip
    training = HeadTraining(betas=tuple(arguments.betas), **{name: getattr(arguments, name) for name in names})
    device = pick_device(arguments.device)
    dtype = pick_dtype(arguments.dtype, device)
    examples = _examples(arguments, load_tokenizer(arguments.model))
    model = load_model(arguments.model, device=device, dtype=dtype, adapter=arguments.adapter)
    with stopper(arguments.minutes) as stop:
        trained = train_heads(
            model,
            examples,
            training,
            arguments.out,
            resume=arguments.resume,
            save_every=arguments.save_every,
            workers=arguments.workers if arguments.workers is not None else 4 if device.type == "cuda" else 0,
            about=_about(arguments, dtype),
            stop=stop,
            on_progress=_Line(),
        )
    written = write_report(trained, arguments.out, dtype=DTYPES[arguments.save_dtype])
    print(_describe(trained, training))
    print("\nWritten: " + ", ".join(str(path) for path in written))
    if len(written) == 3:
        print("matplotlib is needed for the curve's picture; pip install 'apb[viz]'", file=sys.stderr)
    if trained.stopped:
        print(
            f"{trained.stopped} after {trained.step} of {training.steps} steps; the state is saved in {arguments.out}. "
            f"To go on, give the same command, without --no-resume",
            file=sys.stderr,
        )
    return {"interrupted": 130, "terminated": 143}.get(trained.stopped or "", 0)


def _examples(arguments: argparse.Namespace, tokenizer: Any) -> Examples:
    if arguments.data != ["generated"]:
        if "generated" in arguments.data:
            raise ValueError(f"data: expected 'generated' or text files, got both: {' '.join(arguments.data)}")
        if arguments.tasks or arguments.haystack:
            raise ValueError("data: --tasks and --haystack are of generated pairs, got text files; leave one out")
        return TextExamples(
            tokenizer,
            arguments.data,
            lengths=arguments.lengths,
            seed=arguments.seed,
            query_tokens=arguments.query_tokens,
            answer_tokens=arguments.answer_tokens,
        )
    tasks = arguments.tasks or [*_TASKS, *(_TEXT_TASKS if arguments.haystack else ())]
    if unknown := [task for task in tasks if task not in TASKS]:
        raise ValueError(f"tasks: expected some of {', '.join(TASKS)}, got {', '.join(unknown)}")
    sources = Sources(split="training", haystack=arguments.haystack)
    examples = GeneratedExamples(
        tokenizer=tokenizer, tasks=tasks, lengths=arguments.lengths, seed=arguments.seed, sources=sources
    )
    for task in tasks:  # what cannot be written is said before the model is loaded
        make_sample(task, tokenizer, length=min(arguments.lengths), seed=0, sources=sources)
    return examples


def _about(arguments: argparse.Namespace, dtype: torch.dtype) -> dict[str, str]:
    """Say what the heads are trained for; the adapter by what is in its file, since a run must not change it."""
    about = {"base_model": _name(arguments.model), "adapter": "none", "dtype": str(dtype).removeprefix("torch.")}
    if arguments.adapter:
        about["adapter"] = _name(arguments.adapter)
        weights = check_adapter(arguments.adapter) / "adapter_model.safetensors"
        if weights.is_file():  # PEFT can also read its older format
            about["adapter_sha256"] = fingerprint(weights)
    return about


class _Line:
    """One line that is redrawn on a terminal; elsewhere a line every tenth of the run, or minute if that is sooner."""

    def __init__(self) -> None:
        self.terminal, self.tenth, self.time = sys.stderr.isatty(), -1, 0.0

    def __call__(self, now: HeadProgress) -> None:
        tenth, first = 10 * now.step // now.steps, self.tenth < 0
        if not self.terminal and tenth == self.tenth and time.monotonic() - self.time < 60:
            return
        again = "\x1b[1A\x1b[2K" if self.terminal and not first else ""  # up one line, and clear it
        self.tenth, self.time = tenth, time.monotonic()
        left = f"{int(now.seconds_left) // 60}:{int(now.seconds_left) % 60:02d}"
        print(f"{again}  step {now.step}/{now.steps}  loss {now.loss:.4f}  overlap {now.overlap:.1%}  "
              f"{now.tokens_per_s:,.0f} tokens/s  {left} left", file=sys.stderr, flush=True)  # fmt: skip


def _describe(trained: TrainedHeads, training: HeadTraining) -> str:
    curve = trained.curve
    rows = [(p.step, f"{p.overlap:.1%}", f"{p.loss:.4f}", f"{p.seconds:.0f}") for p in curve.points]
    return "\n".join(
        (
            table(("step", "overlap", "loss", "seconds"), rows),
            "",
            f"Overlap of the top {curve.fraction:.0%} by score with the top {curve.fraction:.0%} by label, "
            f"{training.eval_examples} held-out examples.",
            f"Query-aware scores, training free: {curve.query_aware:.1%}. Random scores: {curve.fraction:.1%}.",
        )
    )


def _name(place: str | Path) -> str:
    """Return a directory's own name, so that a run can be moved; a hub id as it is."""
    return Path(place).resolve().name if Path(place).is_dir() else str(place)


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected numbers joined by commas, such as 1024,2048, got {text!r}"
        ) from None


def _names(text: str) -> list[str]:
    return text.split(",")
