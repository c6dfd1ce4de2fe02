"""Examples to train heads on: functions of seed and number, windows of text, and made ahead in the same order."""

import hashlib
import multiprocessing
from dataclasses import replace

import pytest
import torch
from training_cases import byte_tokenizer, task_tokenizer

from apb.evals import Sources
from apb.testing.tiny import tiny_model
from apb.train.checkpoint import check_same_run
from apb.train.examples import GeneratedExamples
from apb.train.labels import observe
from apb.train.prefetch import prefetch
from apb.train.text_examples import TextExamples


class Numbers:
    def make(self, number):
        if number == 13:
            raise ValueError("thirteen")
        return number


@pytest.mark.parametrize("workers", [0, 2])
def test_prefetch_keeps_the_order_and_passes_errors_on(workers):
    assert list(prefetch(Numbers(), range(3, 13), workers=workers)) == list(range(3, 13))
    assert list(prefetch(Numbers(), range(3, 3), workers=workers)) == []
    with pytest.raises(ValueError, match=r"^thirteen$"):
        list(prefetch(Numbers(), range(10, 20), workers=workers))
    some = prefetch(Numbers(), range(5), workers=workers)
    assert next(some) == 0
    some.close()
    assert not multiprocessing.active_children()


def test_generated_examples_are_functions_of_seed_and_number():
    examples = GeneratedExamples(tokenizer=task_tokenizer(), tasks=["niah_single_1", "vt"], lengths=[900, 1000], seed=5)
    for held_out in (False, True):
        made = [examples.make(number, held_out=held_out) for number in range(4)]
        again = examples.make(2, held_out=held_out)
        assert torch.equal(again.prompt.document, made[2].prompt.document) and torch.equal(again.answer, made[2].answer)
        assert all(example.prompt.prefix_tokens == 1 and example.answer.shape[0] == 1 for example in made)
    assert {example.name for example in made} == {
        f"{task} at {length} tokens" for task in ("niah_single_1", "vt") for length in (900, 1000)
    }
    one, other = (examples.make(0, held_out=held_out) for held_out in (False, True))
    assert one.prompt.document.tolist() != other.prompt.document.tolist()
    observe(tiny_model(vocab_size=2000), one, "anchor")
    for setting, says in (
        ({"tasks": []}, "tasks: expected at least one"),
        ({"lengths": []}, "lengths: expected at le"),
    ):
        with pytest.raises(ValueError, match=says):
            GeneratedExamples(**({"tokenizer": None, "tasks": ["vt"], "lengths": [900]} | setting))


def test_a_file_that_changed_under_its_name_is_noticed(tmp_path):
    haystack = tmp_path / "text.txt"
    haystack.write_text("One. Two. Three. Four.")
    sources = Sources(split="training", haystack=haystack)
    examples = GeneratedExamples(tokenizer=None, tasks=["niah_single_2"], lengths=[900], seed=5, sources=sources)
    before = examples.facts()
    assert before["haystack"] == "text.txt" and before["data_seed"] == "5"
    assert before["haystack_sha256"] == hashlib.sha256(haystack.read_bytes()).hexdigest()[:12]
    haystack.write_text("One. Two. Three. Five.")
    with pytest.raises(ValueError, match=r"haystack_sha256: expected .*, got .*can only be resumed so"):
        check_same_run(before, examples.facts(), tmp_path)
    other = replace(examples, seed=6)
    with pytest.raises(ValueError, match=r"^data_seed: expected 5, got 6"):
        check_same_run(examples.facts(), other.facts(), tmp_path)


def test_windows_of_text(tmp_path):
    text = "".join(chr(97 + i % 26) + chr(97 + i // 26 % 26) for i in range(1000))
    (tmp_path / "a.txt").write_text(text)
    sizes = {"lengths": [40, 60], "query_tokens": 5, "answer_tokens": 7}
    examples = TextExamples(byte_tokenizer(), [tmp_path / "a.txt"], **sizes)
    decode = byte_tokenizer().decode
    for held_out in (False, True):
        for number in range(20):
            made = examples.make(number, held_out=held_out)
            p = made.prompt
            parts = (p.document[0, 1:], p.query[0], made.answer[0])
            window = "".join(decode(part) for part in parts)
            assert window in (text[1800:] if held_out else text[:1800])
            assert len(window) + 1 in (40, 60) and len(p.query[0]) == 5 and len(made.answer[0]) == 7
            assert p.prefix_tokens == 1 and p.suffix.shape == (1, 0)
    assert examples.facts()["data"] == "a.txt"
    with pytest.raises(
        ValueError, match=r"data: .*a\.txt has 2000 tokens; expected at least \d+, so that its held-out"
    ):
        TextExamples(byte_tokenizer(), [tmp_path / "a.txt"], **(sizes | {"lengths": [300]}))
    with pytest.raises(ValueError, match=r"data: cannot read .*b\.txt as UTF-8 text .*or 'generated'"):
        TextExamples(byte_tokenizer(), [tmp_path / "b.txt"], **sizes)
    with pytest.raises(ValueError, match="lengths: expected at least 15 tokens with this question and answer"):
        TextExamples(byte_tokenizer(), [tmp_path / "a.txt"], **(sizes | {"lengths": [14]}))
    for more, says in (
        ({"answer_tokens": 0}, "answer_tokens: expected at least 1, got 0"),
        ({"lengths": []}, "lengths"),
    ):
        with pytest.raises(ValueError, match=says):
            TextExamples(byte_tokenizer(), [tmp_path / "a.txt"], **(sizes | more))
    with pytest.raises(ValueError, match="data: expected 'generated' or at least one text file"):
        TextExamples(byte_tokenizer(), [], **sizes)
