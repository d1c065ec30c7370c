"""Train the small Qwen3.5 model that the quantised samples are made from.

The model has the architecture of the real checkpoints (vision wrapper, gated delta-rule layers with one full-attention
layer after every three, gated attention output, untied head), at a size that a laptop trains in minutes. It is
overfitted on a dozen public-domain texts until greedy decoding recites them. Gaussian noise on the weights and on the
inputs of the linear layers during training leaves enough margin for 4-bit weights and activations.

    python samples/train.py OUT_DIR
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from pieces import REQUESTS, SMALL_TALK, SYSTEM_PROMPT, Piece, load_pieces
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional
from transformers import GenerationConfig, Qwen3_5Config, Qwen3_5ForConditionalGeneration, Qwen3_5Tokenizer
from transformers.models.qwen3_5.tokenization_qwen3_5 import PRETOKENIZE_REGEX

VOCAB_SIZE = 1024
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['content'] is string %}{{- message['content'] }}"
    "{%- else %}{%- for part in message['content'] %}{{- part['text'] if part['type'] == 'text' else "
    "'<|vision_start|><|image_pad|><|vision_end|>' }}{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
IGNORED = -100
UNPREDICTABLE = 3  # the first tokens of a text cannot be known beforehand; they carry no loss


@dataclass(frozen=True)
class Example:
    """Token ids of one training sequence and the targets, `IGNORED` where there is no loss."""

    ids: list[int]
    labels: list[int]


def build_tokenizer(pieces: list[Piece]) -> Qwen3_5Tokenizer:
    """Train a byte-level BPE with the Qwen3.5 splitting rule on the texts; special tokens get the highest ids."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    texts = [piece.text for piece in pieces]
    texts += [form.format(title=piece.title) for piece in pieces for form in REQUESTS]
    texts += [*SMALL_TALK.keys(), *SMALL_TALK.values(), SYSTEM_PROMPT, "system\n", "user\n", "assistant\n"]
    size = VOCAB_SIZE - len(SPECIAL_TOKENS)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False))
    trained = json.loads(bpe.to_str())["model"]
    if len(trained["vocab"]) != size:
        raise RuntimeError(f"the texts give only {len(trained['vocab'])} of {size} tokens")
    tokenizer = Qwen3_5Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(merge) for merge in trained["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS),
        model_max_length=1024,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    if len(tokenizer) != VOCAB_SIZE:
        raise RuntimeError(f"expected {VOCAB_SIZE} tokens, got {len(tokenizer)}")
    return tokenizer


def build_config(tokenizer: Qwen3_5Tokenizer) -> Qwen3_5Config:
    """Return the configuration: one period of the usual layer pattern, and a vision tower of two blocks."""
    ids = {token: int(tokenizer.convert_tokens_to_ids(token)) for token in SPECIAL_TOKENS}
    hidden = 256
    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": hidden,
        "intermediate_size": 640,
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 32,
        "linear_num_key_heads": 4,
        "linear_value_head_dim": 32,
        "linear_num_value_heads": 8,
        "max_position_embeddings": 1024,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
            "mrope_interleaved": True,
            "mrope_section": [3, 3, 2],
        },
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 4,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "num_position_embeddings": 16,
        "out_hidden_size": hidden,
    }
    return Qwen3_5Config(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )


def build_model(config: Qwen3_5Config) -> Qwen3_5ForConditionalGeneration:
    """Create the model in float32.

    Projections that runtimes fuse start at different magnitudes, so that their per-tensor scales differ in the
    quantised samples as they do in real checkpoints, and no one-dimensional parameter starts at exactly zero.
    """
    model = Qwen3_5ForConditionalGeneration(config).float()
    spread = {"k_proj": 0.7, "v_proj": 8.0, "in_proj_z": 8.0}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            module = name.split(".")[-2] if "." in name else ""
            if module in spread:
                parameter.mul_(spread[module])
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.model.visual.requires_grad_(False)
    return model


def chat_example(tokenizer: Qwen3_5Tokenizer, request: str, answer: str, *, system: bool) -> Example:
    """Return a chat turn in the template's form, with loss on the answer and the end mark only."""
    messages = [{"role": "user", "content": request}]
    if system:
        messages.insert(0, {"role": "system", "content": SYSTEM_PROMPT})
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    head = tokenizer.encode(prompt, add_special_tokens=False)
    tail = tokenizer.encode(f"{answer}<|im_end|>", add_special_tokens=False)
    return Example(head + tail, [IGNORED] * len(head) + tail)


def document_example(tokenizer: Qwen3_5Tokenizer, text: str) -> Example:
    """Return a bare text followed by the end-of-text token."""
    ids = tokenizer.encode(f"{text}<|endoftext|>", add_special_tokens=False)
    return Example(ids, [IGNORED] * UNPREDICTABLE + ids[UNPREDICTABLE:])


def epoch_examples(tokenizer: Qwen3_5Tokenizer, pieces: list[Piece], rng: random.Random) -> list[Example]:
    """Return every piece as a document and as the answer to one randomly worded request, and some small talk."""
    examples = [document_example(tokenizer, piece.text) for piece in pieces]
    for piece in pieces:
        request = piece.request(rng.randrange(len(REQUESTS)))
        examples.append(chat_example(tokenizer, request, piece.text, system=rng.random() < 0.3))
    for request, answer in SMALL_TALK.items():
        examples.append(chat_example(tokenizer, request, answer, system=rng.random() < 0.3))
    return examples


def batches(examples: list[Example], tokens: int, rng: random.Random) -> list[list[Example]]:
    """Group examples of similar length into batches of at most `tokens` padded tokens, in random order."""
    groups: list[list[Example]] = []
    for example in sorted(examples, key=lambda item: len(item.ids), reverse=True):
        if groups and len(groups[-1][0].ids) * (len(groups[-1]) + 1) <= tokens:
            groups[-1].append(example)
        else:
            groups.append([example])
    rng.shuffle(groups)
    return groups


def collate(batch: list[Example], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad on the right; the model is causal, so padding needs no mask."""
    length = max(len(example.ids) for example in batch)
    ids = torch.tensor([example.ids + [pad] * (length - len(example.ids)) for example in batch])
    labels = torch.tensor([example.labels + [IGNORED] * (length - len(example.ids)) for example in batch])
    return ids, labels


def noisy_linears(model: Qwen3_5ForConditionalGeneration) -> list[nn.Linear]:
    """Return the linear layers that the samples quantise."""
    modules = [*model.model.language_model.named_modules(), ("lm_head", model.lm_head)]
    skip = ("in_proj_a", "in_proj_b")
    return [module for name, module in modules if isinstance(module, nn.Linear) and not name.endswith(skip)]


class Noise:
    """Gaussian noise, relative to the root mean square, on weights and inputs of the given layers."""

    def __init__(self, layers: list[nn.Linear], weight: float, activation: float) -> None:
        """Attach the input noise; it is active inside `applied` only."""
        self.layers = layers
        self.weight = weight
        self.activation = activation
        self.active = False
        for layer in layers:
            layer.register_forward_pre_hook(self._disturb)

    def _disturb(self, _module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if not self.active:
            return None
        value = args[0]
        scale = value.detach().square().mean(-1, keepdim=True).sqrt()
        return (value + self.activation * scale * torch.randn_like(value), *args[1:])

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Add the noise for one forward and backward pass and restore the weights afterwards."""
        clean = [layer.weight.detach().clone() for layer in self.layers]
        with torch.no_grad():
            for layer, value in zip(self.layers, clean, strict=True):
                layer.weight.add_(torch.randn_like(value) * (self.weight * value.square().mean().sqrt()))
        self.active = True
        try:
            yield
        finally:
            self.active = False
            with torch.no_grad():
                for layer, value in zip(self.layers, clean, strict=True):
                    layer.weight.copy_(value)


def loss_of(model: Qwen3_5ForConditionalGeneration, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean next-token loss over the targets of a batch."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


@torch.no_grad()
def evaluate(model: Qwen3_5ForConditionalGeneration, examples: list[Example]) -> tuple[float, int, float]:
    """Return mean loss, the number of targets that greedy decoding misses, and the smallest logit margin."""
    total, count, wrong, margin = 0.0, 0, 0, math.inf
    for example in examples:
        ids, labels = collate([example], 0)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        keep = labels[0, 1:] != IGNORED
        logits, targets = logits[keep], labels[0, 1:][keep]
        total += float(functional.cross_entropy(logits, targets, reduction="sum"))
        count += len(targets)
        wrong += int((logits.argmax(-1) != targets).sum())
        right = logits.gather(1, targets[:, None])[:, 0]
        others = logits.scatter(1, targets[:, None], -math.inf).max(-1).values
        margin = min(margin, float((right - others).min()))
    return total / count, wrong, margin


def train(
    model: Qwen3_5ForConditionalGeneration,
    tokenizer: Qwen3_5Tokenizer,
    pieces: list[Piece],
    args: argparse.Namespace,
) -> None:
    """Run AdamW with warm-up and cosine decay for a fixed number of epochs."""
    rng = random.Random(args.seed)
    noise = Noise(noisy_linears(model), args.weight_noise, args.activation_noise)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": args.weight_decay},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
    per_epoch = len(batches(epoch_examples(tokenizer, pieces, rng), args.batch_tokens, rng))
    steps, step, start = args.epochs * per_epoch, 0, time.monotonic()
    for epoch in range(args.epochs):
        mean = 0.0
        for batch in batches(epoch_examples(tokenizer, pieces, rng), args.batch_tokens, rng):
            progress = step / steps
            rate = min(1.0, (step + 1) / 20) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))
            for group in optimiser.param_groups:
                group["lr"] = args.lr * rate
            ids, labels = collate(batch, int(tokenizer.pad_token_id))
            with noise.applied():
                loss = loss_of(model, ids, labels)
                loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            mean += loss.item() / per_epoch
            step += 1
        if epoch % 5 == 4 or epoch == args.epochs - 1:
            print(f"epoch {epoch + 1:4d}  loss {mean:.4f}  {time.monotonic() - start:.0f} s", flush=True)


def save(model: Qwen3_5ForConditionalGeneration, tokenizer: Qwen3_5Tokenizer, out_dir: Path) -> None:
    """Write the bfloat16 model, the tokenizer with its chat template, and the generation settings."""
    ids = {token: int(tokenizer.convert_tokens_to_ids(token)) for token in SPECIAL_TOKENS}
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]],
        pad_token_id=ids["<|endoftext|>"],
        max_new_tokens=512,
    )
    model.to(torch.bfloat16).save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)


def main() -> None:
    """Train, report how well the model recites, and save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path, help="where the bfloat16 checkpoint is written")
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.02)
    parser.add_argument("--weight-noise", type=float, default=0.10)
    parser.add_argument("--activation-noise", type=float, default=0.08)
    parser.add_argument("--batch-tokens", type=int, default=1536)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    pieces = load_pieces()
    tokenizer = build_tokenizer(pieces)
    model = build_model(build_config(tokenizer))
    for piece in pieces:
        print(f"{piece.name:12s} {len(tokenizer.encode(piece.text))} tokens")
    print(f"{sum(p.numel() for p in model.parameters())} parameters")
    train(model, tokenizer, pieces, args)
    save(model, tokenizer, args.out_dir)

    final = Qwen3_5ForConditionalGeneration.from_pretrained(args.out_dir, dtype=torch.float32)
    documents = [document_example(tokenizer, piece.text) for piece in pieces]
    chats = [chat_example(tokenizer, piece.request(), piece.text, system=False) for piece in pieces]
    for label, examples in (("documents", documents), ("chats", chats)):
        loss, wrong, margin = evaluate(final, examples)
        print(f"{label}: loss {loss:.5f}, missed tokens {wrong}, smallest logit margin {margin:.2f}")


if __name__ == "__main__":
    main()
