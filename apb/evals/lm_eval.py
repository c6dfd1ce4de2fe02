"""The methods as a model of lm-evaluation-harness (`lm_eval`), under the name "apb".

    import apb.evals.lm_eval                                                   # registers it
    lm_eval.simple_evaluate(model="apb", model_args={"model": …, "method": "apb", "hosts": 4}, tasks=[…])

The harness gives one text; the methods need document and question apart. The text is split at the last `separator`:
what comes before it is the document, what follows it is the question.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from apb.evals.ask import Asker
from apb.evals.evaluate import method_for
from apb.evals.sample import Sample
from apb.hf import model_shape
from apb.models import load_model, load_tokenizer
from apb.prompt import Prompt

try:
    from lm_eval.api.model import LM  # ty: ignore[import-not-found]
    from lm_eval.api.registry import register_model  # ty: ignore[import-not-found]
except ImportError as error:
    raise ImportError("lm_eval is needed to run as a model of lm-evaluation-harness; pip install lm_eval") from error

__all__ = ["APBHarnessModel"]


@register_model("apb")
class APBHarnessModel(LM):
    """A model that attends by one of our methods, one question at a time.

    Args:
        model: a local directory, a hub id, or SmolLM2-135M-Instruct.
        method: its text. Where commas separate the harness's own arguments, write ; for them:
            "apb:anchor=1/4;passing=1/8".
        hosts: H, threads of this process.
        separator: of document and question; the default makes the last paragraph the question.
        adapter: a LoRA directory to merge into the model.
        dtype, device: "auto" is bfloat16 on a GPU, float32 on the CPU.
        max_new_tokens: if the harness does not say.
        batch_size: 1, the only one there is.
        max_batch_size: the harness gives it; without meaning here.

    Raises:
        ValueError: a method or model that is not there, or another batch size.
    """

    def __init__(
        self,
        model: str,
        *,
        method: str = "apb",
        hosts: int = 4,
        separator: str = "\n\n",
        adapter: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        max_new_tokens: int = 128,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.method, self.hosts, self.separator = method.replace(";", ","), int(hosts), separator
        if self.hosts < 1:
            raise ValueError(f"hosts: expected at least 1, got {hosts}")
        if str(batch_size) != "1":
            raise ValueError(f"batch_size: questions are asked one at a time; expected 1, got {batch_size}")
        if not separator:
            raise ValueError("separator: expected some text between document and question, got ''")
        method_for(self.method, tokens=1, hosts=1)  # refuses unknown names before anything is loaded
        device = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        dtype = dtype if dtype != "auto" else "bfloat16" if device.startswith("cuda") else "float32"
        self.max_new_tokens, self.tokenizer = int(max_new_tokens), load_tokenizer(model)
        more: dict[str, Any] = {} if adapter is None else {"adapter": Path(adapter)}
        self.model = load_model(model, device=torch.device(device), dtype=getattr(torch, dtype), **more)
        self._name, self._shape = model, model_shape(self.model.config)
        stop = self.model.generation_config.eos_token_id
        stops = {self.tokenizer.eos_token_id, *(stop if isinstance(stop, list) else [stop])} - {None}
        self._answers = Asker(self.model, stop_tokens=sorted(stops))
        self._scores = Asker(self.model)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answer greedily, each text up to the first of its stop strings.

        Raises:
            ValueError: a text without the separator, or settings that ask for sampling.
        """
        todo = []
        for context, settings in (request.args for request in requests):
            if settings.get("do_sample") and settings.get("temperature", 1.0):
                raise ValueError(f"do_sample: answers are greedy; expected False, got {settings}")
            most = int(settings.get("max_gen_toks") or self.max_new_tokens)
            until = settings.get("until") or []
            document, query = self._split(context)
            todo.append(
                (self._sample(document, self._ids(query), []), most, [until] if isinstance(until, str) else until)
            )
        texts = []
        for (sample, most, until), request in zip(todo, requests, strict=True):
            text = self.tokenizer.decode(self._ask(self._answers, sample, most).tokens, skip_special_tokens=True)
            ends = [text.find(stop) for stop in until if stop and stop in text]
            texts.append(text[: min(ends, default=len(text))])
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood, and whether it is what the model would have said greedily.

        Raises:
            ValueError: a text without the separator, or an empty continuation.
        """
        samples = [self._sample(*self._continued(*request.args)) for request in requests]
        found = []
        for sample, request in zip(samples, requests, strict=True):
            tokens = sample.answer_ids.tolist()
            answer = self._ask(self._scores, sample, len(tokens))
            found.append((-answer.nll * len(tokens), answer.tokens == tokens))
            self.cache_hook.add_partial("loglikelihood", request.args, found[-1])
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Refuse: a text's own likelihood has no question, and these methods need one."""
        raise NotImplementedError(
            "loglikelihood_rolling: the likelihood of a whole text is not defined for methods that split document and "
            "question; take tasks of type generate_until, loglikelihood or multiple_choice"
        )

    @property
    def tokenizer_name(self) -> str:
        """The model's name, by which the harness keeps its caches apart."""
        return self._name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the tokenizer's chat template if the harness asks for one."""
        return (getattr(self.tokenizer, "chat_template", None) or "") if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Write messages in the tokenizer's chat template."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _split(self, context: str) -> tuple[str, str]:
        """Return document and question; both together are the context."""
        body = context.rstrip()  # a separator at the very end separates nothing
        place = body.rfind(self.separator) + len(self.separator)
        if self.separator not in body or not body[:place].strip():
            raise ValueError(
                f"separator: expected {self.separator!r} between document and question, got a text without it: "
                f"…{context[-60:]!r}; give another with separator="
            )
        return context[:place], context[place:]

    def _continued(self, context: str, continuation: str) -> tuple[str, list[int], list[int]]:
        """Return the document, the question's tokens and the continuation's, tokenised in their context."""
        document, query = self._split(context)
        stem = query.rstrip(" ")
        asked = self._ids(stem)
        answer = self._ids(query + continuation)[len(asked) :]
        if not answer:
            raise ValueError(f"continuation: expected some text, got {continuation!r}")
        return document, asked, answer

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _sample(self, document: str, query: Sequence[int], answer: Sequence[int]) -> Sample:
        if len(query) < 2:
            raise ValueError(f"separator: expected a question of 2 tokens or more behind it, got {len(query)}")
        ids, bos = self._ids(document), self.tokenizer.bos_token_id
        prefix = [] if bos is None or ids[:1] == [bos] else [bos]
        return Sample(
            task="lm_eval",
            seed=0,
            # The question's last token runs behind the prefill: the first new token is chosen from its logits.
            prompt=Prompt(
                document=torch.tensor([prefix + ids]),
                query=torch.tensor([list(query[:-1])]),
                suffix=torch.tensor([list(query[-1:])]),
                prefix_tokens=int(bos is not None and (prefix + ids)[:1] == [bos]),
            ),
            answer="",
            answer_ids=torch.tensor(list(answer) or [query[-1]]),
            references=(),
            depths=(),
            facts={},
        )

    def _ask(self, asker: Asker, sample: Sample, max_new_tokens: int) -> Any:
        tokens = sample.prompt.document.shape[1]
        method = method_for(self.method, tokens=tokens, hosts=self.hosts)
        method = method.prepare(self._shape, self.model.device, self.model.dtype)
        hosts = 1 if method.one_host else self.hosts
        return asker.ask([sample], method, hosts, max_new_tokens=max_new_tokens)[0]
