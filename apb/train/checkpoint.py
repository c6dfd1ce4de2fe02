"""A run on disk, so that it can be interrupted: written whole or not at all, resumed with the same settings only."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from apb.files import write_whole

__all__ = ["STATE_FILE", "check_same_run", "load_state", "save_state"]

STATE_FILE = "state.pt"


def save_state(out: Path, state: Mapping[str, Any]) -> None:
    """Write the state of a run: tensors, numbers, strings, lists and dictionaries.

    Examples are functions of seed and step and nothing else is drawn after the start, so no generator's state is
    among it.
    """
    write_whole(out / STATE_FILE, lambda part: torch.save(dict(state), part))


def load_state(out: Path) -> dict[str, Any] | None:
    """Read what `save_state` wrote, or None if there is nothing.

    Raises:
        ValueError: the file is no state of a run.
    """
    path = out / STATE_FILE
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not {"facts", "step", "heads", "optimizer", "curve", "seconds"} <= state.keys():
            raise ValueError("it holds something else")
    except Exception as error:  # a damaged file raises anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"out: {path} cannot be read as the state of a run ({reason}); remove it, or give another directory"
        ) from error
    return state


def check_same_run(saved: Mapping[str, str], now: Mapping[str, str], out: Path) -> None:
    """Refuse to go on with other settings than a run began with.

    Raises:
        ValueError: naming each setting, what it was and what came.
    """
    changed = [
        f"{name}: expected {saved.get(name, 'nothing')}, got {now.get(name, 'nothing')}"
        for name in [*now, *(name for name in saved if name not in now)]
        if saved.get(name) != now.get(name)
    ]
    if changed:
        raise ValueError(
            f"{'; '.join(changed)}. The run in {out} began with the former and can only be resumed so; give its "
            f"settings, or another directory, or start over with --no-resume"
        )
