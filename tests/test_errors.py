"""Bad input: one clear error that names the argument, what came and what was expected."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

from apb.compress import (
    Candidates,
    Compressor,
    KeyNorm,
    MaxPool,
    MeanPool,
    Oracle,
    QueryAware,
    Random,
    RetainingHead,
    SnapKV,
    select,
)
from apb.context import Context
from apb.generate import generate
from apb.hf import model_shape
from apb.methods import APB, Flash
from apb.parallel import HostFailed, PlanMismatch, run_threads
from apb.plan import plan_context
from apb.prompt import Prompt, build_prompt
from apb.session import Session
from apb.testing.strategies import host_rows, stream_rows
from apb.testing.tiny import tiny_model

IDS = torch.arange(20)[None]


@dataclass(frozen=True, kw_only=True)
class Given(Compressor):
    scores: torch.Tensor

    def score(self, candidates):
        return self.scores


def attend(method, plan, change=lambda q, k, v: (q, k, v)):
    streams = stream_rows(plan, 0)

    def body(host):
        rows = change(*(host_rows(plan, host.rank, streams, i) for i in range(3)))
        return method.attend(*rows, Context(plan, host))

    return run_threads(plan.hosts, body)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda q, k, v: (q[:, :, 1:], k, v), r"q, k, v: \d+, \d+ and \d+ rows, expected \d+, the plan's rows of rank"),
        (lambda q, k, v: (q, k, v[:, :, 1:]), r"q, k, v: \d+, \d+ and \d+ rows, expected \d+, the plan's rows of rank"),
        (lambda q, k, v: (q[:, :3], k, v), "q's 3 heads must be a multiple of the 2 heads of k and v"),
        (lambda q, k, v: (q.half(), k, v), r"q, k and v must share dtype.*q is torch.float16.*k is torch.float64"),
        (
            lambda q, k, v: (q.to("meta"), k, v),
            "q, k and v must share dtype and device; q is .* on meta, k is .* on cpu",
        ),
        (lambda q, k, v: (q.long(), k.long(), v.long()), "takes torch.float16, torch.bfloat16.*got torch.int64"),
        (
            lambda q, k, v: (q, k[..., :8], v[..., :8]),
            r"k and v must be \[batch 1, kv_heads, columns, dim 16\] .*got k \[1, 2, \d+, 8\]",
        ),
        (lambda q, k, v: (q[..., :8], k[..., :8], v[..., :8]), "the head dim must be 16..256, got 8"),
    ],
)
def test_rows_that_do_not_fit(change, says):
    plan = plan_context(tokens=20, hosts=2, anchor=2)
    with pytest.raises(ValueError, match=says):
        attend(APB(anchor=2, passing=0), plan, change)


def test_a_scale_that_is_none():
    plan = plan_context(tokens=20, hosts=1)
    q, k, v = stream_rows(plan, 0).document
    for scale in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="scale must be a positive number, got"):
            run_threads(1, lambda host, s=scale: Flash().attend(q, k, v, Context(plan, host, scale=s)))


@pytest.mark.parametrize(
    ("method", "asked", "says"),
    [
        (APB(anchor=2, passing=1), {"query": -3}, "query: expected an integer ≥ 0, got -3"),
        (APB(anchor=2, passing=1), {"tokens": 0}, "tokens: expected an integer ≥ 1, got 0"),
        (APB(anchor=12, passing=1), {}, "anchor: 12 tokens reach into the second block.*at most block_tokens = 10"),
        (APB(anchor=4, passing=1), {"query": 7}, "query: 7 tokens beside an anchor of 4.*at most 6 query tokens"),
        (
            APB(anchor=2, passing=1),
            {"query_offset": 5},
            "query_offset: the query follows 5 document tokens in the anchor, which has 2",
        ),
        (APB(anchor=2, passing=1), {"query": 0}, "query: QueryAware reads the question, but there are 0 query tokens"),
        (APB(anchor=0, passing=1), {}, r"query: QueryAware reads the question.*an anchor of 0.*SnapKV\(\)"),
        (APB(anchor=0, passing=1, layout="zigzag"), {"hosts": 1}, "query: QueryAware reads the question"),
        (Flash(), {}, "hosts: flash attention runs on one host, got 2; use Ring"),
    ],
)
def test_plans_that_a_method_cannot_make(method, asked, says):
    with pytest.raises(ValueError, match=says):
        method.plan(**({"tokens": 20, "hosts": 2, "query": 2} | asked))


ROWS = torch.ones(1, 2, 6, 16)
OFFER = Candidates(q=ROWS, k=ROWS, v=ROWS, layer=3, block=1)


@pytest.mark.parametrize("keep", [-1, 7])
def test_a_budget_out_of_range(keep):
    with pytest.raises(ValueError, match=f"keep: expected 0 to 6, the number of candidates, got {keep}"):
        KeyNorm().compress(OFFER, keep)
    with pytest.raises(ValueError, match=f"keep: expected 0 to 6, the number of scores, got {keep}"):
        select(torch.zeros(6), keep)


@pytest.mark.parametrize(
    ("compressor", "need"),
    [
        (QueryAware(), "query"),
        (SnapKV(voters="query"), "query"),
        (Oracle(), "document"),
        (RetainingHead(fc1=(torch.ones(2, 3),), fc2=(torch.ones(1, 2),)), "projections"),
    ],
)
def test_what_a_compressor_reads_is_missing(compressor, need):
    assert compressor.needs == {need}
    with pytest.raises(ValueError, match=f"candidates.{need}: {type(compressor).__name__} reads it, got None"):
        compressor.compress(OFFER, 2)
    assert compressor.compress(OFFER, 6).indices.tolist() == [[list(range(6))] * 2]  # keeping all reads nothing


def test_scores_of_another_shape_or_nan():
    with pytest.raises(ValueError, match=r"scores: Given.score returned shape \(1, 2, 5\), expected .* = \(1, 2, 6\)"):
        Given(scores=torch.zeros(1, 2, 5)).compress(OFFER, 2)
    scores = torch.zeros(1, 2, 6)
    scores[0, 1, 3] = torch.nan
    with pytest.raises(ValueError, match="scores: Given gave NaN in layer 3, block 1; look for NaN or infinite act"):
        Given(scores=scores).compress(OFFER, 2)
    with pytest.raises(ValueError, match="scores: KeyNorm gave NaN"):
        KeyNorm().compress(replace(OFFER, k=torch.full_like(ROWS, torch.nan)), 2)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: MaxPool(kernel=4), "kernel: expected an odd number of tokens ≥ 1.*got 4"),
        (lambda: MeanPool(kernel=0), "kernel: expected an odd number of tokens ≥ 1.*got 0"),
        (lambda: APB(anchor=-1, passing=0), "anchor: expected an integer ≥ 0, got -1"),
        (lambda: APB(anchor=0, passing=-1), "passing: expected an integer ≥ 0, got -1"),
        (lambda: APB(anchor=0, passing=0.5), "passing: expected an integer ≥ 0, got 0.5"),
        (lambda: SnapKV(window=0), "window: expected at least 1 voting token, got 0"),
        (lambda: SnapKV(voters="all"), "voters: expected 'block' or 'query', got 'all'"),
    ],
)
def test_settings_out_of_range(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def session(host, model=None, tokens=20):
    method = APB(anchor=2, passing=2)
    return Session(model or tiny_model(), method, method.plan(tokens=tokens, hosts=host.world_size, query=2), host)


@pytest.mark.parametrize(
    ("use", "says"),
    [
        (lambda s: s.prefill(IDS[:, :19], IDS[:, :2]), "document: 19 tokens, the plan is for 20"),
        (lambda s: s.prefill(IDS, IDS[:, :3]), "query: 3 tokens, the plan is for 2"),
        (lambda s: s.extend(IDS), r"extend: nothing has been prefilled; call prefill\(document, query\) first"),
        (
            lambda s: (s.prefill(IDS, IDS[:, :2]), s.extend(IDS[:, :0])),
            r"ids: expected \[batch, rows\] = \[1, at least 1 token\], got \(1, 0\)",
        ),
        (lambda s: (s.prefill(IDS, IDS[:, :2]), s.prefill(IDS, IDS[:, :2])), "prefill: this session holds a document"),
    ],
)
def test_a_session_used_wrongly(use, says):
    with pytest.raises(ValueError, match=says):
        run_threads(1, lambda host: use(session(host)))


def test_a_session_that_failed_half_way():
    def body(host):
        s = session(host)
        hook = s.model.model.layers[1].mlp.register_forward_hook(lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            s.prefill(IDS, IDS[:, :2])
        hook.remove()
        s.prefill(IDS, IDS[:, :2])

    with pytest.raises(ValueError, match=r"session: an earlier call failed half-way .*make a new Session"):
        run_threads(1, body)


def test_a_model_that_rotates_by_the_length_it_sees():
    model = tiny_model(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(ValueError, match="model: its RoPE of type 'dynamic' depends on the length that each host sees"):
        run_threads(2, lambda host: session(host, model))
    assert run_threads(1, lambda host: session(host, model).plan.tokens) == [20]


def test_a_model_that_attends_otherwise():
    window = tiny_model("mistral", sliding_window=8)
    with pytest.raises(ValueError, match="model: layer 0 attends with sliding_window=8, which apb does not compute"):
        run_threads(1, lambda host: session(host, window).prefill(IDS, IDS[:, :2]))

    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 97, "pad_token_id": None}  # fmt: skip
    for kind, said in (("full_attention", "softcap=50.0"), ("sliding_attention", "sliding_window=")):
        model = Gemma2ForCausalLM(Gemma2Config(**sizes, layer_types=[kind]))
        with pytest.raises(ValueError, match=f"model: layer 0 attends with {said}"):
            run_threads(1, lambda host, m=model: session(host, m).prefill(IDS, IDS[:, :2]))


def test_a_model_without_the_projections_a_retaining_head_reads():
    from transformers import GPT2Config, GPT2LMHeadModel, Phi3Config, Phi3ForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
             "vocab_size": 97, "pad_token_id": None}  # fmt: skip
    heads = RetainingHead(fc1=(torch.ones(8, 192),), fc2=(torch.ones(4, 8),))
    method = APB(anchor=0, passing=2, compressor=heads)
    model = Phi3ForCausalLM(Phi3Config(**sizes))
    with pytest.raises(ValueError, match="model: Phi3Attention has no q_proj, so its projections before RoPE cannot"):
        run_threads(
            1, lambda host: Session(model, method, method.plan(tokens=20, hosts=1), host).prefill(IDS, IDS[:, :0])
        )
    with pytest.raises(ValueError, match="config: GPT2Config is not a decoder configuration apb knows"):
        model_shape(GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=97)).config)


UNUSED_MODEL = SimpleNamespace(config=tiny_model().config, dtype=torch.float32)  # nothing that could run


def prompt(**changes):
    return Prompt(**({"document": IDS, "query": IDS[:, :2], "suffix": IDS[:, :0]} | changes))


@pytest.mark.parametrize(
    ("changes", "options", "says"),
    [
        ({"document": IDS[:, :0]}, {}, "document: it is empty; expected at least 1 token"),
        ({"query": IDS[:, :0]}, {}, "query: it is empty; expected at least 1 token"),
        ({}, {"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
        ({"query": IDS[:, :9]}, {}, "query: 9 tokens beside an anchor of 2"),
        ({"prefix_tokens": 3}, {}, "query_offset: the query follows 3 document tokens in the anchor, which has 2"),
    ],
)
def test_generation_with_bad_arguments_fails_before_anything_runs(changes, options, says):
    with pytest.raises(ValueError, match=says):
        run_threads(
            2, lambda host: generate(UNUSED_MODEL, APB(anchor=2, passing=2), host, prompt(**changes), **options)
        )


def test_ranks_that_disagree_on_the_plan_raise_the_same_error_everywhere():
    told = [""] * 3

    def body(host):
        method = APB(anchor=2, passing=2 + (host.rank == 2), compressor=Random())
        try:
            generate(UNUSED_MODEL, method, host, prompt())
        except (PlanMismatch, HostFailed) as error:
            told[host.rank] = f"{type(error).__name__}: {error}"
            raise

    with pytest.raises(PlanMismatch):
        run_threads(3, body)
    assert told[0] == told[1] == told[2]
    assert told[0].startswith("PlanMismatch: plan: the 3 hosts must hold the same value, but ranks [0, 1] hold")
    assert "passing=2" in told[0] and "ranks [2] hold" in told[0] and "passing=3" in told[0]


@pytest.mark.parametrize(("document", "query", "name"), [("  \n", "what ?", "document"), ("the sky", "", "query")])
def test_a_prompt_of_no_text(document, query, name):
    with pytest.raises(ValueError, match=f"{name}: expected some text, got"):
        build_prompt(None, document, query)
