"""The command line: one file a command, each with `add_arguments(parser)` and `run(arguments) → exit status`."""

import argparse
import os
import sys
from collections.abc import Sequence

from apb.cli import bench, compare, demo, doctor, generate, plan, train_adapter, train_heads
from apb.cli import eval as evaluation

__all__ = ["main"]

_COMMANDS = {
    "plan": plan,
    "generate": generate,
    "compare": compare,
    "eval": evaluation,
    "demo": demo,
    "doctor": doctor,
    "bench": bench,
    "train-adapter": train_adapter,
    "train-heads": train_heads,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse `argv` (default: the process's own) and run the command; 0 is success, 2 bad input, 1 a failure."""
    parser = argparse.ArgumentParser(prog="apb", description="Sequence-parallel approximate attention.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in _COMMANDS.items():
        summary = (module.__doc__ or "").strip().splitlines()[0]
        module.add_arguments(commands.add_parser(name, help=summary, description=summary))
    arguments = parser.parse_args(argv)
    try:
        return _COMMANDS[arguments.command].run(arguments)
    except KeyboardInterrupt:
        print(f"apb {arguments.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError) as error:
        print(f"apb {arguments.command}: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"apb {arguments.command}: {error}", file=sys.stderr)
        return 1
