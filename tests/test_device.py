"""Devices and precisions by name."""

import pytest
import torch

from apb.device import pick_device, pick_dtype


def test_auto_takes_a_gpu_in_half_precision_and_a_cpu_in_full(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device() == torch.device("cuda", 0) and pick_device("cuda:1") == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert pick_device() == torch.device("cpu")
    assert pick_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert pick_dtype("float16", torch.device("cpu")) == torch.float16


@pytest.mark.parametrize(("gpus", "name", "says"), [
    (0, "cuda", "'cuda', but PyTorch sees no CUDA device here"),
    (2, "cuda:2", "'cuda:2', but PyTorch sees 2 CUDA devices here"),
    (0, "nonsense", "expected auto, cpu, cuda, or cuda:N, got 'nonsense'"),
])  # fmt: skip
def test_a_device_that_is_not_there_is_refused(monkeypatch, gpus, name, says):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ValueError, match=f"device: .*{says}"):
        pick_device(name)


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="dtype: expected auto, float32, bfloat16, float16, got 'int8'"):
        pick_dtype("int8", torch.device("cpu"))
