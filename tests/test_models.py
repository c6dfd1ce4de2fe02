"""Checkpoints of every family, by name and from disk, attend by every method; adapters; what cannot be loaded."""

import json
import time

import pytest
import torch

from apb import models as module
from apb.generate import generate
from apb.hf import share_weights
from apb.methods import APB, METHODS, make_method
from apb.models import hub_answers, load_model, load_tokenizer
from apb.parallel import run_threads
from apb.prompt import Prompt
from apb.testing.tiny import tiny_model

FAMILIES = ["llama", "llama3", "yi", "qwen2", "qwen2.5", "qwen3", "mistral"]
NEW = 5
CLOSE = {"atol": 2e-5, "rtol": 2e-5}


def draw(seed, count):
    return torch.randint(97, (2, count), generator=torch.Generator().manual_seed(seed))


PROMPT = Prompt(document=draw(0, 50), query=draw(1, 3), suffix=draw(2, 2), prefix_tokens=2)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """Return a checkpoint in several shards, and what transformers itself answers with it."""
    path = tmp_path_factory.mktemp(request.param)
    tiny_model(request.param).save_pretrained(path, max_shard_size="100KB")
    assert len(list(path.glob("model-*-of-*.safetensors"))) > 1
    model = load_model(path, device="cpu", dtype=torch.float64)
    model.set_attn_implementation("sdpa")
    ids = torch.cat((PROMPT.document, PROMPT.query, PROMPT.suffix), dim=1)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, ids.shape[1] :]
    with torch.no_grad():
        return request.param, model, expected, model(ids).logits[:, -1]


def answer(host, model, method):
    return generate(share_weights(model), method, host, PROMPT, max_new_tokens=NEW)


EVERYTHING_PASSED = "apb:anchor=0,passing=100,compressor=key-norm"


@pytest.mark.parametrize("hosts", [1, 2, 3])
@pytest.mark.parametrize("name", [*METHODS, EVERYTHING_PASSED, "spava:anchor=3,passing=1"])
def test_every_family_runs_by_every_method(family, name, hosts):
    """Exact methods, and APB that passes everything, token for token as transformers; the others alike on all hosts."""
    _, model, expected, logits = family
    method = make_method(name)
    if method.one_host and hosts > 1:
        pytest.skip("runs on one host")
    results = run_threads(hosts, answer, model, method)
    # Spava's own budgets are no less than 128 tokens: everything, here.
    exact = method.exact or name in (EVERYTHING_PASSED, "spava") or (hosts == 1 and name in ("star", "apb"))
    for result in results:
        assert torch.equal(result.tokens, results[0].tokens) and result.tokens.shape == (2, NEW)
        if exact:
            assert torch.equal(result.tokens, expected)
            torch.testing.assert_close(result.logits, logits, **CLOSE)
    if hosts == 3 and not exact:
        assert (results[0].logits - logits).abs().max() > 0.1  # the model is peaked enough that a mistake would show


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_every_family_with_a_whole_budget_is_exact(family, layout):
    _, model, expected, _ = family
    for query_in in ("prefill", "after"):
        method = make_method(EVERYTHING_PASSED, layout=layout, query_in=query_in)
        for result in run_threads(4, answer, model, method):
            assert torch.equal(result.tokens, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shards_are_loaded_in_the_dtype_asked_for(tmp_path, dtype):
    model = tiny_model("qwen3")
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    found = load_model(tmp_path, device="cpu", dtype=dtype)
    assert not found.training
    for (name, mine), (other, theirs) in zip(found.named_parameters(), model.named_parameters(), strict=True):
        assert name == other and mine.dtype == dtype and mine.device.type == "cpu"
        assert torch.equal(mine, theirs.to(dtype))


@pytest.mark.parametrize("accelerate", [True, False])
def test_weights_go_straight_to_the_device(model_dir, monkeypatch, accelerate):
    import transformers

    seen = {}

    def spy(cls, source, **options):
        seen.update(options)
        return tiny_model()

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", classmethod(spy))
    monkeypatch.setattr(transformers.utils, "is_accelerate_available", lambda: accelerate)
    load_model(model_dir, device="cpu", dtype=torch.bfloat16)
    assert seen["dtype"] == torch.bfloat16
    assert seen.get("device_map") == ({"": torch.device("cpu")} if accelerate else None)


@pytest.mark.gpu
@pytest.mark.parametrize("accelerate", [True, False])
def test_weights_arrive_on_the_gpu(tmp_path, monkeypatch, accelerate):
    import transformers

    if accelerate:
        pytest.importorskip("accelerate")
    tiny_model("llama3").save_pretrained(tmp_path, max_shard_size="100KB")
    monkeypatch.setattr(transformers.utils, "is_accelerate_available", lambda *args, **kwargs: accelerate)
    model = load_model(tmp_path, device="cuda:0", dtype=torch.bfloat16)
    assert all(x.device == torch.device("cuda", 0) for x in (*model.parameters(), *model.buffers()))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('ran')",))


def test_a_pickled_checkpoint_is_read_without_running_it(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    found = load_model(tmp_path, device="cpu", dtype=torch.float32)
    assert all(torch.equal(p, q) for p, q in zip(found.parameters(), model.parameters(), strict=True))
    torch.save({"model.norm.weight": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="model: nothing loadable at"):
        load_model(tmp_path, device="cpu", dtype=torch.float32)


def test_a_sliding_window_is_refused_by_name():
    model = tiny_model("mistral", sliding_window=16)
    with pytest.raises(ValueError, match="layer 0 attends with sliding_window=16, which apb does not compute"):
        run_threads(1, answer, model, APB())


LLAMA_31 = {
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "max_position_embeddings": 131072,
}
QWEN_25 = {"rope_theta": 1e6, "sliding_window": 131072, "use_sliding_window": False, "max_window_layers": 70}
YI = {"rope_theta": 1e7, "max_position_embeddings": 200000, "rms_norm_eps": 1e-5}
REAL = {  # as those models' configurations are written, but for their sizes
    "meta-llama/Llama-3.1-8B-Instruct": ("llama3", "LlamaForCausalLM", LLAMA_31),
    "Qwen/Qwen2.5-14B-Instruct": ("qwen2.5", "Qwen2ForCausalLM", QWEN_25),
    "01-ai/Yi-34B-200K": ("yi", "LlamaForCausalLM", YI),
}


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """Return an empty cache of a hub that cannot be reached."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "hub_answers", lambda: False)
    return tmp_path


@pytest.mark.parametrize("name", REAL)
def test_real_names_load_from_the_hubs_cache(name, hub_cache, model_dir):
    tiny, architecture, settings = REAL[name]
    folder, commit = hub_cache / f"models--{name.replace('/', '--')}", "0" * 40
    snapshot = folder / "snapshots" / commit
    tiny_model(tiny).save_pretrained(snapshot)
    config = json.loads((snapshot / "config.json").read_text())
    config.pop("rope_parameters", None)
    (snapshot / "config.json").write_text(json.dumps(config | settings))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (snapshot / file).write_bytes((model_dir / file).read_bytes())
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)

    model = load_model(name, device="cpu", dtype=torch.float64)
    assert type(model).__name__ == architecture
    assert model.config.rope_parameters["rope_theta"] == settings["rope_theta"]
    assert model.config.rope_parameters["rope_type"] == ("llama3" if tiny == "llama3" else "default")
    assert len(load_tokenizer(name)) > 5
    exact, split = (
        run_threads(hosts, answer, model, make_method(method))[0]
        for hosts, method in ((1, "flash"), (2, EVERYTHING_PASSED))
    )
    assert torch.equal(exact.tokens, split.tokens)


@pytest.mark.parametrize("load", [load_tokenizer, lambda name: load_model(name, device="cpu", dtype=torch.float32)])
def test_a_hub_that_cannot_be_reached_is_said_soon(load, hub_cache):
    started = time.perf_counter()
    with pytest.raises(ValueError, match="the hub does not answer, and its cache has no such"):
        load("meta-llama/Llama-3.1-8B-Instruct")
    assert time.perf_counter() - started < 5


def test_whether_the_hub_answers(monkeypatch):
    import socket

    from huggingface_hub import constants

    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        assert hub_answers()
    assert not hub_answers()
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert hub_answers()  # who knows?
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    assert not hub_answers()


def lora(model, path, **settings):
    """Store a random LoRA of `model`, and return what the model answers with it."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | settings
    adapted = get_peft_model(share_weights(model), LoraConfig(init_lora_weights=False, **settings)).eval()
    adapted.save_pretrained(str(path))
    with torch.no_grad():
        return adapted(PROMPT.document).logits


def test_an_adapter_is_merged_into_the_weights(tmp_path):
    pytest.importorskip("peft")
    model = tiny_model("qwen3")
    model.save_pretrained(tmp_path / "model")
    expected = lora(model, tmp_path / "adapter")
    merged = load_model(tmp_path / "model", device="cpu", dtype=torch.float32, adapter=tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(merged(PROMPT.document).logits, expected, atol=1e-3, rtol=1e-3)
        assert (model(PROMPT.document).logits - expected).abs().max() > 0.1
    assert type(merged) is type(model) and not merged.training
    assert [name for name, _ in merged.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert run_threads(2, answer, merged, APB())[0].tokens.shape == (2, NEW)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    pytest.importorskip("peft")
    tiny_model().save_pretrained(tmp_path / "model")
    lora(tiny_model(layers=3), tmp_path / "deeper")
    lora(tiny_model(layers=1), tmp_path / "shallower")
    lora(tiny_model(hidden_size=32), tmp_path / "narrower")
    lora(tiny_model(), tmp_path / "other", target_modules=["embed_tokens"])
    text = (tmp_path / "other" / "adapter_config.json").read_text()
    (tmp_path / "other" / "adapter_config.json").write_text(text.replace("embed_tokens", "c_attn"))
    for name in ("deeper", "shallower", "narrower", "other"):
        with pytest.raises(ValueError, match=f"adapter: .*{name}' does not fit LlamaForCausalLM of 2 layers"):
            load_model(tmp_path / "model", device="cpu", dtype=torch.float32, adapter=tmp_path / name)
    with pytest.raises(ValueError, match=r"adapter: expected a directory that PEFT has written"):
        load_model(tmp_path / "model", device="cpu", dtype=torch.float32, adapter=tmp_path / "nowhere")


def test_without_peft_an_adapter_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "adapter_config.json").write_text("{}")
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ImportError, match=r"peft is needed to read it; pip install 'apb\[train\]'"):
        load_model(tmp_path, device="cpu", dtype=torch.float32, adapter=tmp_path)
