"""A store survives being killed anywhere, refuses to mix runs, and merges what several processes wrote."""

import json
import math
from dataclasses import replace

import pytest

from apb.evals.record import Record
from apb.evals.store import Store, read_records, read_settings

RECORD = Record(model="m", method="apb:passing=0", hosts=4, length=512, task="vt", seed=0, score=0.4, nll=1 / 3,
                prediction="Ünicode\n\"and\" all\u2028", references=("a", "b"))  # fmt: skip


def record(seed, **changes):
    return replace(RECORD, seed=seed, **changes)


def test_what_is_added_is_read_again(tmp_path):
    odd = [record(0), record(1, nll=math.inf), record(2, references=())]
    with Store(tmp_path / "new" / "run") as store:
        store.add(odd[:2])
        store.add(odd[2:])
        assert store.done(odd[2].key) and not store.done(record(9).key) and len(store) == 3
        found = store.records()
    assert found[0] == odd[0] and found[2] == odd[2]
    assert math.isnan(found[1].nll) and "NaN" not in (store.path).read_text()


def test_what_is_there_is_not_written_again(tmp_path):
    with Store(tmp_path) as store:
        store.add([record(0), record(0, score=1.0)])
        store.add([record(0, score=0.0), record(1)])
    assert [r.seed for r in read_records(tmp_path)] == [0, 1]
    with Store(tmp_path) as store:
        assert store.done(record(0).key) and len(store) == 2


def test_a_file_cut_off_anywhere_loses_no_whole_record(tmp_path):
    with Store(tmp_path) as store:
        store.add([record(seed) for seed in range(3)])
    whole = store.path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(0, len(whole) + 1, 7):
        store.path.write_bytes(whole[:cut])
        notes, complete = [], sum(end <= cut for end in ends)
        assert len(read_records(tmp_path, on_note=notes.append)) == complete
        assert len(notes) == (cut not in (0, *ends))
        with Store(tmp_path) as again:
            again.add([record(seed) for seed in range(3)])
        assert [r.seed for r in read_records(tmp_path)] == [0, 1, 2]
        assert all(json.loads(line) for line in store.path.read_text().split("\n")[:-1])


def test_a_broken_line_before_others_is_an_error_with_its_place(tmp_path):
    with Store(tmp_path) as store:
        store.add([record(0)])
    line = store.path.read_text()
    for broken in ("{half\n", '{"model": 1}\n', "[]\n", "\n"):
        store.path.write_text(line + broken + line)
        with pytest.raises(ValueError, match=r"records-0-of-1.jsonl, line 2 is no record"):
            read_records(tmp_path)


def test_shards_are_merged_and_the_first_counts(tmp_path):
    with Store(tmp_path, shard=(0, 2)) as first, Store(tmp_path, shard=(1, 2)) as second:
        first.add([record(0), record(2, score=1.0)])
        second.add([record(1), record(2, score=0.0)])
        assert [(r.seed, r.score) for r in first.records()] == [(0, 0.4), (2, 1.0), (1, 0.4)]
    with Store(tmp_path) as store:  # however many there are next time
        assert len(store) == 3


def test_one_process_a_shard(tmp_path):
    with Store(tmp_path), pytest.raises(ValueError, match="another process is writing"):
        Store(tmp_path)
    Store(tmp_path).close()


@pytest.mark.parametrize("change", [{"model": "other"}, {"dtype": "float32"}, {"adapter": None}, {"haystack": "123"}])
def test_another_setting_is_refused_by_name_and_nothing_changes(tmp_path, change):
    settings = {"model": "m", "dtype": "bfloat16", "adapter": "lora", "haystack": "abc"}
    Store(tmp_path, settings=settings).close()
    before = (tmp_path / "settings.json").read_text()
    name = next(iter(change))
    with pytest.raises(ValueError, match=rf"^{name}: the records .* made with '.*', got .*--out"):
        Store(tmp_path, settings=settings | change)
    assert (tmp_path / "settings.json").read_text() == before
    Store(tmp_path, settings=settings).close()  # and the refused one holds no lock


def test_records_of_earlier_samples_are_not_gone_on_with(tmp_path):
    Store(tmp_path, settings={"model": "m"}).close()  # before the version was noted
    with pytest.raises(ValueError, match=r"^samples_version: the records in .* were made with 1, got 2"):
        Store(tmp_path, settings={"model": "m", "samples_version": 2})
    Store(tmp_path, settings={"model": "m", "samples_version": 1}).close()


def test_settings_labels_and_runs_accumulate(tmp_path):
    Store(tmp_path, settings={"model": "m"}, labels={"apb": "APB"}, run={"device": "A"}).close()
    Store(tmp_path, settings={"model": "m", "squad": "1"}, labels={"star": "Star"}, run={"device": "A"}).close()
    Store(tmp_path, settings={"model": "m"}, labels={"apb": "Ours"}, run={"device": "B"}).close()
    assert read_settings(tmp_path) == {
        "settings": {"model": "m", "squad": "1"},
        "labels": {"apb": "Ours", "star": "Star"},
        "runs": [{"device": "A"}, {"device": "B"}],
    }


def test_other_files_are_not_taken_for_a_store(tmp_path):
    (tmp_path / "settings.json").write_text("[]")
    with pytest.raises(ValueError, match="was not written by apb eval"):
        Store(tmp_path)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match="is not readable"):
        Store(tmp_path)
    with pytest.raises(ValueError, match="expected a folder"):
        Store(tmp_path / "settings.json")
    assert read_records(tmp_path / "nowhere") == []
