"""Samples: exactly so many tokens, the same everywhere, and an answer that is read back out of the document."""

import dataclasses
import hashlib
import os
import re
import subprocess
import sys
from copy import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizer import small_tokenizer
from task_cases import NIAH, write_sources

from apb.evals import OFFLINE, TASKS, Sources, lexicon, make_sample, sample
from apb.models import DEMO_MODEL, cache_dir, load_tokenizer

pytest.importorskip("wonderwords")
pytest.register_assert_rewrite("task_checks")  # a check that fails shows its values, as a test does

from task_checks import check  # noqa: E402

TEXT = [name for name in TASKS if TASKS[name].needs == "haystack"]


@pytest.fixture(scope="module", params=["small", "real"])
def tokenizer(request):
    if request.param == "small":
        return small_tokenizer()
    if not (cache_dir() / "models" / DEMO_MODEL / "config.json").is_file():
        pytest.skip(f"needs {DEMO_MODEL} in the cache")
    return load_tokenizer(DEMO_MODEL)


@pytest.fixture(scope="module")
def small():
    return small_tokenizer()


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """Return every source: a chapter, and a small file in each question format."""
    return write_sources(tmp_path_factory.mktemp("questions"))


@pytest.mark.parametrize("length", [512, 1024, 2048, 4096, 8192])
@pytest.mark.parametrize("name", TASKS)
def test_a_sample_has_its_tokens_and_its_answer(tokenizer, sources, name, length):
    for seed in range(2):
        try:
            sample = make_sample(name, tokenizer, length=length, seed=seed, sources=sources)
        except ValueError as error:
            assert length <= 1024 and f"length: {name} needs at least" in str(error)
            assert length == 512 or name == "cwe"
            continue
        check(tokenizer, sample, length)


@settings(max_examples=60)
@given(
    name=st.sampled_from(sorted(TASKS)),
    length=st.integers(1300, 3000),
    seed=st.integers(-5, 2**40),
    split=st.sampled_from(["evaluation", "training"]),
)
def test_any_length_is_met(small, sources, name, length, seed, split):
    sources = dataclasses.replace(sources, split=split)
    check(small, make_sample(name, small, length=length, seed=seed, sources=sources), length)


@pytest.mark.parametrize("name", TASKS)
def test_the_least_length_that_an_error_names_is_about_enough(small, sources, name):
    length = 16
    for _ in range(8):  # another length draws another document, which may need a few tokens more
        try:
            check(small, make_sample(name, small, length=length, seed=0, sources=sources), length)
            break
        except ValueError as error:
            least, got = map(int, re.search(r"at least (\d+) tokens with this seed, got (-?\d+)", str(error)).groups())
            assert got == length < least < 1300
            length = least
    else:
        pytest.fail(f"{length} is not enough either")


def ids_of(sample):
    prompt = sample.prompt
    return [ids.tolist() for ids in (prompt.document, prompt.query, prompt.suffix, sample.answer_ids)]


@pytest.mark.parametrize("name", TASKS)
def test_the_same_arguments_give_the_same_sample(small, sources, name):
    def make(seed=0, length=1300, split="evaluation"):
        return make_sample(name, small, length=length, seed=seed, sources=dataclasses.replace(sources, split=split))

    first = make()
    state = torch.random.get_rng_state()
    again = make()
    assert torch.equal(state, torch.random.get_rng_state())
    assert ids_of(first) == ids_of(again) and first.facts == again.facts and first.depths == again.depths
    others = [make(seed=1), make(seed=2), make(length=1301), make(split="training")]
    assert all(ids_of(other)[0] != ids_of(first)[0] for other in others)
    assert len({other.references for other in [first, *others]}) > 1


class Characters:
    """One token a character, so that a process needs no tokenizer file."""

    chat_template = bos_token = None

    def __call__(self, texts, add_special_tokens):
        return SimpleNamespace(input_ids=[list(map(ord, text)) for text in texts])


def digest():
    """Return a digest of a sample of every task that needs no file."""
    total = hashlib.sha256()
    for name in OFFLINE:
        task = dataclasses.replace(TASKS[name], question_room=400)
        sample = make_sample(task, Characters(), length=8000, seed=3)
        total.update(repr((sample.prompt.document.tolist(), sample.answer, sample.depths)).encode())
    return total.hexdigest()


def test_every_process_draws_the_same_samples():
    script = "import test_eval_tasks; print(test_eval_tasks.digest())"
    settings = {"PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    run = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | settings, capture_output=True, text=True, timeout=120
    )
    assert run.stdout.strip() == digest(), run.stderr


def test_without_a_chat_template_the_answer_goes_on_behind_the_question(small):
    plain = copy(small)
    plain.chat_template = None
    sample = make_sample("passkey", plain, length=600, seed=0)
    assert sample.prompt.prefix_tokens == 0
    assert plain.decode(sample.prompt.suffix[0]) == " The pass key is"


@pytest.mark.parametrize("name", ["niah_single_1", "niah_multikey_2", "passkey", "kv_retrieval", "math_find", "vt"])
def test_over_many_seeds_the_facts_stand_everywhere(small, name):
    depths = [d for seed in range(120) for d in make_sample(name, small, length=2000, seed=seed).depths]
    assert set(range(1, 9)) <= {int(10 * depth) for depth in depths}
    assert min(depths) < 0.2 and max(depths) > 0.9


def test_facts_of_one_document_stand_apart(small, sources):
    for seed in range(20):
        depths = make_sample("niah_multiquery", small, length=4096, seed=seed, sources=sources).depths
        assert len(set(depths)) == 4 and list(depths) == sorted(depths)


def test_official_numbers_of_new_tokens():
    new = {name: task.max_new_tokens for name, task in TASKS.items()}
    assert {new[name] for name in NIAH} == {128}
    rest = {name: count for name, count in new.items() if name not in NIAH}
    assert rest == {
        **{"vt": 30, "cwe": 120, "fwe": 120, "qa_1": 32, "qa_2": 32},
        **{"passkey": 6, "number_string": 12, "kv_retrieval": 50, "math_find": 3, "math_calc": 256, "code_run": 5},
    }
    assert len(TASKS) == 19 and all(name == task.name for name, task in TASKS.items())
    assert set(TASKS) - set(OFFLINE) == {*TEXT, "qa_1", "qa_2"} and len(TEXT) == 5


def test_a_variant_of_a_task_is_a_task(small):
    task = dataclasses.replace(TASKS["math_calc"], max_new_tokens=3000)
    sample = make_sample(task, small, length=5500, seed=0)
    assert len(sample.references) == len(sample.facts["values"]) > 300 and sample.answer.endswith("]")
    assert task.score(sample.answer, sample.references) == 1


def test_a_task_and_its_name_give_the_same_sample(small):
    by_name, by_task, plainly = (
        draw(task, small, length=700, seed=4)
        for draw, task in (
            (make_sample, "passkey"),
            (make_sample, TASKS["passkey"]),
            (sample.make_sample, TASKS["passkey"]),
        )
    )
    assert ids_of(by_name) == ids_of(by_task) == ids_of(plainly)


def make(tokenizer, name="niah_single_2", length=1024, **sources):
    return make_sample(name, tokenizer, length=length, seed=0, sources=Sources(**sources))


def test_errors_name_what_is_wrong_and_the_way_out(small, sources, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"task: expected one of niah_single_1, .*code_run, got 'nial'"):
        make(small, "nial")
    with pytest.raises(ValueError, match="split: expected 'evaluation' or 'training', got 'test'"):
        Sources(split="test")
    for name in TEXT:
        with pytest.raises(ValueError, match=f"haystack: {name} needs a file; give one with --haystack FILE"):
            make(small, name)
    for name, kind in (("qa_1", "squad"), ("qa_2", "hotpotqa")):
        with pytest.raises(ValueError, match=f"{kind}: {name} needs a file; give one with --{kind} FILE"):
            make(small, name)
        with pytest.raises(ValueError, match=f"{kind}: there is no file '.*gone'"):
            make(small, name, **{kind: tmp_path / "gone"})
        for number, text in enumerate(("{", "{}", "[3]", '{"data": [{"paragraphs": [{}]}]}', '[{"question": "?"}]')):
            path = tmp_path / f"{kind}{number}.json"
            path.write_text(text, encoding="utf-8")
            with pytest.raises(ValueError, match=f"{kind}: '.*{path.name}' is not in its JSON format"):
                make(small, name, **{kind: path})
        path.write_text('{"data": []}' if kind == "squad" else "[]", encoding="utf-8")
        with pytest.raises(ValueError, match=f"{kind}: .* has no answerable question"):
            make(small, name, **{kind: path})
    task = dataclasses.replace(TASKS["passkey"], question_room=8)
    with pytest.raises(ValueError, match=r"question_room: passkey reserves 8 tokens .*replace\(TASKS\['passkey'\]"):
        make(small, task)
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    lexicon.words.cache_clear()
    with pytest.raises(ImportError, match=r"wonderwords is needed .*pip install 'apb\[eval\]'"):
        make(small, "niah_single_1")
    assert make(small, "passkey").references  # needs no words
