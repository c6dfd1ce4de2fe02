"""Haystacks: exactly the tokens asked for, needles whole and at sentence boundaries, halves that share nothing."""

import random
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apb.evals import haystack
from apb.evals.sample import Desk, Sources
from apb.evals.tokens import Tokens


class Words:
    """One token a word; the token is the word."""

    def __call__(self, texts, add_special_tokens):
        assert not add_special_tokens
        return SimpleNamespace(input_ids=[text.split() for text in texts])


def desk(path=None, split="evaluation", seed=0):
    return Desk(
        task="some_task",
        tokens=Tokens(Words()),
        random=random.Random(seed),
        sources=Sources(haystack=path, split=split),
        length=1000,
        room=900,
    )


def numbered(sizes):
    """Yield units of the given sizes again and again; each token says which unit and which of its tokens it is."""
    number = 0
    while True:
        for size in sizes:
            yield [(number, i, size) for i in range(size)]
            number += 1


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    needles=st.lists(st.integers(1, 7), max_size=5),
    seed=st.integers(0, 2**32),
    extra=st.integers(0, 80),
)
def test_the_haystack_has_exactly_its_room_and_whole_needles_between_units(sizes, needles, seed, extra):
    needles = [[("needle", n, i) for i in range(size)] for n, size in enumerate(needles)]
    room = sum(map(len, needles)) + sizes[0] + extra
    depths = haystack.spread(random.Random(seed), len(needles))
    ids, positions = haystack.hide(needles, depths, numbered(sizes), room)
    assert len(ids) == room and list(positions) == sorted(positions) and len(positions) == len(needles)
    for needle, at in zip(needles, positions, strict=True):
        assert ids[at : at + len(needle)] == needle
        before = next(token for token in reversed(ids[:at]) if token[0] != "needle")
        assert before[1] == before[2] - 1  # it follows the end of a unit
    hay = [token for token in ids if token[0] != "needle"]
    every = numbered(sizes)
    assert hay == [token for _, unit in zip(range(len(hay)), every, strict=False) for token in unit][: len(hay)]


@given(st.integers(0, 60), st.integers(0, 2**32))
def test_depths_are_distinct_and_in_order(count, seed):
    depths = haystack.spread(random.Random(seed), count)
    assert depths == sorted(set(depths)) and len(depths) == count
    assert all(0 <= depth <= 1 for depth in depths)


def test_a_needle_stands_at_the_boundary_nearest_to_its_depth():
    for depth in (0.0, 0.25, 0.5, 0.9, 1.0):
        _, (at,) = haystack.hide([["needle"] * 20], [depth], numbered([5]), 120)
        assert at == min(range(5, 101, 5), key=lambda end: abs(end - depth * 100))


def test_filling_up_repeats_and_cuts_the_unit():
    assert haystack.fill([0], 6, [7, 8]) == [0, 7, 8, 7, 8, 7]
    assert haystack.fill([0, 1], 2, [7]) == [0, 1]


def test_noise_is_a_line_a_unit():
    source = haystack.noise(Tokens(Words()))
    assert next(source) == next(source) == haystack.NOISE.split()


def test_the_halves_of_a_text_share_no_sentence_and_make_it_up(tmp_path):
    path = tmp_path / "text.txt"
    sentences = [f"This  is\nsentence {i} he said{end}" for i, end in enumerate('.!?"' * 5)]
    path.write_text(" ".join(s.replace('"', '."') for s in sentences), encoding="utf-8")
    seen = {}
    for split in ("evaluation", "training"):
        source = haystack.text(desk(path, split))
        units = [" ".join(next(source)) for _ in range(25)]  # more than there are: it begins again
        assert units[:5] == units[10:15]
        seen[split] = set(units)
    assert len(seen["evaluation"]) == len(seen["training"]) == 10
    assert not seen["evaluation"] & seen["training"]
    assert 'This is sentence 3 he said."' in seen["evaluation"]


def test_a_text_begins_at_a_drawn_sentence_and_a_long_one_is_parted(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("word " * 130 + "end. " + "Short one. " * 9, encoding="utf-8")
    first = {" ".join(next(haystack.text(desk(path, seed=seed)))) for seed in range(40)}
    assert first == {" ".join(["word"] * 60), " ".join(["word"] * 10 + ["end."]), "Short one."}


def test_seven_digits_of_the_text_are_known(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("It was 123456789 then. Or 7654321. Or 12.", encoding="utf-8")
    assert haystack.digits(desk(path)) == {"1234567", "2345678", "3456789", "7654321"}


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "text.txt"
    for word in ("Old", "Newer"):
        path.write_text(f"{word}. {word}.", encoding="utf-8")
        assert next(haystack.text(desk(path))) == [f"{word}."]


def test_files_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(ValueError, match="haystack: some_task needs a file; give one with --haystack FILE"):
        haystack.text(desk())
    with pytest.raises(ValueError, match=r"haystack: there is no file '.*gone\.txt'"):
        haystack.text(desk(tmp_path / "gone.txt"))
    path = tmp_path / "text.txt"
    path.write_bytes(b"caf\xe9. Two.")
    with pytest.raises(ValueError, match=r"text.txt' is not UTF-8 text \(.* at byte 3\)"):
        haystack.text(desk(path))
    path.write_text("Only one sentence", encoding="utf-8")
    with pytest.raises(ValueError, match="expected a text of two sentences or more, got 1 in"):
        haystack.text(desk(path))
