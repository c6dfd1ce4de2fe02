"""Retaining heads on disk: what the released checkpoints look like loads, and what does not fit says so."""

import warnings
from pathlib import Path

import pytest
import torch

import apb
from apb.compress import Candidates, Projections, RetainingHead, load_retaining_head
from apb.compress.retaining_head import PACKAGED, save_retaining_head, warn_of_another_model
from apb.costs import ModelShape
from apb.methods import APB
from apb.models import DEMO_MODEL
from apb.run import Job, check_job
from apb.testing.strategies import peaked


def random_heads():
    """Make heads of two layers for 4 query and 2 KV heads of dim 16."""
    generator = torch.Generator().manual_seed(7)
    fc1, fc2 = (tuple(torch.randn(s, generator=generator) for _ in range(2)) for s in ((8, 128), (2, 8)))
    return RetainingHead(fc1=fc1, fc2=fc2)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("suffix", ["safetensors", "pt", "bin"])
def test_retaining_heads_come_back_from_disk(tmp_path, prefix, suffix):
    path, head = tmp_path / f"heads.{suffix}", random_heads()
    weights = {
        f"{prefix}model.layers.{i}.self_attn.{part}.weight": getattr(head, part)[i]
        for part in ("fc2", "fc1")
        for i in (1, 0)
    }
    if suffix == "safetensors":
        from safetensors.torch import save_file

        save_file(weights, path)
    else:
        torch.save(weights, path)
    loaded = load_retaining_head(path)
    loaded.check_fits(layers=2, heads=4, kv_heads=2, head_dim=16)
    q, k, v = peaked(1, 9, batch=2, dtype=torch.float32)
    c = Candidates(q=q, k=k, v=v, layer=1, projections=Projections(q=q, k=k, v=v))
    assert torch.equal(loaded.score(c), head.score(c))
    shape = ModelShape(hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=96, layers=2)
    prepared = APB(compressor=head).prepare(shape, torch.device("cpu"), torch.bfloat16)
    assert prepared.compressor.score(c).dtype == torch.bfloat16


KEY = "model.layers.{}.self_attn.{}.weight"
GOOD = {KEY.format(i, part): torch.ones(*shape) for i in (0, 1) for part, shape in (("fc1", (8, 128)), ("fc2", (2, 8)))}


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ({}, "lacks model.layers.0.self_attn.fc1.weight; it holds nothing"),
        ({"lm_head.weight": torch.ones(1)}, "lacks model.layers.0.self_attn.fc1.weight; it holds lm_head.weight"),
        ({k: v for k, v in GOOD.items() if k != KEY.format(1, "fc2")}, r"lacks model.layers.1.self_attn.fc2.weight"),
        ({k.replace("layers.1", "layers.2"): v for k, v in GOOD.items()}, r"lacks model.layers.1.self_attn.fc1.weight"),
        (GOOD | {KEY.format(1, "fc2"): torch.ones(2, 9)}, r"layer 1 has fc1 \(8, 128\) and fc2 \(2, 9\); expected"),
        (GOOD | {KEY.format(1, "fc1"): torch.ones(8, 64)}, r"layer 1 has fc1 \(8, 64\).*the same in every layer"),
        (GOOD | {KEY.format(0, "fc1"): torch.ones(8)}, r"layer 0 has fc1 \(8,\) and fc2 \(2, 8\); expected"),
    ],
)
def test_a_checkpoint_that_is_no_retaining_head(tmp_path, weights, says):
    torch.save(weights, tmp_path / "heads.pt")
    with pytest.raises(ValueError, match="retaining heads: .*" + says):
        load_retaining_head(tmp_path / "heads.pt")


def test_a_checkpoint_of_another_model_or_kind(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"retaining heads: no file at .*nowhere\.pt"):
        load_retaining_head(tmp_path / "nowhere.pt")
    (tmp_path / "heads.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected a .safetensors, .bin or .pt file, got heads\.gguf"):
        load_retaining_head(tmp_path / "heads.gguf")
    torch.save(GOOD, tmp_path / "heads.pt")
    heads, fits = load_retaining_head(tmp_path / "heads.pt"), {"layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16}
    heads.check_fits(**fits)
    for other in ({"layers": 3}, {"heads": 8}, {"kv_heads": 1, "heads": 6}, {"head_dim": 32}):
        with pytest.raises(ValueError, match=r"for a model of 2 layers, .* = 128 and 2 KV heads; this model has"):
            heads.check_fits(**(fits | other))
    with pytest.raises(ValueError, match="layer: the checkpoint holds 2 layers, got layer 3"):
        x = torch.ones(1, 2, 6, 16)
        heads.compress(Candidates(q=x, k=x, v=x, layer=3, projections=Projections(q=x, k=x, v=x)), 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_heads_come_back_with_their_facts(tmp_path, dtype):
    from safetensors import safe_open

    head, path = random_heads(), tmp_path / "heads.safetensors"
    fc1, fc2 = (torch.stack(part).to(dtype) for part in (head.fc1, head.fc2))
    save_retaining_head(RetainingHead(fc1=tuple(fc1), fc2=tuple(fc2)), path, {"base_model": "tiny"})
    loaded = load_retaining_head(path)
    for part, saved in ((loaded.fc1, fc1), (loaded.fc2, fc2)):
        assert all(torch.equal(*pair) for pair in zip(part, saved, strict=True))
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(GOOD)
        assert file.metadata()["base_model"] == "tiny"
    with pytest.raises(ValueError, match=r"they are written as \.safetensors, got heads\.pt"):
        save_retaining_head(head, tmp_path / "heads.pt")


def test_packaged_heads_fit_the_model_that_they_are_for(tmp_path, monkeypatch):
    (name,) = PACKAGED
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()  # a folder of that name is no file of heads
    heads = load_retaining_head(name)
    heads.check_fits(layers=30, heads=9, kv_heads=3, head_dim=64)
    card = Path(apb.__file__).parent / "data" / "heads" / name / "README.md"
    assert f"{sum(w.numel() for w in (*heads.fc1, *heads.fc2)):,} parameters" in card.read_text(encoding="utf-8")


def job_with(heads, model, adapter=None):
    settings = {"compressor": "retaining-head", "heads": str(heads)}
    return Job(model=str(model), document="one two", query="what ?", adapter=adapter, settings=settings)


@pytest.mark.parametrize(
    ("header", "model", "adapter", "says"),
    [
        ({}, "another", None, None),
        ({"adapter": "none"}, "another", "facts", None),  # a file that names no model
        ({"base_model": "Org/Small-1B"}, "elsewhere/Small-1B", "facts", None),  # nor whether with an adapter
        ({"base_model": "Org/Small-1B", "adapter": "none"}, "/models/Small-1B/", None, None),
        ({"base_model": "Small-1B", "adapter": "Me/facts"}, "Org/Small-1B", "out/facts", None),
        ({"base_model": "Small-1B"}, "Small-1B-it", None, "for Small-1B, and are to run with Small-1B-it, where"),
        ({"base_model": "a", "adapter": "none"}, "a", "x/facts", "for a, and are to run with a with the adapter x/fac"),
        ({"base_model": "a", "adapter": "facts"}, "a", None, "for a with the adapter facts, and are to run with a, w"),
        ({"base_model": "a", "adapter": "b"}, "a", "c", "the adapter b, and are to run with a with the adapter c,"),
    ],
)
def test_heads_warn_of_a_model_that_they_were_not_trained_for(tmp_path, monkeypatch, header, model, adapter, says):
    path = tmp_path / "heads.safetensors"
    shape = ModelShape(hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=96, layers=2)
    save_retaining_head(random_heads(), path, header)
    loaded = load_retaining_head(path)
    for heads in (loaded, loaded.prepare(shape, torch.device("cpu"), torch.bfloat16)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warn_of_another_model(heads, model=model, adapter=adapter)
            monkeypatch.setenv("RANK", "1")  # of torchrun; the first rank has said it
            warn_of_another_model(heads, model=model, adapter=adapter)
            monkeypatch.delenv("RANK")
        found = [str(warning.message) for warning in caught]
        assert len(found) == (says is not None)
        assert all(says in text for text in found)


def test_a_directory_that_is_linked_to_goes_by_both_its_names(tmp_path, recwarn):
    (tmp_path / "Small-1B").mkdir()
    (tmp_path / "current").symlink_to(tmp_path / "Small-1B")
    for name in ("Small-1B", "current"):
        save_retaining_head(random_heads(), tmp_path / "heads.safetensors", {"base_model": name})
        check_job(job_with(tmp_path / "heads.safetensors", tmp_path / "current"))
    assert not recwarn.list


def test_packaged_heads_warn_with_another_model_and_with_an_adapter(recwarn):
    for model in (DEMO_MODEL, f"/models/{DEMO_MODEL}"):
        check_job(job_with("smollm2-135m", model))
    check_job(Job(model="another", document="one two", query="what ?"))
    assert not recwarn.list
    with pytest.warns(UserWarning, match=f"trained for {DEMO_MODEL}, and are to run with another, where"):
        check_job(job_with("smollm2-135m", "another"))
    pytest.importorskip("peft")
    with pytest.warns(UserWarning, match=f"run with {DEMO_MODEL} with the adapter smollm2-135m-long, where"):
        check_job(job_with("smollm2-135m", DEMO_MODEL, Path("smollm2-135m-long")))


def test_methods_with_heads_from_a_file_can_be_keys():
    heads = load_retaining_head("smollm2-135m")
    assert heads.trained_for and {APB(compressor=heads): 1} == {APB(compressor=heads): 1}
