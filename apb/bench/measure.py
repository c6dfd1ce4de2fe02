"""Time calls on a GPU, one table and one set of ledger rows a run, every peer beside us and the ceiling above.

    bench = Bench("merge")                                    # refuses to run without a GPU, prints the device
    bench.compare("2 × 16384 rows", {"triton": call, "eager": peer}, moved=bytes_)
    bench.finish(out)                                         # appends bench.rows to the ledger

Compare figures of one case only: clocks follow heat and power, by more than kernels differ. Whoever computes the same
case is therefore timed in turns.
"""

import math
import statistics
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from apb.bench import Row, append, environment, reason

__all__ = ["Bench", "Timing", "time_in_turns"]

_ROUNDS = 5
_LEAST = 3  # repeats a round
_WARM = 2  # at least, before them: the first are at the clocks that another's power has left
_MATMUL = 8192
_LARGE_BYTES = 2**31
_FLUSH_BYTES = 2**28  # several times the L2 of any GPU
_FLUSH_MS = 0.1  # about


class Timing(NamedTuple):
    """Median of a call's time, and the times between which eight of ten repeats fell, in milliseconds."""

    ms: float
    low_ms: float
    high_ms: float

    @classmethod
    def of(cls, times: Sequence[float]) -> "Timing":
        """Sum up repeats.

        >>> Timing.of([3.0, 1.0, 2.0, 1.0, 3.0])
        Timing(ms=2.0, low_ms=1.0, high_ms=3.0)
        """
        if len(times) == 1:
            return cls(times[0], times[0], times[0])
        cuts = statistics.quantiles(times, n=10, method="inclusive")
        return cls(statistics.median(times), cuts[0], cuts[-1])


def time_in_turns(
    calls: Mapping[str, Callable[[], object]], *, graph: Collection[str] = (), repeats_ms: float = 300
) -> dict[str, Timing | str]:
    """Time calls on the GPU in rounds, such that heat and power, which change its clocks, are alike for all of them.

    Each is first called once, which compiles it. Then, in each of five rounds, it is warmed up and repeated, with L2
    flushed before each repeat. Of three calls or more, none comes right behind the same one in most rounds, or all of
    its times would be at the clocks which that one leaves.

    Args:
        calls: what to time, by name; they must not synchronise. What they hold on to has to fit into memory together.
        graph: names of those to replay from a CUDA graph, so that a short call is not timed by how fast Python launches
            it; `calls` itself for all.
        repeats_ms: how long to repeat each one for, with the flushing, all rounds together; but three times a round.

    Returns:
        Over all rounds, each one's time; of a call that failed, why. It has no part in later rounds.
    """
    found: dict[str, Timing | str] = {}
    ready: dict[str, tuple[Callable[[], object], int]] = {}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():
        with _noting(found, name):
            ready[name] = _prepare(call, name in graph, repeats_ms / _ROUNDS)
    for order in _orders(list(ready)):
        for name in order:
            if name not in found:
                with _noting(found, name):
                    call, repeats = ready[name]
                    times[name] += _event_ms(call, repeats, warm=max(_WARM, repeats // 3))
    return {name: found[name] if name in found else Timing.of(times[name]) for name in calls}


def _orders(names: Sequence[str]) -> Iterator[list[str]]:
    """Yield each round's order.

    In 0, n − 1, 1, n − 2, … no two neighbours are the same step apart modulo n, if n is even; if it is odd, two are, so
    every other round goes backward. Each round stands one further on (E. J. Williams' design of 1949).

    >>> [" ".join(order) for order in _orders("abcd")]
    ['a d b c', 'b a c d', 'c b d a', 'd c a b', 'a d b c']
    """
    n = len(names)
    places = [n - 1 - i // 2 if i % 2 else i // 2 for i in range(n)]
    for turn in range(_ROUNDS):
        order = [names[(place + turn) % n] for place in places]
        yield order[::-1] if n % 2 and turn % 2 else order


@contextmanager
def _noting(found: dict[str, Timing | str], name: str) -> Generator[None]:
    """Note why a call fails: that is a result, not the end of the run."""
    try:
        yield
    except Exception as error:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # raises if the device itself has failed: nothing more can be measured then
        found[name] = reason(error)


def _prepare(call: Callable[[], object], graph: bool, repeats_ms: float) -> tuple[Callable[[], object], int]:
    """Call for the first time; return what to repeat, and how often it fits into a round."""
    if graph:
        call = _captured(call)
    call()
    estimate = statistics.median(_event_ms(call, 3))
    return call, max(_LEAST, round(repeats_ms / (_FLUSH_MS + estimate)))


def _event_ms(call: Callable[[], object], repeats: int, *, warm: int = 0) -> list[float]:
    """Time repeats by events on the GPU, after others that are not timed."""
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in "se"] for _ in range(repeats)]
    for _ in range(warm):
        call()
    for start, end in events:
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def _captured(call: Callable[[], object]) -> Callable[[], object]:
    """Return the replay of a CUDA graph of `call`, whose memory the graph keeps."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


class _Most(NamedTuple):
    """A call that does as much as a GPU can: what, by whom, and its operations or bytes."""

    case: str
    backend: str
    call: Callable[[], object]
    work: float


def _products() -> list[_Most]:
    a, b = (torch.randn(_MATMUL, _MATMUL, dtype=torch.bfloat16, device="cuda") for _ in "ab")
    return [_Most(f"matmul {_MATMUL}", "cublas", lambda: a @ b, 2 * _MATMUL**3)]


def _copies() -> list[_Most]:
    source = torch.zeros(_LARGE_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    copy = _Most("copy of 2 GiB", "cuda", lambda: target.copy_(source), 2 * _LARGE_BYTES)
    return [copy, _Most("sum of 2 GiB", "cuda", source.sum, _LARGE_BYTES)]


class Bench:
    """One run of one benchmark: measures, prints a line for each measurement, and collects the ledger's rows.

    Args:
        benchmark: its name in the ledger.

    Raises:
        RuntimeError: there is no CUDA device.
    """

    def __init__(self, benchmark: str) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError(f"{benchmark}: needs a CUDA device; these kernels' times mean nothing on a CPU")
        self.benchmark = benchmark
        self.rows: list[Row] = []
        self._environment = environment()
        env = self._environment
        print(f"{benchmark}: {env['device']}, torch {env['torch']}, triton {env['triton']}, commit {env['commit']}")
        print(f"{'case':>32} {'by':>16} {'ms':>9} {'80 % within':>15} {'rate':>12} {'of ceiling':>10}", flush=True)

    @cached_property
    def tflops_ceiling(self) -> float:
        """Measured TFLOP/s of a large square bf16 matrix product: the practical ceiling of arithmetic."""
        return self._measure_ceiling("flop")

    @cached_property
    def gbytes_ceiling(self) -> float:
        """Measured GB/s of a large copy, reads and writes counted, or of a large sum, which only reads.

        The greater one is the practical ceiling of memory.
        """
        return self._measure_ceiling("moved")

    def compare(
        self,
        case: str,
        calls: Mapping[str, Callable[[], object]],
        *,
        flop: float = math.nan,
        moved: float = math.nan,
        graph: Collection[str] = (),
        notes: str = "",
    ) -> None:
        """Time calls that do the same in turns, print a line and keep a row of each, also of those that fail.

        Args:
            case: the input, such as its lengths.
            calls: what to time, by who computes.
            flop: useful operations of one call; its rate is set against a large matmul's.
            moved: bytes that one call must read and write; its rate is set against a large copy's or sum's.
            graph: as in `time_in_turns`.
            notes: kept in the ledger.
        """
        ceiling = self.tflops_ceiling if math.isfinite(flop) else math.nan
        ceiling = self.gbytes_ceiling if math.isfinite(moved) else ceiling
        for backend, timing in time_in_turns(calls, graph=graph).items():
            self._note(case, backend, timing, flop=flop, moved=moved, ceiling=ceiling, notes=notes)

    def finish(self, out: Path | None) -> list[Row]:
        """Measure the ceilings again, append the rows to a ledger, unless `out` is None, and return them."""
        for kind, name in (("flop", "tflops_ceiling"), ("moved", "gbytes_ceiling")):
            if name in vars(self):
                self._measure_ceiling(kind, ", at the end", getattr(self, name))
        if out is not None:
            append(out, self.rows)
        return self.rows

    def _measure_ceiling(self, kind: Literal["flop", "moved"], when: str = "", ceiling: float = math.nan) -> float:
        """Return the greatest rate, having noted all of them."""
        rates = []
        for most in _products() if kind == "flop" else _copies():
            timing = time_in_turns({most.backend: most.call})[most.backend]
            row = self._note(most.case + when, most.backend, timing, **{kind: most.work}, ceiling=ceiling)
            rates.append(row.tflops if kind == "flop" else row.gbytes)
        return max(filter(math.isfinite, rates), default=math.nan)

    def _note(
        self,
        case: str,
        backend: str,
        timing: Timing | str,
        *,
        flop: float = math.nan,
        moved: float = math.nan,
        ceiling: float = math.nan,
        notes: str = "",
    ) -> Row:
        if isinstance(timing, str):
            timing, notes = Timing(math.nan, math.nan, math.nan), timing
        tflops, gbytes = flop / timing.ms / 1e9, moved / timing.ms / 1e6
        rate, unit = (tflops, "TFLOP/s") if math.isfinite(tflops) else (gbytes, "GB/s")
        shown = f"{rate:.0f} {unit}" if math.isfinite(rate) else ""
        share = f"{rate / ceiling:.0%}" if math.isfinite(rate / ceiling) else ""
        spread = f"{timing.low_ms:.4g} – {timing.high_ms:.4g}" if math.isfinite(timing.low_ms) else ""
        print(f"{case:>32} {backend:>16} {timing.ms:9.4g} {spread:>15} {shown:>12} {share:>10}  {notes}", flush=True)
        row = Row(
            **self._environment,
            benchmark=self.benchmark,
            case=case,
            backend=backend,
            **timing._asdict(),
            tflops=tflops,
            gbytes=gbytes,
            notes=notes,
        )
        self.rows.append(row)
        return row
