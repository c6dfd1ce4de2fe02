"""Time calls on a GPU, one table and one set of ledger rows a run, every peer beside us and the ceiling above.

    bench = Bench("merge")                                    # refuses to run without a GPU, prints the device
    bench.measure("2 × 16384 rows", "triton", call, moved=bytes_)
    bench.measure("2 × 16384 rows", "eager", peer, moved=bytes_)
    bench.finish(out)                                         # appends bench.rows to the ledger

Compare figures of one run only: clocks and boards differ by more than kernels do.
"""

import math
import statistics
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch

from apb.bench import Row, append, environment, reason

__all__ = ["Bench", "Timing", "time_call"]

_MATMUL = 8192
_COPY_BYTES = 2**31


class Timing(NamedTuple):
    """Median of a call's time, and the times between which eight of ten repeats fell, in milliseconds."""

    ms: float
    low_ms: float
    high_ms: float


def time_call(call: Callable[[], object], *, graph: bool = False, repeats_ms: float = 300) -> Timing:
    """Time a call on the GPU, warmed up, with L2 flushed before each repeat.

    Args:
        call: what to time; it must not synchronise.
        graph: replay it from a CUDA graph, so that a short call is not timed by how fast Python launches it.
        repeats_ms: how long to repeat it for.
    """
    from triton.testing import do_bench

    if graph:
        call = _captured(call)
    times = do_bench(call, warmup=100, rep=repeats_ms, return_mode="all")
    cuts = statistics.quantiles(times, n=10) if len(times) > 1 else [times[0]] * 9
    return Timing(statistics.median(times), cuts[0], cuts[-1])


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
        a, b = (torch.randn(_MATMUL, _MATMUL, dtype=torch.bfloat16, device="cuda") for _ in "ab")
        flop = 2 * _MATMUL**3
        timing = time_call(lambda: a @ b)
        self._note(f"matmul {_MATMUL}", "cublas", timing, flop=flop)
        return flop / timing.ms / 1e9

    @cached_property
    def gbytes_ceiling(self) -> float:
        """Measured GB/s of a large copy on the device, reads and writes counted: the practical ceiling of memory."""
        source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        timing = time_call(lambda: target.copy_(source))
        self._note("copy of 2 GiB", "cuda", timing, moved=2 * _COPY_BYTES)
        return 2 * _COPY_BYTES / timing.ms / 1e6

    def measure(
        self,
        case: str,
        backend: str,
        call: Callable[[], object],
        *,
        flop: float = math.nan,
        moved: float = math.nan,
        graph: bool = False,
        notes: str = "",
    ) -> float:
        """Time one call, print its line, keep its row; a call that fails is a result, not the end of the run.

        Args:
            case: the input, such as its lengths.
            backend: who computes.
            call: what to time; called several times.
            flop: useful operations of one call; its rate is set against a large matmul's.
            moved: bytes that one call must read and write; its rate is set against a large copy's.
            graph: as in `time_call`.
            notes: kept in the ledger.

        Returns:
            The median, in milliseconds; NaN if the call failed.
        """
        ceiling = self.tflops_ceiling if math.isfinite(flop) else math.nan
        ceiling = self.gbytes_ceiling if math.isfinite(moved) else ceiling
        try:
            timing = time_call(call, graph=graph)
        except Exception as error:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()  # raises if the device itself has failed: nothing more can be measured then
            self._note(case, backend, Timing(math.nan, math.nan, math.nan), notes=reason(error))
            return math.nan
        self._note(case, backend, timing, flop=flop, moved=moved, ceiling=ceiling, notes=notes)
        return timing.ms

    def finish(self, out: Path | None) -> list[Row]:
        """Append the rows to a ledger, unless `out` is None, and return them."""
        if out is not None:
            append(out, self.rows)
        return self.rows

    def _note(
        self,
        case: str,
        backend: str,
        timing: Timing,
        *,
        flop: float = math.nan,
        moved: float = math.nan,
        ceiling: float = math.nan,
        notes: str = "",
    ) -> None:
        tflops, gbytes = flop / timing.ms / 1e9, moved / timing.ms / 1e6
        rate, unit = (tflops, "TFLOP/s") if math.isfinite(tflops) else (gbytes, "GB/s")
        shown = f"{rate:.0f} {unit}" if math.isfinite(rate) else ""
        share = f"{rate / ceiling:.0%}" if math.isfinite(rate / ceiling) else ""
        spread = f"{timing.low_ms:.4g} – {timing.high_ms:.4g}" if math.isfinite(timing.low_ms) else ""
        print(f"{case:>32} {backend:>16} {timing.ms:9.4g} {spread:>15} {shown:>12} {share:>10}  {notes}", flush=True)
        self.rows.append(
            Row(
                **self._environment,
                benchmark=self.benchmark,
                case=case,
                backend=backend,
                **timing._asdict(),
                tflops=tflops,
                gbytes=gbytes,
                notes=notes,
            )
        )
