"""The quality gate: a real model answers as with exact attention. Chance does not fail it; averages have no gate."""

from pathlib import Path

import pytest

pytest.importorskip("wonderwords")

from small_tokenizer import ESTHER

from apb.evals import Sources
from apb.evals.evaluate import Evaluation, evaluate
from apb.models import DEMO_MODEL, demo_model

EXACT, FULL_BUDGET, DEFAULT = "flash", "apb:anchor=0,passing=1/1,compressor=recency,query_in=after", "apb"
NEEDLES = 12


@pytest.fixture(scope="module")
def answers():
    """Twelve single needles in a text of 1K tokens, each answered by every method: records by method."""
    try:
        demo_model()
    except RuntimeError as error:
        pytest.skip(f"needs {DEMO_MODEL}: {error}")
    records = evaluate(
        Evaluation(
            model=DEMO_MODEL,
            tasks=("niah_single_2",),
            lengths=(1024,),
            methods=(EXACT, FULL_BUDGET, DEFAULT),
            hosts=(4,),
            samples=NEEDLES,
            sources=Sources(haystack=Path(ESTHER)),
            batch_tokens=6 * 1024,
            max_new_tokens=10,
            device="cpu",
        )
    )
    return {method: [r for r in records if r.method == method] for method in (EXACT, FULL_BUDGET, DEFAULT)}


def nll(records):
    return sum(record.nll for record in records) / len(records)


@pytest.mark.timeout(900)
def test_with_a_full_budget_it_answers_as_exact_attention_does(answers):
    assert all(len(records) == NEEDLES for records in answers.values())
    assert [r.score for r in answers[FULL_BUDGET]] == [r.score for r in answers[EXACT]]
    assert abs(nll(answers[FULL_BUDGET]) - nll(answers[EXACT])) < 0.01


@pytest.mark.timeout(900)
def test_with_its_defaults_it_misses_at_most_one_needle(answers):
    assert sum(r.score for r in answers[EXACT]) == NEEDLES, "the model itself must find them"
    assert sum(r.score for r in answers[DEFAULT]) >= NEEDLES - 1
    assert abs(nll(answers[DEFAULT]) - nll(answers[EXACT])) < 0.05
