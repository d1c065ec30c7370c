"""The model `qconvert` of lm-evaluation-harness.

`python -m runtime.lm_eval --model qconvert --model_args pretrained=OUT --tasks ...` is the harness's own command with this
model registered.  Needs the extra `lm-eval`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from runtime.harness import Harness

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError:
    if __name__ != "__main__":
        raise
    print("error: expected the package lm_eval, found none: pip install 'qconvert[lm-eval]'", file=sys.stderr)
    sys.exit(2)


@register_model("qconvert")
class QConvertLM(TemplateLM):
    """A canonical checkpoint.  `pretrained`: its directory; `batch_size`: "auto" is 8."""

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        activations: str = "quantized",
        max_length: int | None = None,
        max_gen_toks: int = 256,
    ) -> None:
        import torch

        super().__init__()
        size = 8 if str(batch_size).startswith("auto") else int(batch_size or 1)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.harness = Harness(pretrained, device, activations, min(size, max_batch_size or size), max_length, max_gen_toks)
        self._device = self.harness.model.device

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self.harness.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        return self.harness.prefix_id

    @property
    def tokenizer_name(self) -> str:
        """Part of the names of cached requests."""
        return str(self.harness.tokenizer.directory).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text, with the tokenizer's own special tokens unless told otherwise."""
        return self.harness.tokenizer.encode(string, add_special_tokens is not False)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The checkpoint's template, for the names of cached requests."""
        return self.harness.tokenizer.chat_template() if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text."""
        return self.harness.chat(chat_history, add_generation_prompt)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        with tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm) as bar:
            found = self.harness.score([(context, rest) for _, context, rest in requests], bar.update)
        self._remember("loglikelihood", [request[0] for request in requests], list(map(tuple, found)))
        return [(score.logprob, score.greedy) for score in found]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text."""
        with tqdm(desc="loglikelihood_rolling", disable=disable_tqdm) as bar:
            found = self.harness.score_texts([request.args[0] for request in requests], bar.update)
        self._remember("loglikelihood_rolling", [request.args for request in requests], found)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each text."""
        given: list[tuple[str, Mapping[str, Any]]] = [request.args for request in requests]
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as bar:
            found = self.harness.write(given, bar.update)
        self._remember("generate_until", given, found)
        return found

    def _remember(self, method: str, requests: Sequence[Any], found: Sequence[Any]) -> None:
        """Let the harness's cache know."""
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial(method, request, answer)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
