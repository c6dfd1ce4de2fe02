"""Planted bugs of the benchmarks: of ledgers and tables, of the whole prefill's engine, of traces."""

from apb.testing.bugs import Bug

__all__ = ["BENCH_BUGS"]

BENCH_BUGS = (
    # Ledgers, tables and their pictures.
    Bug(
        name="a ledger's line that lost its last cells is read as if they were empty",
        file="bench/__init__.py",
        old="    if len(cells) != len(columns):\n",
        new="    cells = [*cells, *[''] * (len(columns) - len(cells))][: len(columns)]\n    if not columns:\n",
        tests="tests/test_bench_prefill_table.py -k broken",
    ),
    Bug(
        name="what failed last time counts as done",
        file="bench/prefill/store.py",
        old="if row.device == device and not failed(row)",
        new="if row.device == device",
        tests="tests/test_bench_prefill_table.py -k done",
    ),
    Bug(
        name="methods of one host missing beside the others",
        file="bench/prefill/table.py",
        old="if row.method not in several or row.hosts == hosts",
        new="if row.hosts == hosts",
        tests="tests/test_bench_prefill_table.py -k by_hosts",
    ),
    Bug(
        name="speed-ups upside down",
        file="bench/prefill/table.py",
        old="flash.ttft_ms / row.ttft_ms",
        new="row.ttft_ms / flash.ttft_ms",
        tests="tests/test_bench_prefill_table.py -k figures",
    ),
    Bug(
        name="a resumed run that measures what is there",
        file="cli/bench_prefill.py",
        old="set() if arguments.again else wanted & done(rows, here)",
        new="set()",
        tests="tests/test_cli_bench_prefill.py -k goes_on",
    ),
    # Calls that are timed in turns.
    Bug(
        name="the same call begins every round",
        file="bench/measure.py",
        old="order.rotate(-1)",
        new="order.rotate(0)",
        tests="tests/test_bench.py -k each_round",
    ),
    Bug(
        name="one call after the other, as clocks go down",
        file="bench/measure.py",
        old="    for _ in range(_ROUNDS):\n        for name in order:\n",
        new="    for name in list(order):\n        for _ in range(_ROUNDS):\n",
        tests="tests/test_bench.py -k drift",
    ),
    Bug(
        name="a call that failed is tried in every round",
        file="bench/measure.py",
        old="            if name not in found:\n",
        new="            if name:\n",
        tests="tests/test_bench.py -k later_rounds",
    ),
    Bug(
        name="a layer compared with another one than the next",
        file="bench/hosts.py",
        old="zip(layers, alone, strict=True)",
        new="zip(sorted(layers), sorted(alone), strict=True)",
        tests="tests/test_bench_overlap.py -k next_to_it",
    ),
    Bug(
        name="waiting for messages that counts where something else runs",
        file="bench/hosts.py",
        old="ms * (1 - hidden(spans))",
        new="ms * hidden(spans)",
        tests="tests/test_bench_overlap.py -k traces_tell",
    ),
    # The engine of `apb bench prefill`.
    Bug(
        name="hosts started anew for every case",
        file="bench/prefill/run.py",
        old="jobs=tuple(left)",
        new="jobs=(left[0],)",
        tests="tests/test_bench_started.py -k started_once",
    ),
    Bug(
        name="a host that died taken for a case that failed",
        file="bench/prefill/measured.py",
        old='host.all_gather_object(None, what="failure")',
        new="pass",
        tests="tests/test_bench_started.py -k ends_its_hosts",
    ),
    Bug(
        name="a question that stands where the document begins",
        file="bench/prefill/share.py",
        old="start = self.plan.next_position",
        new="start = 0",
        tests="tests/test_bench_prefill_layer.py -k 'plain_decoder and ring'",
    ),
    Bug(
        name="the fastest host is the layer",
        file="bench/prefill/simulated.py",
        old='slowest = max(layers, key=lambda phases: phases["layer"])',
        new='slowest = min(layers, key=lambda phases: phases["layer"])',
        tests="tests/test_bench_prefill.py -k slowest_host",
    ),
    Bug(
        name="messages that cost bytes and no latency",
        file="bench/prefill/link.py",
        old="return messages * self.latency_ms + received_bytes",
        new="return received_bytes",
        tests="tests/test_bench_prefill.py -k 'simulated_messages and ulysses'",
    ),
    Bug(
        name="a lone host that computes with zeros",
        file="parallel/lone.py",
        old="else torch.randn(shape, **options)",
        new="else torch.zeros(shape, dtype=dtype, device=self.device)",
        tests="tests/test_lone_host.py -k zeros",
    ),
    Bug(
        name="a lone host that takes its own padding for what others bring",
        file="parallel/lone.py",
        old="parts[rank] if rank == self.rank else",
        new="parts[self.rank] if self.rank in parts and parts[self.rank].shape == shape else",
        tests="tests/test_lone_host.py -k zeros",
    ),
    Bug(
        name="a preset that forgets its compressor where a setting is given",
        file="bench/prefill/methods.py",
        old="backend=backend, **settings.get(name, {})),",
        new="backend=backend, **settings.get(label, {})),",
        tests="tests/test_bench_prefill_layer.py -k settings_leave",
    ),
    Bug(
        name="one backend's row taken for another's",
        file="bench/prefill/store.py",
        old="return Key(*(getattr(row, name) for name in Key._fields))",
        new='return Key(*(getattr(row, name) for name in Key._fields))._replace(backend="sdpa")',
        tests="tests/test_bench_prefill.py -k known_by_backend",
    ),
    Bug(
        name="rows compiled as a fixed number first",
        file="bench/prefill/layer.py",
        old="            if dim is not None:\n",
        new="            if dim is None:\n",
        tests="tests/test_bench_prefill_layer.py -k compiled_once",
    ),
    Bug(
        name="a host's peak without its caches",
        file="bench/prefill/memory.py",
        old="+ shape.layers * cache_bytes(plan, rank, shape)",
        new="",
        tests="tests/test_bench_prefill_layer.py -k 'formula_of_the_peak and flash'",
    ),
    # Traces, and how much is hidden.
    Bug(
        name="a gather that hides under itself",
        file="bench/trace.py",
        old='for span in spans if span.kind != "gather")',
        new="for span in spans)",
        tests="tests/test_bench_overlap.py -k hidden_counts",
    ),
    Bug(
        name="a long kernel cut short by one that ran beside it",
        file="bench/trace.py",
        old="max(stop, joined[-1][1])",
        new="stop",
        tests="tests/test_bench_overlap.py -k unions",
    ),
    Bug(
        name="the profiler's warm-up counted",
        file="bench/trace.py",
        old='float(event["ts"]) >= began]',
        new='float(event["ts"]) >= 0]',
        tests="tests/test_bench_overlap.py -k last_step",
    ),
    Bug(
        name="the quickest host's time taken for the group's",
        file="bench/hosts.py",
        old="max(repeat) for repeat in",
        new="min(repeat) for repeat in",
        tests="tests/test_bench_overlap.py -k slowest",
    ),
    Bug(
        name="approximate methods taken for exact ones",
        file="bench/end_to_end.py",
        old="for label, other in others.items() if other.exact)",
        new="for label, other in others.items())",
        tests="tests/test_bench_end_to_end.py -k agreement",
    ),
)
