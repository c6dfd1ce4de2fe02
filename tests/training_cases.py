"""Small examples to train retaining heads on, a short run's settings, and tokenizers that are made at once."""

from pathlib import Path

import torch

from apb.prompt import Prompt
from apb.train.examples import Example
from apb.train.settings import HeadTraining

QUICK = HeadTraining(width=16, steps=9, warmup=2, eval_every=4, eval_examples=2)


class Drawn:
    """Random tokens in the place of `apb.evals`."""

    longest = 60

    def make(self, number, *, held_out=False):
        generator = torch.Generator().manual_seed(2 * number + held_out)
        document, query, suffix, answer = torch.randint(97, (1, 60), generator=generator).split((44, 5, 3, 8), dim=1)
        prompt = Prompt(document=document, query=query, suffix=suffix, prefix_tokens=2)
        return Example(prompt=prompt, answer=answer, name=f"draw {number}")

    def facts(self):
        return {"data": "drawn", "lengths": "60"}


def byte_tokenizer(text=""):
    """Make a tokenizer of one token a byte; with a text, its frequent words are tokens too."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if text:
        trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=alphabet[0])


def task_tokenizer():
    """Make one that knows the words of the tasks' templates, so that questions have a usual number of tokens."""
    import apb.evals.niah
    import apb.evals.variable_tracking

    files = (apb.evals.niah.__file__, apb.evals.variable_tracking.__file__)
    return byte_tokenizer("\n".join(Path(file).read_text(encoding="utf-8") for file in files))
