"""Scores: what the benchmarks' own scorers count as right, and what they do not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apb.evals import TASKS
from apb.evals import scoring as s

VALUES = ["1234567", "7654321", "1111111", "2222222"]


@pytest.mark.parametrize(
    ("score", "prediction", "references", "expected"),
    [
        (s.reference_fraction, " 7654321, then 1234567 and 2222222", VALUES, 0.75),
        (s.reference_fraction, "1234567", VALUES, 0.25),
        (s.reference_fraction, "", VALUES, 0),
        (s.reference_fraction, "They are Tall-Tree.", ["tall-tree"], 1),
        (s.reference_fraction, "x12345678", ["1234567"], 1),  # a substring is enough
        (s.any_reference, "It was in paris.", ["London", "Paris"], 1),
        (s.any_reference, "Rome", ["London", "Paris"], 0),
        (s.first_integer, " 01234.", ["01234"], 1),
        (s.first_integer, "The key 01234 of 5", ["01234"], 1),
        (s.first_integer, " 1234", ["01234"], 0),  # digit by digit
        (s.first_integer, "1. 01234", ["01234"], 0),
        (s.first_integer, "012345", ["01234"], 0),
        (s.first_integer, "none", ["01234"], 0),
        (s.first_integer, "٣ 01234", ["01234"], 1),  # only 0 to 9 are digits
        (s.whole_word, ' "ab-12".', ["ab-12"], 1),
        (s.whole_word, "it is:ab-12\nok", ["ab-12"], 1),
        (s.whole_word, "ab-123", ["ab-12"], 0),
        (s.whole_word, "(ab-12)", ["ab-12"], 0),  # brackets do not part words
        (s.whole_word, "AB-12", ["ab-12"], 0),
        (s.first_number, " 97.", ["97"], 1),
        (s.first_number, " 97.0", ["97"], 1),
        (s.first_number, " 97.5", ["97"], 0),
        (s.first_number, "of 5: 97", ["97"], 0),
        (s.first_number, "none", ["97"], 0),
        (s.last_word, "The value is 12.", ["12"], 1),
        (s.last_word, "`12`", ["12"], 1),
        (s.last_word, "-12", ["-12"], 1),
        (s.last_word, "12 is right", ["12"], 0),
        (s.last_word, "12, 13", ["12"], 0),
        (s.last_word, "12,", ["12"], 0),
        (s.last_word, "", ["12"], 0),
        (s.correct_prefix, "[1, 4, 8]", ["1", "4", "8"], 1),
        (s.correct_prefix, "1 4 8 9 9", ["1", "4", "8"], 1),
        (s.correct_prefix, "[1, 4]", ["1", "4", "8", "2"], 0.5),
        (s.correct_prefix, "[1, 5, 8, 2]", ["1", "4", "8", "2"], 0.25),  # what comes right later does not count
        (s.correct_prefix, "2, 1, 4, 8", ["1", "4", "8"], 0),
        (s.correct_prefix, "", ["1"], 0),
    ],
)
def test_a_prediction_scores_as_the_benchmark_scores_it(score, prediction, references, expected):
    assert score(prediction, references) == expected


@given(st.text(), st.sampled_from(sorted(TASKS)))
def test_any_text_has_a_score(prediction, name):
    assert 0 <= TASKS[name].score(prediction, ("12345", "67890")) <= 1


def test_each_task_has_its_own_scorer():
    two = ("11", "22")
    answers = {"both": "11 22", "first": "11", "second": "22", "glued": "x11x"}
    seen = {name: [task.score(answer, two) for answer in answers.values()] for name, task in TASKS.items()}
    ruler = {"niah", "vt", "cwe", "fwe"}
    for name, scores in seen.items():
        if name.split("_")[0] in ruler:
            assert scores == [1, 0.5, 0.5, 0.5], name
        elif name.startswith("qa"):
            assert scores == [1, 1, 1, 1], name
    assert seen["passkey"] == seen["number_string"] == seen["math_find"] == [1, 1, 0, 1]
    assert seen["kv_retrieval"] == [1, 1, 0, 0]
    assert seen["math_calc"] == [1, 0.5, 0, 0.5]
    assert seen["code_run"] == [0, 1, 0, 0]
