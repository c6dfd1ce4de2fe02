"""RULER's tasks: halves that share nothing, questions in their words, and what happens where words or texts run out."""

import dataclasses
import json
import re
from collections import Counter

import pytest
from small_tokenizer import small_tokenizer
from task_cases import asked_of, text_of, write_sources

from apb.evals import Sources, lexicon, make_sample, niah, variable_tracking, words
from apb.evals.haystack import NOISE

pytest.importorskip("wonderwords")


@pytest.fixture(scope="module")
def small():
    return small_tokenizer()


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """Return every source: a chapter, and a small file in each question format."""
    return write_sources(tmp_path_factory.mktemp("questions"))


def parts(split, sources, tokenizer, seeds=12):
    """Return the words of keys, the sentences, the listed words and the paragraphs of many documents."""
    sources = dataclasses.replace(sources, split=split)
    seen = {"keys": set(), "sentences": set(), "words": set(), "paragraphs": set()}
    for seed in range(seeds):

        def text(name):
            return text_of(tokenizer, make_sample(name, tokenizer, length=1500, seed=seed, sources=sources))  # noqa: B023

        seen["keys"] |= set(" ".join(re.findall(r"for (\S+) is:", text("niah_multikey_2"))).replace("-", " ").split())
        seen["sentences"] |= set(re.split(r"(?<=[.?]) ", text("niah_single_2"))[3:-2])
        seen["words"] |= set(re.findall(r"\d+\. ([a-z]+)", text("cwe")))
        for name in ("qa_1", "qa_2"):
            seen["paragraphs"] |= set(re.findall(r"\w+ was born in \w+", text(name)))
    return seen


def test_training_and_evaluation_share_no_word_and_no_passage(small, sources):
    evaluation, training = (parts(split, sources, small) for split in ("evaluation", "training"))
    for what in evaluation:
        assert len(evaluation[what]) > 3 and len(training[what]) > 3, what
        assert not evaluation[what] & training[what], what
    for kind in ("adjective", "noun", "verb"):
        halves = [set(lexicon.words(kind, split)) for split in ("evaluation", "training")]
        assert not halves[0] & halves[1] and min(map(len, halves)) > 200
    assert not evaluation["keys"] & training["words"] and not evaluation["words"] & training["keys"]


def test_one_key_is_asked_for_in_the_singular_and_several_in_the_plural():
    assert niah.ask(["a-b"]) == (
        "What is the special magic number for a-b mentioned in the provided text?",
        " The special magic number for a-b mentioned in the provided text is",
    )
    assert niah.ask(["a-b"], "uuid", values=4) == (
        "What are all the special magic uuids for a-b mentioned in the provided text?",
        " The special magic uuids for a-b mentioned in the provided text are",
    )
    query, prefix = niah.ask(["a", "b", "c"])
    assert " numbers for a, b, and c mentioned" in query and prefix.endswith(" are")
    assert variable_tracking.ask("777", 5)[1].endswith("5 variables are assigned the value 777, they are:")


def test_when_the_words_run_out_all_of_them_stand_more_often(small, monkeypatch):
    monkeypatch.setattr(lexicon, "_WORD", re.compile("b[a-z]+"))
    caches = (lexicon.words, words._pool, words._example_words, words._example)
    for cache in caches:
        cache.cache_clear()
    try:
        document = text_of(small, make_sample("cwe", small, length=20_000, seed=0))
    finally:
        for cache in caches:
            cache.cache_clear()
    counts = Counter(re.findall(r"\d+\. ([a-z]+)", document.rsplit("Memorize", 1)[1])).most_common()
    factor = counts[0][1] // 30
    assert factor > 1 and [times for _, times in counts[:11]] == [30 * factor] * 10 + [3 * factor]


def hotpot(path, questions, paragraphs, answer="no"):
    """Write questions in HotpotQA's format, each with a paragraph of its own in the evaluation's half; return those."""
    texts = [f"Nobody knows where no. {i} lives." for i in range(4 * paragraphs)]
    texts = [text for text in texts if lexicon.half(f"T\n{text}") == "evaluation"][:paragraphs]
    items = [
        {"question": question, "answer": answer, "supporting_facts": [["T", 0]], "context": [["T", [text]]]}
        for question, text in zip(cycle_to(questions, len(texts)), texts, strict=True)
    ]
    path.write_text(json.dumps(items), encoding="utf-8")
    return [f"T\n{text}" for text in texts]


def cycle_to(values, count):
    return [values[i % len(values)] for i in range(count)]


def test_paragraphs_that_have_the_answer_are_distractors_too(small, tmp_path):
    """As in RULER: nearly every paragraph has "no" in it, and the document is still made of paragraphs."""
    texts = hotpot(tmp_path / "hotpot.json", ["Is it so?"], 120)
    assert len(texts) == 120
    for seed in range(5):
        made = make_sample("qa_2", small, length=1500, seed=seed, sources=Sources(hotpotqa=tmp_path / "hotpot.json"))
        document = text_of(small, made)
        shown = re.findall(r"Document \d+:\n(T\n.*)", document)
        assert NOISE not in document and len(shown) > 40
        assert len(set(shown)) == len(shown) and set(shown[:-1]) <= set(texts)


def test_a_question_s_own_paragraphs_stand_once_even_where_the_others_come_again(small, tmp_path):
    texts = hotpot(tmp_path / "hotpot.json", ["Is it so?"], 3)
    made = make_sample("qa_2", small, length=1500, seed=0, sources=Sources(hotpotqa=tmp_path / "hotpot.json"))
    counts = Counter(re.findall(r"Document \d+:\n(T\n.*)", text_of(small, made)))
    own = small.decode(made.prompt.document[0, round(made.depths[0] * made.prompt.document.shape[1]) :])
    (gold,) = [text for text in texts if own.startswith("\n" + text)]
    assert counts[gold] == 1 and all(counts[text] > 10 for text in texts if text != gold)


def test_questions_longer_than_their_room_are_passed_over(small, tmp_path):
    path, long = tmp_path / "hotpot.json", "Is it so, or is it " + "not " * 400 + "so?"
    hotpot(path, [long, long, "Is it so?"], 30)
    for seed in range(8):
        made = make_sample("qa_2", small, length=1500, seed=seed, sources=Sources(hotpotqa=path))
        assert asked_of(small, made).endswith("Question: Is it so?")
    hotpot(path, [long], 30)
    with pytest.raises(ValueError, match="question_room: qa_2 reserves 192 tokens for the question"):
        make_sample("qa_2", small, length=1500, seed=0, sources=Sources(hotpotqa=path))
