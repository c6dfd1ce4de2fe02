"""A tiny model that knows the words of the tasks, and heads for it."""

import torch

from apb.evals import lexicon, niah
from apb.evals.haystack import NOISE
from apb.testing.tiny import tiny_model


def save_tiny_model(path):
    """Write a tiny model whose tokenizer knows the words of the tasks; return its directory."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=3000, initial_alphabet=alphabet, show_progress=False)
    listed = " ".join(" " + word for kind in ("adjective", "noun") for word in lexicon.words(kind, "evaluation"))
    raw.train_from_iterator([listed, *[NOISE, niah.NEEDLE, *niah.ask(["a"])] * 50], trainer)
    PreTrainedTokenizerFast(tokenizer_object=raw).save_pretrained(path)
    tiny_model(vocab_size=raw.get_vocab_size()).save_pretrained(path)
    return path


def heads_file(path, folder, seed):
    from safetensors.torch import save_file
    from transformers import AutoConfig

    config, random = AutoConfig.from_pretrained(folder), torch.Generator().manual_seed(seed)
    dim = config.hidden_size // config.num_attention_heads
    inputs = (config.num_attention_heads + 2 * config.num_key_value_heads) * dim
    shapes = {"fc1": (8, inputs), "fc2": (config.num_key_value_heads, 8)}
    save_file(
        {f"model.layers.{layer}.self_attn.{part}.weight": torch.randn(shape, generator=random)
         for layer in range(config.num_hidden_layers) for part, shape in shapes.items()},
        path,
    )  # fmt: skip
