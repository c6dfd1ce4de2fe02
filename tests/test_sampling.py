"""Draws depend on seed, step and logits alone, and follow the distribution; pieces of text make the whole."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apb.sampling import Sampling
from apb.stream import TextStream
from apb.testing.strategies import SEEDS


def draw(seed, rows=3, vocab=11, values=None):
    generator = torch.Generator().manual_seed(seed)
    if values:  # few different ones: ties
        return torch.randint(values, (rows, vocab), generator=generator).float()
    return 3 * torch.randn(rows, vocab, generator=generator)


def allowed(logits, temperature, top_k, top_p):
    """Return the tokens that may be drawn and their probabilities, by plain arithmetic on lists."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:top_k]
    best = max(logits)
    mass = [2.718281828459045 ** ((logits[i] - best) / temperature) for i in order]
    total, kept, upto = sum(mass), [], 0.0
    for i, m in zip(order, mass, strict=True):
        if upto >= (2 if top_p is None else top_p):
            break
        kept.append((i, m / total))
        upto += m / total
    whole = sum(m for _, m in kept)
    return {i: m / whole for i, m in kept}


@given(
    seed=SEEDS,
    step=st.integers(0, 500),
    temperature=st.sampled_from([1e-3, 0.5, 1.0, 3.0]),
    top_k=st.sampled_from([None, 1, 3, 50]),
    top_p=st.sampled_from([None, 0.1, 0.7, 1.0]),
    values=st.sampled_from([None, 2]),
)
def test_only_allowed_tokens_are_drawn_and_a_row_does_not_know_its_batch(seed, step, temperature, top_k, top_p, values):
    logits = draw(seed, values=values)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    chosen = sampling.choose(logits, step)
    assert torch.equal(chosen, sampling.choose(logits, step))
    for row, token in zip(logits, chosen.tolist(), strict=True):
        assert sampling.choose(row[None], step).item() == token
        assert token in allowed(row.tolist(), temperature, top_k, top_p)


@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.6}, {"top_k": 4, "top_p": 0.9}])
def test_draws_follow_the_distribution(settings):
    logits = draw(5, rows=1, vocab=6) / 3
    sampling, count = Sampling(temperature=0.8, seed=7, **settings), 4000
    found = (
        torch.bincount(torch.cat([sampling.choose(logits, step) for step in range(count)]), minlength=6).double()
        / count
    )
    expected = torch.zeros(6, dtype=torch.float64)
    for token, p in allowed(logits[0].tolist(), 0.8, settings.get("top_k"), settings.get("top_p")).items():
        expected[token] = p
    assert (found - expected).abs().max() < 4 * (0.25 / count) ** 0.5  # four standard deviations
    assert torch.equal(found > 0, expected > 0)


@given(seed=SEEDS, values=st.sampled_from([None, 2]))
def test_greedy_is_the_limit(seed, values):
    logits = draw(seed, values=values)
    greedy = Sampling().choose(logits, 0)
    assert torch.equal(greedy, logits.argmax(dim=-1))
    for settings in ({"temperature": 1.0, "top_k": 1}, {"temperature": 1.0, "top_p": 1e-9}):
        assert torch.equal(Sampling(**settings).choose(logits, 3), logits.argmax(dim=-1))
    if values is None:
        assert torch.equal(Sampling(temperature=1e-9).choose(logits, 3), greedy)


def test_seeds_and_steps_differ():
    logits = torch.zeros(1, 1000)
    assert len({Sampling(temperature=1.0, seed=s).choose(logits, 0).item() for s in range(20)}) > 15
    assert len({Sampling(temperature=1.0).choose(logits, step).item() for step in range(20)}) > 15


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"temperature": -1}, "temperature: expected a number ≥ 0, got -1"),
        ({"temperature": float("nan")}, "temperature: expected a number ≥ 0, got nan"),
        ({"temperature": float("inf")}, "temperature: expected a number ≥ 0, got inf"),
        ({"temperature": "warm"}, "temperature: expected a number ≥ 0, got 'warm'"),
        ({"temperature": 1, "top_k": 0}, "top_k: expected an integer ≥ 1, got 0"),
        ({"temperature": 1, "top_k": 2.0}, "top_k: expected an integer ≥ 1, got 2.0"),
        ({"temperature": 1, "top_p": 0}, "top_p: expected a number > 0 and ≤ 1, got 0"),
        ({"temperature": 1, "top_p": 1.5}, "top_p: expected a number > 0 and ≤ 1, got 1.5"),
        ({"top_p": 0.5}, "top_p: 0.5 changes nothing at temperature 0"),
        ({"top_k": 5}, "top_k: 5 changes nothing at temperature 0"),
        ({"seed": 0.5}, "seed: expected an integer, got 0.5"),
    ],
)
def test_settings_that_cannot_be_say_why(settings, says):
    with pytest.raises(ValueError, match=says):
        Sampling(**settings)


@pytest.fixture(scope="module", params=["bytes", "metaspace"])
def tokenizer(request):
    """A byte-level tokenizer, as Llama 3 and Qwen have, and one of pieces that fall back on bytes, as Mistral has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["the", "Ġqueen", "Ġ", "s", "."] if request.param == "bytes" else ["the", "▁queen", "▁", "s", "."]
    if request.param == "bytes":
        vocabulary = {c: i for i, c in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), *words[:2]])}
        raw = Tokenizer(models.BPE(vocabulary, []))
        raw.decoder = decoders.ByteLevel()
    else:
        pieces = [*(f"<0x{i:02X}>" for i in range(256)), *words, "<unk>"]
        raw = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
        raw.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")


def encode(tokenizer, text):
    """Return the tokens of a text's bytes: none of them is a character in itself if it takes several bytes."""
    if "<0x00>" in tokenizer.get_vocab():
        return [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in text.encode()]
    letters = {v: k for k, v in _letters().items()}
    return [tokenizer.convert_tokens_to_ids(letters[byte]) for byte in text.encode()]


def _letters():
    """Return the byte that each letter of the byte-level alphabet stands for."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return dict(zip(map(chr, plain), plain, strict=True)) | {
        chr(256 + n): byte for n, byte in enumerate(b for b in range(256) if b not in plain)
    }


def stream(tokenizer, tokens, **settings):
    text = TextStream(tokenizer, **settings)
    pieces = [text.push(token) for token in tokens]
    return [*pieces, text.end()], text


@given(data=st.data())
def test_pieces_make_the_whole_whatever_the_tokens(tokenizer, data):
    """Special tokens, leading spaces and, with the byte-level tokenizer, bytes that are no characters included.

    The other one takes characters back when a byte that fits nowhere follows, and what has been shown stays.
    """
    tokens = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=12))
    pieces, text = stream(tokenizer, tokens, head=data.draw(st.sampled_from(["", " The answer is"])))
    if "<0x00>" not in tokenizer.get_vocab() or "�" not in text.text:
        assert "".join(pieces) == text.text
    assert text.text == (text.head + tokenizer.decode(tokens, skip_special_tokens=True)).lstrip()


@given(text=st.text(min_size=1, max_size=8))
def test_a_character_comes_when_its_last_byte_does(tokenizer, text):
    if text[0].isspace() or "�" in text:
        return
    tokens = encode(tokenizer, text)
    pieces, _ = stream(tokenizer, tokens)
    assert "".join(pieces) == text and pieces[-1] == ""
    assert not any("�" in piece for piece in pieces)
    ends = [len(text[: i + 1].encode()) - 1 for i in range(len(text))]
    assert [i for i, piece in enumerate(pieces) if piece] == ends


@given(text=st.text(alphabet="ab.", max_size=12), stops=st.lists(st.text("ab.", min_size=1, max_size=3), max_size=2))
def test_an_answer_ends_before_the_first_stop_string(tokenizer, text, stops):
    pieces, found = stream(tokenizer, encode(tokenizer, text), stop=stops)
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    seen = text[: ends[0]] if ends else text  # no further token is read
    cut = min((seen.index(stop) for stop in stops if stop in seen), default=len(seen))
    assert "".join(pieces) == found.text == seen[:cut]
    assert found.stopped == bool(ends)


def test_an_empty_stop_string_is_refused(tokenizer):
    with pytest.raises(ValueError, match="stop: expected some text, got ''"):
        TextStream(tokenizer, stop=[""])
