"""The harness's model: full attention where a method is exact, no header taken for a document, and refusals."""

import importlib
import sys
import types

import pytest
import torch
from eval_cases import save_tiny_model

from apb.evals.haystack import NOISE

pytest.importorskip("wonderwords")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a directory with a tiny model whose tokenizer knows the words of the tasks."""
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def harness(monkeypatch):
    """Return our module on the least of lm_eval that a model of it meets."""

    class LM:
        def __init__(self):
            self.cache_hook = types.SimpleNamespace(add_partial=lambda *_: None)

    known = {}

    def register_model(name):
        return lambda cls: known.setdefault(name, cls)

    for name, parts in {
        "lm_eval": {}, "lm_eval.api": {}, "lm_eval.api.model": {"LM": LM},
        "lm_eval.api.registry": {"register_model": register_model},
    }.items():  # fmt: skip
        module = types.ModuleType(name)
        module.__dict__.update(parts)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "apb.evals.lm_eval", raising=False)
    module = importlib.import_module("apb.evals.lm_eval")
    yield known["apb"]
    del sys.modules["apb.evals.lm_eval"]
    assert module.APBHarnessModel is known["apb"]


DOCUMENT = f"{NOISE * 3} One of the special magic numbers is 12. {NOISE}\n\n"


QUERY = "What is the special magic number? The number is"


def requests(*arguments):
    return [types.SimpleNamespace(args=pair) for pair in arguments]


def test_the_harness_gets_full_attention_from_methods_that_are_exact(harness, folder):
    """Likelihoods and answers of one pass over the whole text; the ring gives them too."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([tokenizer(DOCUMENT).input_ids + tokenizer(QUERY + " 12 grass").input_ids])
    answer = tokenizer(" 12 grass").input_ids
    with torch.no_grad():
        logs = model(ids).logits.float().log_softmax(-1)[0]
    places = range(ids.shape[1] - len(answer) - 1, ids.shape[1] - 1)
    truth = sum(logs[at, token].item() for at, token in zip(places, answer, strict=True))
    with torch.no_grad():
        told = model.generate(ids[:, : -len(answer)], max_new_tokens=6, do_sample=False)[
            0, ids.shape[1] - len(answer) :
        ]
    said = tokenizer.decode(told, skip_special_tokens=True)
    for method in ("flash", "ring"):
        lm = harness(str(folder), method=method, hosts=3)
        ((found, greedy),) = lm.loglikelihood(requests((DOCUMENT + QUERY, " 12 grass")))
        assert found == pytest.approx(truth, rel=1e-3) and not greedy
        ((_, greedy),) = lm.loglikelihood(requests((DOCUMENT + QUERY, said)))
        assert greedy == (tokenizer(QUERY + said).input_ids[-6:] == told.tolist())
        settings = {"until": ["\n\n"], "max_gen_toks": 6}
        stop = said[len(said) // 2 :][:2]
        texts = lm.generate_until(
            requests((DOCUMENT + QUERY, settings), (DOCUMENT + QUERY, {**settings, "until": [stop]}))
        )
        assert texts == [said, said[: said.index(stop)]]


def test_the_harness_runs_every_method_with_settings(harness, folder):
    for method in ("apb:anchor=1/4;passing=1/8", "star", "ape", "ring-zigzag", "minference"):
        lm = harness(str(folder), method=method, hosts="2", batch_size="1", max_batch_size=None)
        (text,) = lm.generate_until(requests((DOCUMENT + QUERY, {"max_gen_toks": 2})))
        assert isinstance(text, str)


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)  # a blank line behind each header, as Llama 3 has it


def test_a_chat_header_is_no_document(harness, folder):
    lm = harness(str(folder), method="flash")
    lm.tokenizer.chat_template = CHATML
    user, bot = "<|im_start|>user\n\n", "<|im_end|>\n<|im_start|>assistant\n\n"

    def chat(*messages):
        roles = ("user", "assistant") * len(messages)
        return lm.apply_chat_template([{"role": role, "content": text} for role, text in zip(roles, messages)])  # noqa: B905

    assert chat("Who?") == f"{user}Who?{bot}"
    for text in (chat("Who are you?"), "<|im_start|>system\n\nBe kind.<|im_end|>\n" + chat("Who are you?")):
        for gen_prefix in ("", "The answer is"):
            with pytest.raises(ValueError, match=r"separator: expected .* got a text without it: …'Who are you"):
                lm.generate_until(requests((text + gen_prefix, {})))
    assert lm._split(chat("One.\n\nTwo.\n\nWho?")) == (f"{user}One.\n\nTwo.\n\n", f"Who?{bot}")
    assert lm._split(chat("One.\n\nWho?") + "He") == (f"{user}One.\n\n", f"Who?{bot}He")
    shots = chat("Who?", "Him.", "Who else?")  # a lone question behind earlier ones: these are the document
    assert lm._split(shots) == (shots[: shots.rindex("Who else")], f"Who else?{bot}")
    shots = chat("One.\n\nWho?", "Him.", "Two.\n\nWho else?")
    assert lm._split(shots)[1] == f"Who else?{bot}"


def test_an_empty_context_is_the_prefix_token_and_plain_full_attention(harness, folder):
    lm = harness(str(folder), method="apb", hosts=3)
    with pytest.raises(ValueError, match="context: an empty one needs a BOS or EOS token"):
        lm.loglikelihood(requests(("", " 12")))
    lm.tokenizer.bos_token, lm.tokenizer.eos_token = "a", "z"
    tokens = lm.tokenizer(" 12 grass").input_ids
    ids = torch.tensor([[lm.tokenizer.bos_token_id, *tokens]], device=lm.model.device)
    with torch.no_grad():
        logs = lm.model(ids).logits[0, :-1].float().log_softmax(-1)
    truth = sum(logs[at, token].item() for at, token in enumerate(tokens))
    pairs = requests((DOCUMENT + QUERY, " 12"), ("", " 12 grass"))
    (_, (found, greedy)) = lm.loglikelihood(pairs)
    assert found == pytest.approx(truth, rel=1e-3) and not greedy
    (text,) = lm.generate_until(requests(("", {"max_gen_toks": 3})))
    assert text.startswith(lm.tokenizer.decode([lm.model(ids[:, :1]).logits[0, -1].argmax().item()]))
    ((_, greedy),) = lm.loglikelihood(requests(("", text)))
    assert greedy == (len(lm.tokenizer(text).input_ids) == 3)
    with pytest.raises(ValueError, match="continuation: expected some text"):
        lm.loglikelihood(requests(("", "")))


def test_a_trailing_space_belongs_to_the_answer(harness, folder):
    lm = harness(str(folder), method="flash")
    pairs = requests((DOCUMENT + QUERY, " 12"), (DOCUMENT + QUERY + " ", "12"))
    first, second = lm.loglikelihood(pairs)
    assert first == second


def test_the_harness_is_told_what_cannot_be(harness, folder):
    with pytest.raises(ValueError, match=r"batch_size: .* got 8"):
        harness(str(folder), batch_size=8)
    with pytest.raises(ValueError, match="method: expected one of"):
        harness(str(folder), method="spiral")
    lm = harness(str(folder), method="flash")
    for text in ("one paragraph", "one\n\n", "\n\none"):
        with pytest.raises(ValueError, match="separator: expected"):
            lm.generate_until(requests((text, {})))
    with pytest.raises(ValueError, match="do_sample"):
        lm.generate_until(requests((DOCUMENT + QUERY, {"do_sample": True, "temperature": 0.7})))
    with pytest.raises(ValueError, match="continuation: expected some text"):
        lm.loglikelihood(requests((DOCUMENT + QUERY, "")))
    with pytest.raises(NotImplementedError, match="loglikelihood_rolling"):
        lm.loglikelihood_rolling([])


def test_without_the_harness_the_way_out_is_named():
    with pytest.raises(ImportError, match=r"pip install 'apb\[lm-eval\]'"):
        importlib.import_module("apb.evals.lm_eval")
