"""Samples: exactly so many tokens, the same everywhere, and an answer that is read back out of the document."""

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from copy import copy
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizer import ESTHER, small_tokenizer

from apb.evals import OFFLINE, TASKS, Sources, lexicon, make_sample, niah, sample, variable_tracking, words
from apb.evals.haystack import NOISE
from apb.models import DEMO_MODEL, cache_dir, load_tokenizer

pytest.importorskip("wonderwords")

NIAH = [name for name in TASKS if name.startswith("niah")]
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


PEOPLE = [f"{first}{last}" for first in ("Ana", "Bel", "Cor", "Dio", "Eme", "Fio") for last in ("ra", "lin", "das")]


def biography(name, town):
    return f"{name} was born in {town} and sold lamps there for many years, until the great flood came."


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """Return every source: a chapter, and a small file in each question format."""
    path = tmp_path_factory.mktemp("questions")
    articles = [
        {
            "title": name,
            "paragraphs": [
                {
                    "context": biography(name, f"{name}ville{i}"),
                    "qas": [
                        {
                            "question": f"Where was {name} born?",
                            "answers": [{"text": f"{name}ville{i}"}, {"text": f"{name}ville{i}"}],
                        },
                        {"question": "Who sold hats?", "is_impossible": True, "answers": []},
                    ],
                }
                for i in range(3)
            ],
        }
        for name in PEOPLE
    ]
    (path / "squad.json").write_text(json.dumps({"data": articles}), encoding="utf-8")
    items = [
        {
            "question": f"In which country was {name} born?",
            "answer": f"{name}land",
            "supporting_facts": [[name, 0], [f"{name}ville", 0], [name, 1]],
            "context": [
                [name, [biography(name, f"{name}ville"), " So it was."]],
                [f"{name}ville", [f"{name}ville is a town in {name}land."]],
                ["Lamps", ["Lamps shine."]],
            ],
        }
        for name in PEOPLE
    ]
    (path / "hotpotqa.json").write_text(json.dumps(items), encoding="utf-8")
    return Sources(haystack=ESTHER, squad=path / "squad.json", hotpotqa=path / "hotpotqa.json")


def text_of(tokenizer, sample):
    document = tokenizer.decode(sample.prompt.document[0, sample.prompt.prefix_tokens :])
    assert document.endswith("\n\n")
    return document


def check(tokenizer, sample, length):
    """Check what is true of every sample."""
    task, prompt = TASKS[sample.task], sample.prompt
    query, suffix = prompt.query.shape[1], prompt.suffix.shape[1]
    assert prompt.document.shape == (1, length - task.question_room - task.max_new_tokens)
    assert query > 0 and suffix > 0 and query + suffix <= task.question_room
    assert all(ids.dtype == torch.int64 for ids in (prompt.document, prompt.query, prompt.suffix, sample.answer_ids))
    assert tokenizer.decode(sample.answer_ids) == sample.answer and sample.answer[0] == " "
    assert sample.answer_ids.shape[0] <= task.max_new_tokens
    assert sample.references and all(reference in sample.answer for reference in sample.references)
    assert task.score(sample.answer, sample.references) == 1
    assert task.score("I do not know.", sample.references) == 0
    assert all(0 < depth < 1 for depth in sample.depths)
    assert any(set(sample.references) <= set(values) for values in sample.facts.values()) or sample.task in NIAH
    ends = tokenizer.decode(prompt.suffix[0])
    assert not ends.endswith(" ") and "assistant\n" in ends and "assistant\n " not in ends
    CHECKS[next(name for name in CHECKS if sample.task.startswith(name))](tokenizer, sample)


def asked_of(tokenizer, sample):
    return tokenizer.decode(sample.prompt.query[0])


def check_needles(tokenizer, sample):
    """Read all needles back, whole; what is asked for has the references and nothing else."""
    task, document = TASKS[sample.task], text_of(tokenizer, sample)
    found = {}
    for key, value in re.findall(rf"One of the special magic {task.kind}s for (\S+) is: (\S+)\.", document):
        found.setdefault(key, []).append(value)
    assert {key: tuple(values) for key, values in found.items()} == sample.facts
    values = [value for values in found.values() for value in values]
    assert len(set(values)) == len(values) and all(document.count(value) == 1 for value in values)
    assert all(re.fullmatch(r"[1-9]\d{6}" if task.kind == "number" else "[0-9a-f-]{36}", value) for value in values)
    assert all(re.fullmatch("[0-9a-f-]{36}" if task.key == "uuid" else "[a-z]+-[a-z]+", key) for key in found)
    asked = [key for key in found if re.search(rf"(for|,|and) {key}\b", asked_of(tokenizer, sample))]
    assert len(asked) == task.asked
    assert sample.references == tuple(value for key in asked for value in found[key])
    query, prefix = niah.ask(asked, task.kind, values=task.values)
    assert asked_of(tokenizer, sample) == query
    assert tokenizer.decode(sample.prompt.suffix[0]).endswith("\n" + prefix[1:])
    if task.hay != "needles":
        assert len(found) == task.keys
    check_places(tokenizer, sample, [f"for {k} is: {v}." for k in asked for v in found[k]])


def check_places(tokenizer, sample, facts):
    """Check that each fact stands at its depth."""
    assert len(sample.depths) == len(facts)
    tokens = sample.prompt.document.shape[1]
    for depth, fact in zip(sample.depths, facts, strict=True):
        at = round(depth * tokens)
        behind = tokenizer.decode(sample.prompt.document[0, at:])
        assert behind.index(fact) < 50  # what precedes it is the needle's own beginning


def check_variables(tokenizer, sample):
    document = text_of(tokenizer, sample)
    example, text = document.split("they are:", 1)
    assert re.fullmatch(r" (\w{3} ){4}\w{3}", text.splitlines()[0]) and "VAR " in example
    value = re.search(r"value (\d+)", asked_of(tokenizer, sample)).group(1)
    assigned = {}
    for name, right in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text):  # in order
        assigned[name] = assigned.get(right, right)
    assert tuple(assigned) == sample.references and set(assigned.values()) == {value} and len(assigned) == 5
    assert sample.facts == {value: sample.references}
    check_places(tokenizer, sample, [f"VAR {name} = " for name in sample.references])


def check_common(tokenizer, sample):
    listed = text_of(tokenizer, sample).rsplit("Memorize the ones that appear most often.", 1)[1]
    numbers, entries = zip(*re.findall(r"(\d+)\. ([a-z]+)", listed.split("\n")[1]), strict=True)
    assert list(map(int, numbers)) == list(range(1, len(entries) + 1))
    counts = Counter(entries)
    often = counts.most_common(10)
    assert {word for word, _ in often} == set(sample.references)
    assert {times for _, times in often} == ({6} if sample.prompt.document.shape[1] < 3900 else {30})
    assert all(times <= (1 if often[0][1] == 6 else 3) for _, times in counts.most_common()[10:])
    assert not any(common in word for word in counts for common in sample.references if word != common)


def check_frequent(tokenizer, sample):
    text = text_of(tokenizer, sample).split("frequently appeared coded words.")[1]
    counts = Counter(re.findall(r"\b[a-z]{6}\b", text)).most_common()
    assert [word for word, _ in counts[:3]] == list(sample.references)
    assert counts[2][1] > counts[3][1]


def check_digits(tokenizer, sample):
    document, (key,) = text_of(tokenizer, sample), sample.references
    what = {"passkey": "pass key", "number_string": "sequence of digits"}[sample.task]
    assert re.findall(r"\d+", document) == [key, key] and len(key) == (5 if sample.task == "passkey" else 10)
    assert what in asked_of(tokenizer, sample)
    check_places(tokenizer, sample, [f"The {what} is {key}. Remember it. {key} is the {what}."])


def check_pairs(tokenizer, sample):
    document = text_of(tokenizer, sample)
    pairs = json.loads(document[document.index("{") : document.index("}") + 1])
    assert {key: (value,) for key, value in pairs.items()} == sample.facts
    key = re.search('"(.*)"', asked_of(tokenizer, sample)).group(1)
    assert sample.references == (pairs[key],)
    check_places(tokenizer, sample, [f'"{key}": "{pairs[key]}"'])


def check_list(tokenizer, sample):
    document = text_of(tokenizer, sample)
    numbers = json.loads(document[document.index("[") : document.index("]") + 1])
    ranked = sorted(set(numbers))
    which = re.search("What is the (.*?) number", asked_of(tokenizer, sample)).group(1)
    answers = dict(zip(("largest", "second largest", "third largest"), ranked[::-1], strict=False))
    answers |= dict(zip(("smallest", "second smallest", "third smallest"), ranked, strict=False))
    for number in answers.values():
        assert numbers.count(number) == 1
    assert len(numbers) % 2 == 1
    answers["median"] = sorted(numbers)[len(numbers) // 2]
    assert {name: (str(number),) for name, number in answers.items()} == sample.facts
    assert sample.references == sample.facts[which]
    if which != "median":
        check_places(tokenizer, sample, [f", {answers[which]}"])


def check_sum(tokenizer, sample):
    text = text_of(tokenizer, sample).rsplit("Expression:", 1)[1]
    operands = re.sub(r"([+-]) ", r"\1", text[: text.index(".")]).split()
    values = tuple(map(str, accumulate(map(int, operands))))
    assert sample.facts == {"values": values}
    assert sample.references == values[: len(sample.references)]
    assert all(0 <= int(value) < 1000 for value in values)


def check_code(tokenizer, sample):
    document = text_of(tokenizer, sample)
    functions = {}
    exec(document[document.index("def ") :], functions)
    call = re.search(r"func_\d+\(\d+\)", asked_of(tokenizer, sample)).group()
    assert sample.references == (str(eval(call, functions)),)
    assert 2 <= len(sample.depths) <= 10
    at = round(sample.depths[0] * sample.prompt.document.shape[1])
    assert tokenizer.decode(sample.prompt.document[0, at:]).startswith(f"def {call.split('(')[0]}(x):")


def check_paragraphs(tokenizer, sample):
    document = text_of(tokenizer, sample)
    numbers = [int(number) for number in re.findall(r"Document (\d+):\n", document)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(sample.depths) == (1 if sample.task == "qa_1" else 2)
    assert document.count(sample.references[0]) == 1
    assert asked_of(tokenizer, sample).count(next(iter(sample.facts))) == 1


CHECKS = {
    "niah": check_needles,
    "vt": check_variables,
    "cwe": check_common,
    "fwe": check_frequent,
    "passkey": check_digits,
    "number_string": check_digits,
    "kv": check_pairs,
    "math_find": check_list,
    "math_calc": check_sum,
    "code": check_code,
    "qa": check_paragraphs,
}


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
