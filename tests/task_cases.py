"""A small file in each question format, and what the model reads of a sample."""

import json

from small_tokenizer import ESTHER

from apb.evals import TASKS, Sources

NIAH = [name for name in TASKS if name.startswith("niah")]
PEOPLE = [f"{first}{last}" for first in ("Ana", "Bel", "Cor", "Dio", "Eme", "Fio") for last in ("ra", "lin", "das")]


def biography(name, town):
    return f"{name} was born in {town} and sold lamps there for many years, until the great flood came."


def write_sources(path):
    """Write a small file in each question format; return every source, the haystack a chapter."""
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


def asked_of(tokenizer, sample):
    return tokenizer.decode(sample.prompt.query[0])
