import os

import torch

# Without a GPU the Triton kernels run under the interpreter, which must be chosen before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from hypothesis import HealthCheck, settings

SLOW_OK = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
settings.register_profile("ci", derandomize=True, max_examples=25, deadline=None, suppress_health_check=SLOW_OK)
settings.register_profile("fuzz", max_examples=400, deadline=None, suppress_health_check=SLOW_OK, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

torch.set_num_threads(1)

TEXT = "the quick brown fox jumps over the lazy dog and the key is red . " * 4


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """Return a directory with a tiny Llama of 2 layers, a tokenizer of one token a word, and a document."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from apb.testing.tiny import tiny_model

    path = tmp_path_factory.mktemp("tiny")
    words = ["<unk>", *sorted(set((TEXT + " what is it ?").split()))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(path)
    tiny_model(vocab_size=len(words)).save_pretrained(path)
    (path / "document.txt").write_text(TEXT)
    return path


def pytest_collection_modifyitems(items):
    devices = torch.cuda.device_count()
    for item in items:
        if "gpu" in item.keywords and devices == 0:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if "multigpu" in item.keywords and devices < 2:
            item.add_marker(pytest.mark.skip(reason="needs two CUDA devices"))
