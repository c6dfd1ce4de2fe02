"""`evaluate` as Python calls it: refused before it loads, heads read once a cell, and failures that name the sample."""

import pytest
from eval_cases import heads_file, save_tiny_model

from apb.compress import load_retaining_head
from apb.compress.retaining_head import save_retaining_head
from apb.evals.check import check
from apb.evals.evaluate import Evaluation, PreparedMethods, cells, evaluate, load_subject
from apb.evals.store import Store

pytest.importorskip("wonderwords")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a directory with a tiny model whose tokenizer knows the words of the tasks."""
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def evaluated(folder, **changes):
    plain = {"tasks": ("niah_single_1",), "lengths": (512,), "methods": ("flash",), "hosts": (3,), "samples": 2}
    return Evaluation(model=str(folder), max_new_tokens=1, **{"device": "cpu"} | plain | changes)


def test_a_sample_that_cannot_be_made_is_named_and_the_answers_before_it_are_kept(folder, monkeypatch, tmp_path):
    from apb.evals import evaluate as module

    def made(*arguments, seed, **settings):
        if seed == 1:
            raise ValueError("no room")
        return make_sample(*arguments, seed=seed, **settings)

    make_sample = module.make_sample
    monkeypatch.setattr(module, "make_sample", made)
    said = "niah_single_1 at 512 tokens with seed 1 cannot be made: no room"
    with pytest.raises(ValueError, match=f"^{said}$"):
        evaluate(evaluated(folder))
    with (
        Store(tmp_path) as store,
        pytest.raises(ValueError, match=f"^{said}; the answers so far are kept$"),
    ):
        evaluate(evaluated(folder), store=store)


def test_a_checkpoint_is_read_once_a_cell_and_never_to_list_the_cells(folder, monkeypatch, tmp_path):
    import apb.methods.names as names

    heads_file(tmp_path / "heads.safetensors", folder, seed=0)
    read = []
    monkeypatch.setattr(names, "load_retaining_head", lambda path: read.append(path) or load_retaining_head(path))
    method = f"apb:compressor=retaining-head,heads={tmp_path / 'heads.safetensors'}"
    setting = evaluated(folder, methods=(method, "minference"), samples=3, hosts=(2, 3), batch_tokens=1)
    assert [(cell.method, cell.hosts) for cell in cells(setting)] == [(method, 2), (method, 3), ("minference", 1)]
    assert not read
    assert len(evaluate(setting)) == 9
    assert len(read) == 3  # one to check the setting, one for each number of hosts
    prepared = PreparedMethods(load_subject(setting).model)
    assert prepared(method, tokens=100, hosts=2) is prepared(method, tokens=100, hosts=2)
    assert len(read) == 4


def test_heads_for_another_model_are_told_of_before_the_model_is_loaded(folder, tmp_path, recwarn):
    path = tmp_path / "heads.safetensors"
    heads_file(path, folder, seed=0)
    setting = evaluated(folder, methods=("flash", f"apb:compressor=retaining-head,heads={path}"))
    for name in (None, folder.name, "another"):
        assert not recwarn.list
        save_retaining_head(load_retaining_head(path), path, {"base_model": name} if name else None)
        check(setting)
    (told,) = {str(warning.message) for warning in recwarn.list}
    assert f"trained for another, and are to run with {folder}," in told


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"methods": ("spiral",)}, "methods: expected some of flash"),
        ({"methods": ("star:anchor=x",)}, "anchor: expected an integer"),
        ({"device": "nonsense"}, "device: expected auto, cpu"),
        ({"dtype": "float8"}, "dtype: expected auto, float32"),
    ],
)
def test_a_setting_is_refused_before_the_model_is_loaded(folder, monkeypatch, change, said):
    from apb.evals import evaluate as module

    monkeypatch.setattr(module, "load_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=said):
        evaluate(evaluated(folder, **change))
