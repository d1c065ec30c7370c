"""Quantise the trained model with llm-compressor into a static FP8 compressed-tensors checkpoint.

Every linear layer of the language model gets FP8 weights with one scale per tensor and FP8 inputs with one calibrated
scale; the head, the vision tower and the two small gate projections of the gated delta-rule layers stay in bfloat16.

    python samples/quantize_compressed_tensors.py IN_DIR OUT_DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from pieces import load_pieces
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3_5ForConditionalGeneration

IGNORE = ["lm_head", "re:.*visual.*", "re:.*in_proj_a$", "re:.*in_proj_b$", "re:.*conv1d$"]


def calibration_set(tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Return every text as a document and as a chat turn, tokenised."""
    rows = []
    for piece in load_pieces():
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": piece.request()}, {"role": "assistant", "content": piece.text}], tokenize=False
        )
        for text in (piece.text, chat):
            ids = tokenizer.encode(text, add_special_tokens=False)
            rows.append({"input_ids": ids, "attention_mask": [1] * len(ids)})
    return Dataset.from_list(rows)


def main() -> None:
    """Quantise and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("in_dir", type=Path, help="the checkpoint that train.py wrote")
    parser.add_argument("out_dir", type=Path, help="where the quantised checkpoint is written")
    args = parser.parse_args()

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.in_dir)
    model = Qwen3_5ForConditionalGeneration.from_pretrained(args.in_dir, dtype=torch.bfloat16).eval()
    samples = calibration_set(tokenizer)
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=samples,
        recipe=QuantizationModifier(targets=["Linear"], scheme="FP8", ignore=IGNORE),
        max_seq_length=1024,
        num_calibration_samples=len(samples),
        batch_size=1,
        pipeline="basic",
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(args.out_dir, save_compressed=True)
    tokenizer.save_pretrained(args.out_dir)
    for path in args.out_dir.iterdir():
        path.chmod(0o644)


if __name__ == "__main__":
    main()
