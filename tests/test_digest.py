"""Equal tokens have equal digests, and others do not."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from apb.digest import digest

ROWS = st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=2), max_size=3)


@given(first=st.lists(ROWS, max_size=2), second=st.lists(ROWS, max_size=2))
def test_digests_are_equal_where_tokens_are(first, second):
    one, other = ([torch.tensor(rows, dtype=torch.int64).reshape(-1, 2) for rows in ids] for ids in (first, second))
    assert (digest(*one) == digest(*other)) == (first == second)
    assert digest(*(x.int() for x in one)) == digest(*(x.T.contiguous().T for x in one)) == digest(*one)


def test_shapes_count():
    ids = torch.arange(6)
    assert len({digest(ids), digest(ids[None]), digest(ids.reshape(2, 3)), digest(ids[:2], ids[2:])}) == 4
