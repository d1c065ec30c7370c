"""The generation loop: prefill, then one token at a time."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from runtime.models.base import CausalLM


def generate_tokens(
    model: CausalLM,
    input_ids: Tensor,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    eos_ids: Collection[int] = (),
) -> Iterator[int | tuple[int, ...]]:
    """Continue `input_ids`, int64 `[B, T]` or `[T]`, and yield token ids as they come.

    For one sequence yields `int`s and stops after one of `eos_ids`, which is yielded too.  For B > 1 yields tuples of B
    ids and stops when every sequence has ended; one that has ended repeats its last id.  Stops in any case after
    `max_new_tokens`, or when the model's `max_position_embeddings` are used up.

    `temperature`: 0 takes the most likely token; otherwise logits are divided by it, then only the `top_k` most likely
    (0: all) and of these the fewest whose probabilities reach `top_p` are drawn from.  `seed`: the same seed, prompt and
    device give the same tokens; None draws anew.

    Raises `ValueError`, before anything is computed, for arguments out of range and for ids outside the vocabulary.
    Memory: the prompt's activations, and a state of B * (T + max_new_tokens) tokens.
    """
    ids = input_ids.unsqueeze(0) if input_ids.ndim == 1 else input_ids
    _check(model, ids, max_new_tokens, temperature, top_p, top_k)
    return _generate(model, ids, max_new_tokens, temperature, top_p, top_k, seed, frozenset(eos_ids))


def _check(model: CausalLM, ids: Tensor, max_new_tokens: int, temperature: float, top_p: float, top_k: int) -> None:
    vocabulary, positions = model.architecture.vocab_size, model.architecture.max_position_embeddings or sys.maxsize
    if ids.ndim != 2 or ids.numel() == 0 or ids.dtype != torch.int64:
        raise ValueError(f"input_ids: expected int64 with at least one token per sequence, found {ids.dtype} {list(ids.shape)}")
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        wrong = ids[(ids < 0) | (ids >= vocabulary)][0]
        raise ValueError(f"input_ids: expected ids from 0 to {vocabulary - 1}, found {int(wrong)}")
    if ids.shape[1] >= positions:
        raise ValueError(f"input_ids: expected fewer than {positions} tokens, found {ids.shape[1]}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: expected 0 or more, found {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature: expected 0 or more, found {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number above 0 and up to 1, found {top_p}")
    if top_k < 0:
        raise ValueError(f"top_k: expected 0 or more, found {top_k}")


def _generate(
    model: CausalLM,
    ids: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int | None,
    eos_ids: frozenset[int],
) -> Iterator[int | tuple[int, ...]]:
    batch, length = ids.shape
    count = min(max_new_tokens, (model.architecture.max_position_embeddings or sys.maxsize) - length)
    if count == 0:
        return
    generator = torch.Generator(device=model.device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    state = model.new_state(batch, length + count)
    inputs = ids
    ended: list[int | None] = [None] * batch
    for _ in range(count):
        logits = model(inputs, state, last_only=True)[:, -1]
        drawn = sample(logits, temperature, top_p, top_k, generator).tolist()
        tokens = [end if end is not None else token for end, token in zip(ended, drawn, strict=True)]
        ended = [token if token in eos_ids else None for token in tokens]
        yield tokens[0] if batch == 1 else tuple(tokens)
        if None not in ended:
            return
        inputs = torch.tensor(tokens).unsqueeze(1)


def sample(logits: Tensor, temperature: float, top_p: float, top_k: int, generator: torch.Generator) -> Tensor:
    """Draw one id per row: float32 `[B, V]` to int64 `[B]`.  See `generate_tokens` for the arguments."""
    if temperature == 0:
        return logits.argmax(-1)
    # Subtracting the largest first keeps tiny temperatures finite.
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if 0 < top_k < logits.shape[-1]:
        smallest_kept = logits.topk(top_k, -1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    probabilities = logits.softmax(-1)
    if top_p < 1:
        ordered, order = probabilities.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # what the more likely tokens hold; the first is always kept
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered.masked_fill(before >= top_p, 0.0))
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)
