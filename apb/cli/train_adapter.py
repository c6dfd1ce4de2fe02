"""Teach a small model long-context tasks with a LoRA adapter, so that exact attention can do them."""

import argparse
import os
import sys
from pathlib import Path

import torch

from apb.cli.table import table
from apb.device import pick_device
from apb.evals import Sources, make_sample
from apb.models import load_model, load_tokenizer
from apb.train.adapter import AdapterTraining, train_adapter
from apb.train.stop import stopper

__all__ = ["add_arguments", "run"]

_TASKS = (
    "niah_single_1",
    "niah_single_2",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multivalue",
    "niah_multiquery",
    "vt",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("--model", required=True, help="a local directory, a hub id, or SmolLM2-135M-Instruct")
    parser.add_argument("--out", required=True, type=Path, help="directory of the adapter, in PEFT's format")
    parser.add_argument("--tasks", nargs="+", default=list(_TASKS), help=f"default: {' '.join(_TASKS)}")
    parser.add_argument("--length", nargs="+", type=int, default=[1024, 2048, 4096], help="tokens of the documents")
    parser.add_argument("--haystack", type=Path, help="a text file, for tasks that hide facts in a text")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--minutes", type=float, help="stop by then at the latest")
    parser.add_argument("--batch-tokens", type=int, default=32_768, help="document tokens a step and rank")
    parser.add_argument("--turns", type=int, default=4, help="most questions a document")
    parser.add_argument("--rank", type=int, default=16, help="of the update")
    parser.add_argument("--alpha", type=int, default=32, help="the update is multiplied by alpha / rank")
    parser.add_argument("--lr", type=float, default=1e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of the data")
    parser.add_argument("--workers", type=int, default=4, help="processes that write documents")
    parser.add_argument("--device", default="auto")


def run(arguments: argparse.Namespace) -> int:
    """Train, and print the curve. Under torchrun all ranks share the work."""
    names = ("steps", "minutes", "batch_tokens", "turns", "rank", "alpha", "lr", "seed")
    training = AdapterTraining(
        tasks=tuple(arguments.tasks),
        lengths=tuple(arguments.length),
        **{name: getattr(arguments, name) for name in names},
    )
    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        raise ValueError(f"--out: expected a new or empty directory, got {arguments.out}; nothing is overwritten")
    rank, local = int(os.environ.get("RANK", 0)), f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device = pick_device(local if arguments.device == "auto" and torch.cuda.is_available() else arguments.device)
    if "RANK" in os.environ:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    sources = Sources(haystack=arguments.haystack, split="training")
    tokenizer = load_tokenizer(arguments.model)
    for task in training.tasks:  # what cannot be written is said before the model is loaded
        for length in training.lengths:
            make_sample(task, tokenizer, length=length, seed=0, sources=sources)
    model = load_model(arguments.model, device=device, dtype=torch.float32)

    def log(point: dict[str, float]) -> None:
        print(
            f"step {point['step']:.0f}/{training.steps}  loss {point['loss']:.4f}  right {point['right']:.1%}  "
            f"{point['seconds']:.0f} s",
            file=sys.stderr,
            flush=True,
        )

    with stopper(None) as stop:
        trained = train_adapter(
            model,
            tokenizer,
            arguments.out,
            training,
            sources,
            base_model=Path(arguments.model).name,
            workers=arguments.workers,
            stop=stop,
            on_log=log,
        )
    if rank == 0:
        shown = trained.curve[:: max(1, len(trained.curve) // 10)]
        print(table(("step", "loss", "right"), [(p["step"], f"{p['loss']:.4f}", f"{p['right']:.1%}") for p in shown]))
        why = f" ({trained.stopped} before step {training.steps})" if trained.stopped else ""
        print(f"The adapter is in {arguments.out}{why}.")
    if "RANK" in os.environ:
        torch.distributed.destroy_process_group()
    return {"interrupted": 130, "terminated": 143}.get(trained.stopped or "", 0)
