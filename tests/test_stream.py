"""Pieces of text make the whole, whatever the tokens are, and for the same work at each of them."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apb.detokenizer import Detokenizer
from apb.stream import TextStream, TextStreams


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
    """Special tokens, white space and, with the byte-level tokenizer, bytes that are no characters included.

    The other one takes characters back when a byte that fits nowhere follows; what has been shown stays.
    """
    tokens = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=12))
    head = data.draw(st.sampled_from(["", " The answer is", "So: "]))
    pieces, text = stream(tokenizer, tokens, head=head)
    assert "".join(pieces) == text.text == text.text.strip()
    if "<0x00>" not in tokenizer.get_vocab() or "�" not in tokenizer.decode(tokens):
        assert text.text == (head + tokenizer.decode(tokens, skip_special_tokens=True)).strip()


@given(text=st.text(alphabet="a \n\t€😀", min_size=1, max_size=12))
def test_a_character_comes_with_its_last_byte_and_white_space_with_what_follows(tokenizer, text):
    if text[0].isspace():
        return
    tokens = encode(tokenizer, text)
    pieces, _ = stream(tokenizer, tokens)
    assert "".join(pieces) == text.strip() and pieces[-1] == ""
    ends = [len(text[: i + 1].encode()) - 1 for i in range(len(text)) if not text[i].isspace()]
    assert [i for i, piece in enumerate(pieces) if piece] == ends


def test_white_space_at_the_end_is_no_part_of_an_answer(tokenizer):
    assert stream(tokenizer, encode(tokenizer, "hello there \n\n"))[1].text == "hello there"
    assert stream(tokenizer, encode(tokenizer, "\n \n"))[1].text == ""
    assert stream(tokenizer, encode(tokenizer, "one \n. two"), stop=["."])[1].text == "one"


@given(text=st.text(alphabet="ab. ", max_size=12), stops=st.lists(st.text("ab. ", min_size=1, max_size=3), max_size=2))
def test_an_answer_ends_before_the_first_stop_string(tokenizer, text, stops):
    text = text.lstrip()  # one of the tokenizers drops a leading space
    pieces, found = stream(tokenizer, encode(tokenizer, text), stop=stops)
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    seen = text[: ends[0]] if ends else text  # no further token is read
    cut = min((seen.index(stop) for stop in stops if stop in seen), default=len(seen))
    assert "".join(pieces) == found.text == seen[:cut].strip()
    assert found.stopped == bool(ends)


def test_an_empty_stop_string_is_refused(tokenizer):
    with pytest.raises(ValueError, match="stop: expected some text, got ''"):
        TextStream(tokenizer, stop=[""])


def bytes_of(draw, count):
    """Draw bytes that are whole characters, broken ones, and ones that can be no text, in long runs of each."""
    found = b""
    while len(found) < count:
        kind, length = draw.choice(["text", "cut", "noise", "lone"]), draw.randint(1, 12)
        for _ in range(length):
            character = draw.choice(["a", " ", "\n", "é", "€", "語", "😀", "\N{REPLACEMENT CHARACTER}"]).encode()
            found += {
                "text": character,
                "cut": character[: draw.randint(1, len(character))],
                "noise": bytes([draw.randrange(256)]),
                "lone": b"\xbf",
            }[kind]
    return found


def pieces_tokenizer(draw):
    """Make a byte-level tokenizer whose tokens are one to three bytes: characters begin and end within tokens."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    letters = {byte: letter for letter, byte in _letters().items()}
    sample = bytes_of(draw, 400)
    pieces = {sample[i : i + draw.randint(1, 3)] for i in range(len(sample))} | {bytes([b]) for b in range(256)}
    words = ["".join(letters[b] for b in piece) for piece in sorted(pieces)]
    raw = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>"), sorted(pieces)


class Counting:
    """A tokenizer that counts the tokens it decodes."""

    def __init__(self, tokenizer):
        self.tokenizer, self.decoded, self.longest = tokenizer, 0, 0
        self.all_special_ids = tokenizer.all_special_ids

    def decode(self, tokens, **options):
        self.decoded += len(tokens)
        self.longest = max(self.longest, len(tokens))
        return self.tokenizer.decode(tokens, **options)


@given(seed=st.integers(0, 2**32), single=st.booleans())
def test_a_token_at_a_time_is_the_decode_of_all_of_them(seed, single):
    draw = random.Random(seed)
    tokenizer, pieces = pieces_tokenizer(draw)
    data, tokens = bytes_of(draw, 300), []
    ids = {piece: i for i, piece in enumerate(pieces)}
    while data:
        lengths = [1] if single else [n for n in (1, 2, 3) if data[:n] in ids]
        piece = data[: draw.choice(lengths)]
        tokens.append(ids[piece])
        data = data[len(piece) :]
        if draw.random() < 0.05:
            tokens.append(tokenizer.eos_token_id)
    detokenizer = Detokenizer(tokenizer)
    found = [detokenizer.push(token) for token in tokens]
    assert "".join([*found, detokenizer.end()]) == tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("what", ["the queen € ", "\xff", "\n", "</s>"])
def test_the_work_grows_with_the_number_of_tokens_alone(tokenizer, what):
    tokens = [tokenizer.eos_token_id] if what == "</s>" else encode(tokenizer, what)
    if what == "\xff":
        tokens = tokens[:1]  # the first of a character's two bytes: no text
    counting = Counting(tokenizer)
    text, most = TextStream(counting, stop=["no such text"]), 3000
    for i in range(most):
        text.push(tokens[i % len(tokens)])
    assert counting.longest <= 20 and counting.decoded <= 60 * most


def test_answers_that_are_written_at_the_same_time_are_kept_apart(tokenizer):
    shown = []
    streams = TextStreams(tokenizer, 2, stop=["."], show=lambda answer, piece: shown.append((answer, piece)))
    ended = [
        streams.push(i, number, token)
        for number, pair in enumerate(zip(encode(tokenizer, "ab."), encode(tokenizer, "cd "), strict=True))
        for i, token in enumerate(pair)
    ]
    for i in range(2):
        streams.end(i)
    assert ended == [False] * 4 + [True, False] and streams.texts == ["ab", "cd"]
    assert shown == [(0, "a"), (1, "c"), (0, "b"), (1, "d"), (0, ""), (1, "")]
