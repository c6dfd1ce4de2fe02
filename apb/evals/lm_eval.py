"""The methods as a model of lm-evaluation-harness (`lm_eval`), under the name "apb".

    import apb.evals.lm_eval                                                   # registers it
    lm_eval.simple_evaluate(model="apb", model_args={"model": …, "method": "apb", "hosts": 4}, tasks=[…])

The harness gives one text; the methods need document and question apart. The text is split at the last `separator`:
what comes before it is the document, what follows it is the question. In a chat template that is looked for in the last
user's message; if it has none, earlier messages (few-shot examples) are the document, and a lone one is refused. An
empty text has neither: what follows it is run with plain full attention behind the prefix token.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from apb.compress.retaining_head import warn_of_another_model
from apb.device import pick_device, pick_dtype
from apb.evals.ask import Answer, Asker
from apb.evals.evaluate import PreparedMethods, method_for
from apb.evals.sample import Sample
from apb.methods import METHODS, split_method
from apb.models import load_model, load_tokenizer, stop_tokens
from apb.prompt import Prompt, chat_frame

try:
    from lm_eval.api.model import LM  # ty: ignore[import-not-found]
    from lm_eval.api.registry import register_model  # ty: ignore[import-not-found]
except ImportError as error:
    raise ImportError(
        "lm_eval is needed to run as a model of lm-evaluation-harness; pip install 'apb[lm-eval]'"
    ) from error

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
        ValueError: a method, model, device or dtype that is not there, or another batch size.
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
        made = method_for(self.method, tokens=1, hosts=1)  # refuses unknown names before anything is loaded
        warn_of_another_model(getattr(made, "compressor", None), model=model, adapter=adapter)
        place = pick_device(device)
        weights = {"device": place, "dtype": pick_dtype(dtype, place), "adapter": Path(adapter) if adapter else None}
        self.max_new_tokens, self.tokenizer = int(max_new_tokens), load_tokenizer(model)
        self.model, self._name = load_model(model, **weights), model
        self._stops = stop_tokens(self.model, self.tokenizer)
        self._answers = Asker(self.model, stop_tokens=self._stops)
        self._scores = Asker(self.model)
        self._prepared = PreparedMethods(self.model)

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
            document, query = self._split(context) if context else ("", "")
            sample = self._sample(document, self._ids(query), []) if context else None
            todo.append((sample, most, [until] if isinstance(until, str) else until))
        texts = []
        for (sample, most, until), request in zip(todo, requests, strict=True):
            tokens = self._ask(self._answers, sample, most).tokens if sample else self._continue_nothing(most)
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            ends = [text.find(stop) for stop in until if stop and stop in text]
            texts.append(text[: min(ends, default=len(text))])
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood, and whether it is what the model would have said greedily.

        Raises:
            ValueError: a text without the separator, or an empty continuation.
        """
        todo = [self._continued(*request.args) for request in requests]
        samples = [self._sample(*parts) if parts[0] else None for parts in todo]
        found = []
        for sample, (*_, tokens), request in zip(samples, todo, requests, strict=True):
            if sample is None:
                found.append(self._score_alone(tokens))
            else:
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
        opener, closer = self._turn
        start = context.rfind(opener) + len(opener) if opener and opener in context else 0
        end = context.rfind(closer) if closer and closer in context[start:] else len(context)
        body = context[start:end].rstrip()  # a separator at the very end separates nothing
        place = body.rfind(self.separator)
        if place >= 0 and body[:place].strip():
            cut = start + place + len(self.separator)
        elif opener and opener in context[: max(0, start - len(opener))]:
            cut = start
        else:
            raise ValueError(
                f"separator: expected {self.separator!r} between document and question, got a text without it: "
                f"…{body[-60:]!r}; give another with separator="
            )
        return context[:cut], context[cut:]

    @cached_property
    def _turn(self) -> tuple[str, str]:
        """What a chat template writes before every user's message, and before the answer; empty without one."""
        if not getattr(self.tokenizer, "chat_template", None):
            return "", ""
        roles, marks = ("user", "assistant", "user"), ("<<apb-1>>", "<<apb-2>>", "<<apb-3>>")
        messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        first, later = text.partition(marks[0])[0], text.partition(marks[1])[2].partition(marks[2])[0]
        shared = takewhile(lambda pair: pair[0] == pair[1], zip(reversed(first), reversed(later), strict=False))
        return "".join(one for one, _ in shared)[::-1], chat_frame(self.tokenizer)[1].strip()

    def _continued(self, context: str, continuation: str) -> tuple[str, list[int], list[int]]:
        """Return the document, the question's tokens and the continuation's, tokenised in their context."""
        document, query = self._split(context) if context else ("", "")
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

    def _ask(self, asker: Asker, sample: Sample, max_new_tokens: int) -> Answer:
        hosts = 1 if METHODS[split_method(self.method)[0]].one_host else self.hosts
        method = self._prepared(self.method, tokens=sample.prompt.document.shape[1], hosts=hosts)
        return asker.ask([sample], method, hosts, max_new_tokens=max_new_tokens)[0]

    def _prefix(self) -> int:
        """Return the token that stands before an empty context: BOS, or where there is none the end of a text."""
        tokenizer = self.tokenizer
        found = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if found is None:
            raise ValueError("context: an empty one needs a BOS or EOS token, and this tokenizer has neither")
        return found

    @torch.inference_mode()
    def _score_alone(self, tokens: list[int]) -> tuple[float, bool]:
        """Return the log-likelihood of a text by itself, and whether the model would have said it greedily."""
        given = torch.tensor([[self._prefix(), *tokens[:-1]]], device=self.model.device)
        logs = self.model(given).logits[0].float().log_softmax(dim=-1)
        said = torch.tensor(tokens, device=logs.device)
        return logs.gather(1, said[:, None]).sum().item(), bool((logs.argmax(dim=-1) == said).all())

    @torch.inference_mode()
    def _continue_nothing(self, max_new_tokens: int) -> list[int]:
        """Return what the model says greedily behind the prefix token alone."""
        given = torch.tensor([[self._prefix()]], device=self.model.device)
        said = self.model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=self._stops or None,
            pad_token_id=self._prefix(),
        )
        return [token for token in said[0, 1:].tolist() if token not in self._stops]
