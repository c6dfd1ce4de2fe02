"""A tokenizer of byte pairs with a chat template, trained in a second."""

from pathlib import Path

from apb.evals import lexicon, niah, variable_tracking
from apb.evals.haystack import NOISE

ESTHER = Path(__file__).parents[1] / "apb/data/esther.txt"
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def small_tokenizer():
    """Train byte pairs on a chapter and the words; digits stay apart, as in the model that the demo runs."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    raw.decoder = decoders.ByteLevel()
    marks = ["<|start|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=8000, special_tokens=marks, initial_alphabet=alphabet, show_progress=False)
    listed = " ".join(" " + word for kind in ("adjective", "noun") for word in lexicon.words(kind, "evaluation"))
    code = "Read the following coded text. def func_12(x):\n    return func_7(x) + 3\n"
    asked = [" ".join(niah.ask(["a", "b"])), niah.NEEDLE, *variable_tracking.ask("1", 5), NOISE, code]
    raw.train_from_iterator([ESTHER.read_text(encoding="utf-8"), listed] + asked * 50, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    tokenizer.chat_template = TEMPLATE
    return tokenizer
