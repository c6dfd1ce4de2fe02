"""What is true of every sample, and of each task's: the answer is read back out of the document."""

import json
import re
from collections import Counter
from itertools import accumulate

import torch
from task_cases import NIAH, asked_of, text_of

from apb.evals import TASKS, niah


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
