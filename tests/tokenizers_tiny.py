"""A tokenizer and a chat template made here, and a tiny checkpoint that has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from canonical import tiny_qwen3_5, write

TEMPLATE = (
    "{%- for message in messages %}{%- if message.role not in ['system', 'user'] %}{{ raise_exception('role!') }}{%- endif %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{%- endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{%- endif %}"
)
TEXT = ["the cat sat on the mat", "grüße an alle", "日本語 🦊🐈", "user system assistant"]


def write_tokenizer(out: Path) -> None:
    """A byte-level BPE tokenizer whose unmerged bytes split every character outside ASCII."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXT[:1] * 3, trainer)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (out / "tokenizer_config.json").write_text(json.dumps(config))


def write_checkpoint(out: Path, **changes: Any) -> Any:
    """A canonical checkpoint with a tokenizer; returns the transformers model that means the same."""
    reference = tiny_qwen3_5(vocab_size=300, **changes)
    reference.load_state_dict(write(out, reference), strict=True)
    write_tokenizer(out)
    return reference
