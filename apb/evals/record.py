"""One answer and what it is worth: the unit that an evaluation stores, resumes from and reports."""

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any

__all__ = ["FULL", "Key", "Record"]

FULL = "flash"
"""Full attention on one host: the method that every other is held against."""

_KINDS: dict[str, Any] = {
    **dict.fromkeys(("model", "method", "task", "prediction"), str),
    **dict.fromkeys(("hosts", "length", "seed"), int),
    **dict.fromkeys(("score", "nll"), (int, float)),
    "references": list,
}

Key = tuple[str, str, int, int, str, int]
"""Model, method, hosts, length, task and seed: what tells one record from another."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One question, answered by one method.

    Attributes:
        model: its directory or name.
        method: its text, such as "apb:compressor=random"; "flash" is full attention.
        hosts: H; 1 for methods of one host.
        length: tokens in all, document and question and answer.
        task: its name.
        seed: of the sample; the same seed is the same question for every method.
        score: in [0, 1].
        nll: mean negative log-likelihood of the right answer's tokens, in nats.
        prediction: what was answered.
        references: what was looked for in it.
    """

    model: str
    method: str
    hosts: int
    length: int
    task: str
    seed: int
    score: float
    nll: float
    prediction: str
    references: tuple[str, ...]

    @property
    def key(self) -> Key:
        """What tells this record from others."""
        return self.model, self.method, self.hosts, self.length, self.task, self.seed

    def to_line(self) -> str:
        """Return the record as a line of JSON, without the line's end; a likelihood that is no number is null."""
        values = asdict(self) | {"nll": self.nll if math.isfinite(self.nll) else None}
        return json.dumps(values, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_line(cls, line: str) -> "Record":
        """Read what `to_line` wrote.

        Raises:
            ValueError: it is no record; says what is missing or unknown.
        """
        values: Any = json.loads(line)
        names = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or values.keys() != names:
            got = sorted(values) if isinstance(values, dict) else type(values).__name__
            raise ValueError(f"record: expected the fields {', '.join(sorted(names))}, got {got}")
        nll = math.nan if values["nll"] is None else values["nll"]
        for name, kind in _KINDS.items():
            value = nll if name == "nll" else values[name]
            if isinstance(value, bool) or not isinstance(value, kind):
                raise ValueError(f"record: {name} is {value!r}, a {type(value).__name__}")
        return cls(**values | {"nll": nll, "references": tuple(values["references"])})
