"""The report averages what can be averaged, compares like with like, and says what is missing."""

import json
import random
from dataclasses import replace

import pytest

from apb.evals.plots import budget_curve, dots, has_curve
from apb.evals.record import Record
from apb.evals.report import make_report, split_label
from apb.evals.statistics import mean_interval, paired_difference
from apb.methods import METHODS

ABLE = {"flash": 0.95, "apb": 0.9, "apb:passing=0": 0.5}


def answers(able=ABLE, *, tasks=("niah", "vt"), lengths=(512,), hosts=(4,), samples=20, model="m"):
    """Make records: a question is harder or easier for all methods alike."""
    found = []
    for length in lengths:
        for task in tasks:
            for method, share in able.items():
                for h in (1,) if method in ("flash", "minference") else hosts:
                    for seed in range(samples):
                        hard = random.Random(f"{length}/{task}/{seed}").random()
                        found.append(
                            Record(model=model, method=method, hosts=h, length=length, task=task, seed=seed,
                                   score=float(hard < share), nll=1.5 - share + hard, prediction="", references=())
                        )  # fmt: skip
    return found


def of(records, **wanted):
    return [r for r in records if all(getattr(r, name) == value for name, value in wanted.items())]


def report(records, **settings):
    return make_report(records, resamples=500, **settings)


def test_a_line_is_what_statistics_say():
    records = answers()
    (section,) = report(records).sections
    assert [line.method for line in section.lines] == ["flash", "apb", "apb:passing=0"]
    full, apb, _ = section.lines
    mine, theirs = of(records, method="apb"), of(records, method="flash")
    by_task = {task: [r.score for r in of(mine, task=task)] for task in ("niah", "vt")}
    assert apb.mean == mean_interval(by_task, ends=(0, 1), resamples=500)
    assert apb.nll == mean_interval({t: [r.nll for r in of(mine, task=t)] for t in by_task}, resamples=500)
    assert apb.scores["vt"].value == sum(by_task["vt"]) / 20 and apb.samples == {"niah": 20, "vt": 20}
    assert apb.difference == paired_difference(mine, theirs, resamples=500)
    assert apb.nll_difference == paired_difference(mine, theirs, "nll", resamples=500)
    assert full.difference is None and full.nll_difference is None and full.mean is not None


def test_a_section_for_each_model_length_and_hosts_with_full_attention_in_each():
    able = {**ABLE, "minference": 0.8}
    records = answers(able, lengths=(1024, 512), hosts=(8, 4)) + answers(able, model="n")
    sections = report(records).sections
    assert [(s.model, s.length, s.hosts) for s in sections] == [
        ("m", 512, 4), ("m", 512, 8), ("m", 1024, 4), ("m", 1024, 8), ("n", 512, 4)
    ]  # fmt: skip
    for section in sections:
        assert [(line.method, line.hosts) for line in section.lines] == [
            ("flash", 1), ("apb", section.hosts), ("apb:passing=0", section.hosts), ("minference", 1)
        ]  # fmt: skip
    (alone,) = report(of(records, method="flash", model="n")).sections
    assert alone.hosts == 1 and alone.title == "n, 512 tokens, 1 host"


def test_what_full_attention_cannot_do_is_marked_and_left_out():
    easy, hopeless = answers(), answers({"flash": 0.2, "apb": 0.3, "apb:passing=0": 0.1}, tasks=("cwe",))
    (section,) = report(easy + hopeless).sections
    assert section.left_out == ("cwe",) and section.averaged == ("niah", "vt")
    (without,) = report(easy).sections
    for line, other in zip(section.lines, without.lines, strict=True):
        assert (line.mean, line.difference) == (other.mean, other.difference)
        assert "cwe" in line.scores
        likelihoods = {t: [r.nll for r in of(easy + hopeless, method=line.method, task=t)] for t in section.tasks}
        assert line.nll == mean_interval(likelihoods, resamples=500) != other.nll  # of all three tasks
    assert "cwe*" in section.head()
    assert "Left out of mean scores: cwe, which full attention scores below 50%." in section.notes
    assert report(easy + hopeless, threshold=0.0).sections[0].left_out == ()
    (none,) = report(hopeless).sections
    assert all(line.mean is None and line.difference is None and line.nll for line in none.lines)
    assert none.lines[1].nll_difference is not None
    assert "There is no mean score: full attention can do none of the tasks." in none.notes
    half = [r for r in easy + hopeless if r.method != "apb" or r.task != "cwe"]
    (section,) = report(half).sections
    assert section.lines[1].mean is not None and section.lines[1].nll is None


def test_no_change_on_any_question_is_not_an_interval_of_no_width():
    made = report(answers({"flash": 0.9, "apb": 0.9}))
    difference = made.sections[0].lines[1].difference  # 40 questions
    assert difference.value == 0 and difference.low < -0.08 and difference.high > 0.08
    assert "[−3.7 / n, +3.7 / n]" in made.legend()


def test_labels_name_and_order_the_lines():
    (section,) = report(answers(), labels={"apb:passing=0": "APB | nothing passed", "star": "Star"}).sections
    assert [line.label for line in section.lines] == ["full attention", "APB | nothing passed", "apb"]
    markdown = report(answers(), labels={"apb:passing=0": "APB | nothing passed"}).markdown()
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(rows) == 5 and {row.replace("\\|", "").count("|") for row in rows} == {8}


def test_an_unfinished_run_says_so_and_compares_the_questions_that_both_answered():
    records = answers()
    part = [r for r in records if not (r.method == "apb" and r.task == "vt" and r.seed >= 7)]
    (section,) = report(part).sections
    apb = section.lines[1]
    assert apb.samples == {"niah": 20, "vt": 7}
    assert any("apb: unfinished (vt 7 of 20)" in note for note in section.notes)
    both = [r for r in part if r.task == "niah" or r.seed < 7]
    assert apb.difference == paired_difference(of(both, method="apb"), of(both, method="flash"), resamples=500)

    part = [r for r in records if not (r.method == "apb" and r.task == "vt")]
    (section,) = report(part).sections
    apb = section.lines[1]
    assert apb.mean is None and apb.difference is None and apb.nll is None
    assert section.rows()[1] == ("apb", *section.rows()[1][1:2], "–", "–", "–", "–", "–")
    assert any("apb: unfinished (vt 0 of 20)" in note for note in section.notes)


def test_without_full_attention_there_is_no_difference():
    (section,) = report(of(answers(), method="apb")).sections
    assert section.lines[0].difference is None and section.lines[0].mean is not None
    assert any(note.startswith("Full attention has not been run") for note in section.notes)


def test_full_attention_far_behind_shows_no_difference_but_the_scores():
    records = [r for r in answers() if r.method != "flash" or r.task == "niah"]
    (section,) = report(records).sections
    assert all(line.difference is None for line in section.lines)
    assert any("full attention: unfinished (vt 0 of 20)" in note for note in section.notes)


def test_one_sample_has_no_interval():
    made = report(answers(samples=1))
    assert any("undefined" in note for note in made.sections[0].notes)
    assert "[undefined]" in made.markdown()
    assert json.loads(made.json())["sections"][0]["lines"][1]["mean"]["low"] is None


def test_json_is_strict_and_takes_more():
    records = [replace(r, nll=float("nan")) for r in answers()]
    found = json.loads(report(records).json(runs=[1]), parse_constant=pytest.fail)
    assert found["runs"] == [1] and found["threshold"] == 0.5
    assert found["sections"][0]["lines"][0]["nll"] == {"value": None, "low": None, "high": None}


def test_errors():
    with pytest.raises(ValueError, match="records: there are none"):
        make_report([])
    with pytest.raises(ValueError, match=r"threshold: expected a share in \[0, 1\], got 50"):
        make_report(answers(), threshold=50)


@pytest.mark.parametrize(
    ("text", "method", "label"),
    [
        *((name, name, name) for name in METHODS),
        ("star:anchor=1/4", "star:anchor=1/4", "star:anchor=1/4"),
        ("Star, a quarter@star:anchor=1/4", "star:anchor=1/4", "Star, a quarter"),
        ("APB: random = luck@apb:compressor=random", "apb:compressor=random", "APB: random = luck"),
        ("apb@apb:passing=0", "apb:passing=0", "apb"),
        ("apb:heads=a@b.pt", "apb:heads=a@b.pt", "apb:heads=a@b.pt"),
        ("H@apb:heads=a@b.pt", "apb:heads=a@b.pt", "H"),
        ("spiral", "spiral", "spiral"),
    ],
)
def test_a_label_ends_at_the_first_at_sign_unless_a_method_begins_the_text(text, method, label):
    assert split_label(text) == (method, label)


def test_an_empty_label_is_refused():
    with pytest.raises(ValueError, match="expected a label before the @"):
        split_label("@apb")


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_pictures_are_drawn_of_finished_and_unfinished_runs(tmp_path, ending):
    able = {
        **ABLE,
        "apb:passing=32": 0.7,
        "apb:passing=32,compressor=random": 0.6,
        "apb:compressor=random,passing=0": 0.5,
    }
    records = answers(able, lengths=(512, 1024), hosts=(2, 4))[:-5]
    records = [r for r in records if not (r.length == 1024 and r.task == "vt" and r.method == "apb")]
    made = report(records)
    assert dots(made, tmp_path / f"dots.{ending}").stat().st_size > 5000
    assert has_curve(made, "passing") and not has_curve(made, "anchor")
    assert budget_curve(made, tmp_path / f"curve.{ending}").stat().st_size > 5000
    text = (tmp_path / f"curve.{ending}").read_bytes()
    assert ending == "png" or text.startswith(b"<?xml")


def test_curves_see_settings_with_spaces(tmp_path):
    made = report(answers({"flash": 0.9, "apb:passing = 32": 0.5, "apb: passing=64": 0.7}))
    assert has_curve(made, "passing") and budget_curve(made, tmp_path / "a.svg").exists()


def test_curves_need_two_budgets_of_one_unit(tmp_path):
    with pytest.raises(ValueError, match="expected a method with two values of anchor"):
        budget_curve(report(answers()), tmp_path / "a.svg", budget="anchor")
    fractions = report(answers({"flash": 0.9, "apb:passing=0": 0.5, "apb:passing=1/8": 0.7, "apb:passing=1/4": 0.8}))
    assert budget_curve(fractions, tmp_path / "b.svg").exists()
    mixed = report(answers({"flash": 0.9, "apb:passing=1/8": 0.7, "apb:passing=64": 0.8}))
    with pytest.raises(ValueError, match="got both"):
        budget_curve(mixed, tmp_path / "c.svg")
    with pytest.raises(ValueError, match=r"ending in \.svg"):
        dots(mixed, tmp_path / "d.txt")
