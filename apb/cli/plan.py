"""Show how a document would be split, what each host would compute and send, and draw it."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import get_args

from apb.cli.table import table
from apb.costs import LLAMA_3_1_8B, host_cost
from apb.masks import mask_grid, masks_picture, masks_text, shrink
from apb.methods import METHODS, make_method
from apb.plan import Layout, QueryIn, plan_context
from apb.viz import picture, text_strip

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("--tokens", type=int, required=True, help="document tokens")
    parser.add_argument("--hosts", type=int, required=True)
    parser.add_argument("--method", metavar="NAME[:SETTING=VALUE,…]",
                        help=f"show the plan of a method: {', '.join(METHODS)}")  # fmt: skip
    parser.add_argument("--anchor", type=int, help="document tokens in the anchor (default: 0, or the method's)")
    parser.add_argument("--passing", type=int, help="tokens each block passes on (default: 0, or the method's)")
    parser.add_argument("--query-tokens", type=int, default=0, help="tokens of the question")
    parser.add_argument("--query-offset", type=int, default=0, help="document tokens before the question in the anchor")
    parser.add_argument("--query-in", choices=get_args(QueryIn), help="default: anchor, or the method's")
    parser.add_argument(
        "--anchor-on-first", action="store_true", help="host 0 runs the anchor too, as query-aware compressors need"
    )
    parser.add_argument("--layout", choices=get_args(Layout), help="default: contiguous, or the method's")
    parser.add_argument("--picture", type=Path, help="write a picture here (.svg, .png or .pdf)")
    parser.add_argument("--json", action="store_true", help="print JSON instead")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan and its costs for one layer of Llama-3.1-8B's shape."""
    asked = {"tokens": arguments.tokens, "hosts": arguments.hosts, "query": arguments.query_tokens,
             "query_offset": arguments.query_offset}  # fmt: skip
    names = ("anchor", "passing", "query_in", "layout")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if arguments.method is None:
        method, grids = None, {}
        plan = plan_context(**asked, **given, anchor_on_first=arguments.anchor_on_first)
        costs = [host_cost(plan, rank, LLAMA_3_1_8B) for rank in range(plan.hosts)]
    else:
        if arguments.anchor_on_first:
            raise ValueError("anchor-on-first: the method decides it; leave it out, or leave out --method")
        method = make_method(arguments.method, **given)
        plan = method.plan(**asked)
        costs = [method.cost(plan, rank, LLAMA_3_1_8B) for rank in range(plan.hosts)]
        grids = {arguments.method: mask_grid(method, plan, {}, cells=144)}
    if arguments.picture:
        masks_picture(grids, arguments.picture) if method else picture(plan, arguments.picture)
    if arguments.json:
        blocks = [asdict(block) for block in plan.blocks]
        print(json.dumps({"plan": asdict(plan), "blocks": blocks, "costs": [asdict(cost) for cost in costs]}, indent=2))
    else:
        print(plan, end="\n\n")
        small = {name: shrink(grid) for name, grid in grids.items()}
        legend = "Down: document tokens that attend; across: tokens seen (what is chosen by the text is not drawn)."
        print(f"{masks_text(small)}\n{legend}" if method else text_strip(plan), end="\n\n")
        print("One layer of Llama-3.1-8B's shape, bf16:")
        rows = [
            (
                rank,
                f"{cost.rows:,}",
                f"{cost.pairs:,}",
                f"{cost.attention_flops / 1e12:.2f}",
                f"{cost.linear_flops / 1e12:.2f}",
                f"{cost.sent_bytes / 1e6:.1f}",
                f"{cost.cache_bytes / 1e6:.1f}",
            )
            for rank, cost in enumerate(costs)
        ]
        print(table(("host", "rows", "pairs", "attention TFLOP", "linear TFLOP", "sent MB", "cache MB"), rows))
        if method and method.one_host and not method.exact:
            print("Pairs: at most; what is computed depends on the text, and apb compare measures it.")
        if arguments.picture:
            print(f"Picture: {arguments.picture}")
    return 0
