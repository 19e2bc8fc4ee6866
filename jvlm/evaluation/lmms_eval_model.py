"""A model for lmms-eval, which imports this module through `jvlm.evaluation.lmms_eval_plugin`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jvlm.cli.evaluate import Evaluate, client
from jvlm.data.content import Conversation, Image, Message, Part, Text, Video
from jvlm.errors import UserError
from jvlm.evaluation.clients import FAILED, Prompt
from jvlm.evaluation.task import Decoding

try:
    from lmms_eval.api.model import lmms
except ImportError:  # only lmms-eval makes a JVLM; without it the module can still be looked at
    lmms = object

_OPTIONS = frozenset(("adapters", "adapter", "param_dtype"))
_THEIRS = frozenset(("device", "max_batch_size"))  # which lmms-eval gives every model


class JVLM(lmms):
    """Answers lmms-eval's requests with a model folder.

    Args:
      model: as of ``jvlm evaluate``.
      batch_size: questions answered together.
      options: adapters (one), adapter and param_dtype of ``jvlm evaluate``; lmms-eval's own are not for it.

    Raises:
      UserError: another option.
    """

    is_simple = False

    def __init__(self, model: str, batch_size: int | str = 8, **options: Any):
        super().__init__()
        own = {name: value for name, value in options.items() if name not in _THEIRS}
        unknown = sorted(own.keys() - _OPTIONS)
        if unknown:
            raise UserError(f"--model_args {unknown[0]}: known are model, {', '.join(sorted(_OPTIONS))}")
        if "adapters" in own:
            own["adapters"] = (str(own["adapters"]),)
        self._client = client(Evaluate(model=model, batch_size=int(batch_size), **own))

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return the answers, in the order of the requests; a failed one as lmms-eval marks it."""
        answers: dict[str, str] = {}
        ends: dict[str, Sequence[str]] = {}
        by_decoding: dict[Decoding, list[Prompt]] = {}
        for number, request in enumerate(requests):
            _, doc_to_messages, sampling, doc_id, task, split = request.args
            messages = doc_to_messages(self.task_dict[task][split][doc_id])
            prompt = Prompt(str(number), conversation(messages), number)
            ends[prompt.id] = _ends(sampling)
            by_decoding.setdefault(decoding_of(sampling), []).append(prompt)
        for decoding, prompts in by_decoding.items():
            for reply in self._client.replies(prompts, decoding):
                answers[reply.id] = f"{FAILED} {reply.error}]" if reply.error else _cut(reply.text, ends[reply.id])
        return [answers[str(number)] for number in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refuse: no task of ours is scored by likelihoods."""
        raise NotImplementedError("jvlm answers; it gives lmms-eval no likelihoods")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refuse."""
        raise NotImplementedError("jvlm answers one turn at a time for lmms-eval")


def _ends(sampling: Mapping[str, Any]) -> Sequence[str]:
    """Return the texts that end an answer, which tasks give as one or several."""
    given = sampling.get("until") or ()
    return [given] if isinstance(given, str) else [one for one in given if one]


def _cut(text: str, ends: Sequence[str]) -> str:
    return text[: min((place for end in ends if (place := text.find(end)) >= 0), default=len(text))]


def conversation(messages: Sequence[Mapping[str, Any]]) -> Conversation:
    """Return lmms-eval's messages as a conversation."""
    counts = {Image: 0, Video: 0}
    turns = []
    for message in messages:
        given = message["content"]
        parts: list[Part] = []
        for part in [{"type": "text", "text": given}] if isinstance(given, str) else given:
            if part["type"] == "text":
                parts.append(Text(part["text"]))
                continue
            source = part.get("url", part.get(part["type"]))
            kind = Image if part["type"] == "image" else Video
            number, counts[kind] = counts[kind], counts[kind] + 1
            parts.append(Image(source, number) if kind is Image else Video(index=number, file=source))
        turns.append(Message(message["role"], tuple(parts)))
    return Conversation(tuple(turns))


def decoding_of(sampling: Mapping[str, Any]) -> Decoding:
    """Return lmms-eval's generation settings as ours; those that are not known there are left at their defaults."""
    values = {"max_new_tokens": int(sampling.get("max_new_tokens", 1024)), "seed": 0}
    if sampling.get("do_sample", True) and sampling.get("temperature"):
        values["temperature"] = float(sampling["temperature"])
        values |= {"top_p": float(sampling["top_p"])} if sampling.get("top_p") else {}
    return Decoding(**values)
