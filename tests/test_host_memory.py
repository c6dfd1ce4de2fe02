"""No host of an approximate method holds a tensor as long as the document, and only the last row gets logits."""

import pytest
import torch
from live_bytes import LiveBytes

from apb.hf import share_weights
from apb.methods import make_method
from apb.parallel import run_threads
from apb.session import Session
from apb.testing.tiny import tiny_model

TOKENS, HOSTS, QUERY, VOCAB = 512, 8, 3, 97


def longest(name):
    """Prefill and ask; return the longest side, but for the last, of any host's tensors, and the shapes of logits."""
    model, method = tiny_model(vocab_size=VOCAB), make_method(name)
    plan = method.plan(tokens=TOKENS, hosts=HOSTS, query=QUERY)
    ids = torch.randint(0, VOCAB, (1, TOKENS + QUERY), generator=torch.Generator().manual_seed(0))

    def body(host):
        session = Session(share_weights(model), method, plan, host)
        with LiveBytes() as made:
            session.prefill(ids[:, :TOKENS], ids[:, TOKENS:])
            assert session.extend(ids[:, TOKENS:]).shape == (1, VOCAB)
        return made.shapes

    shapes = [shape for found in run_threads(HOSTS, body) for shape in found]
    return max(max(shape[:-1]) for shape in shapes if len(shape) >= 3), [s for s in shapes if s[-1:] == (VOCAB,)]


@pytest.mark.parametrize(
    "name",
    ["star:anchor=16", "ape:prefix=16", "apb:anchor=16,passing=8",
     "apb:anchor=16,passing=4,layout=zigzag,split_anchor=true",
     "spava:anchor=16,passing=4", "spava:anchor=16,passing=4,split_anchor=true"],
)  # fmt: skip
def test_no_host_holds_the_document(name):
    """At most its own keys, the anchor, what it was passed, and the caches' spare room."""
    rows, logits = longest(name)
    assert rows < TOKENS and set(logits) == {(1, VOCAB)}


def test_what_would_hold_it_is_seen():
    assert longest("apb:anchor=16,passing=8,compressor=oracle")[0] >= TOKENS
