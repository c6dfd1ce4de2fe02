"""What one benchmark of a prefill leaves: a line of `benchmarks/prefill.csv`. Tables and plots are drawn from it."""

import math
from dataclasses import dataclass
from typing import Literal

__all__ = ["PHASES", "Mode", "PrefillRow"]

Mode = Literal["measured", "simulated", "counted"]

PHASES = ("qkv", "compress", "communicate", "attention", "o", "ffn", "other")
"""What a layer's time is spent on, as in the paper's breakdown; each is a column `<phase>_ms`."""


@dataclass(frozen=True, kw_only=True)
class PrefillRow:
    """One method at one length.

    Attributes:
        date, device, torch, triton, commit: as in `apb.bench.Row`.
        mode: "measured" on as many GPUs as hosts; "simulated": each host's share timed in turn on one GPU, the slowest
            taken, messages by their counted bytes and a measured link; "counted": FLOPs and bytes only, no time.
        shape: name of the model's shape.
        tokens: n, document tokens.
        hosts: H.
        method: its label, with settings.
        backend: who computed the attention; what "auto" took. Empty in "counted".
        dtype: of weights and activations.
        link: what messages were charged in "simulated", where there are any.
        ttft_ms: time to first token: all layers' prefill, the question's pass and the first logits.
        low_ms, high_ms: least and most of the repeats.
        layer_ms: one layer on the slowest host, the mean over the layers, messages included.
        qkv_ms … other_ms: what that is made of.
        query_ms: the question's pass and the first logits.
        peak_gbytes: most memory of a host, 10⁹ bytes; in "simulated" one layer's peak with all layers' caches and
            weights added.
        formula_gbytes: the same by `memory.host_peak_bytes`.
        tflop: 10¹² operations of one layer on the host that has most.
        sent_mbytes: 10⁶ bytes that the host which sends most sends in one layer.
        load: each host's time in one layer without messages, in milliseconds ("counted": its 10¹² operations), in rank
            order, separated by spaces.
        notes: whatever else has to be known: why it could not run, the repeats, whether Python kept a GPU waiting.
    """

    date: str
    device: str
    torch: str
    triton: str
    commit: str
    mode: str
    shape: str
    tokens: int
    hosts: int
    method: str
    backend: str = ""
    dtype: str = ""
    link: str = ""
    ttft_ms: float = math.nan
    low_ms: float = math.nan
    high_ms: float = math.nan
    layer_ms: float = math.nan
    qkv_ms: float = math.nan
    compress_ms: float = math.nan
    communicate_ms: float = math.nan
    attention_ms: float = math.nan
    o_ms: float = math.nan
    ffn_ms: float = math.nan
    other_ms: float = math.nan
    query_ms: float = math.nan
    peak_gbytes: float = math.nan
    formula_gbytes: float = math.nan
    tflop: float = math.nan
    sent_mbytes: float = math.nan
    load: str = ""
    notes: str = ""

    @property
    def tokens_per_s(self) -> float:
        """Document tokens per second to the first token."""
        return 1e3 * self.tokens / self.ttft_ms
