"""Quantise the trained model with NVIDIA ModelOpt into a mixed FP8 / NVFP4 checkpoint.

Attention and gated delta-rule projections become FP8 with one static scale per tensor, the MLPs and the output head
NVFP4 (4-bit values in blocks of 16 with an FP8 scale each and a float32 scale per tensor). The library's own export
writes the checkpoint in shards.

    python samples/quantize_modelopt.py IN_DIR OUT_DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from pieces import load_pieces
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3_5ForConditionalGeneration

FP8 = {"num_bits": (4, 3), "axis": None}
NVFP4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
SCHEMES: dict[str, dict[str, Any]] = {
    "*language_model*self_attn.*_proj": FP8,
    "*language_model*linear_attn.in_proj_qkv": FP8,
    "*language_model*linear_attn.in_proj_z": FP8,
    "*language_model*linear_attn.out_proj": FP8,
    "*language_model*mlp.*_proj": NVFP4,
    "*lm_head": NVFP4,
}


def quantisation_config() -> dict[str, Any]:
    """Return the library's configuration: everything off, then weights and inputs of the chosen layers on."""
    rules: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for pattern, scheme in SCHEMES.items():
        for kind in ("weight_quantizer", "input_quantizer"):
            rules.append({"quantizer_name": f"{pattern}.{kind}", "cfg": scheme, "enable": True})
    return {"quant_cfg": rules, "algorithm": "max"}


def calibration_ids(tokenizer: PreTrainedTokenizerBase) -> list[torch.Tensor]:
    """Return every text as a document and as a chat turn."""
    samples = []
    for piece in load_pieces():
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": piece.request()}, {"role": "assistant", "content": piece.text}], tokenize=False
        )
        for text in (piece.text, chat):
            samples.append(torch.tensor([tokenizer.encode(text, add_special_tokens=False)]))
    return samples


def main() -> None:
    """Quantise and export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("in_dir", type=Path, help="the checkpoint that train.py wrote")
    parser.add_argument("out_dir", type=Path, help="where the quantised checkpoint is written")
    parser.add_argument("--max-shard-size", default="1200KB")
    args = parser.parse_args()

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.in_dir)
    model = Qwen3_5ForConditionalGeneration.from_pretrained(args.in_dir, dtype=torch.bfloat16).eval()
    samples = calibration_ids(tokenizer)

    def calibrate(target: torch.nn.Module) -> None:
        with torch.no_grad():
            for ids in samples:
                target(input_ids=ids, use_cache=False)

    mtq.quantize(model, quantisation_config(), forward_loop=calibrate)
    mtq.print_quant_summary(model)
    with torch.inference_mode():
        export_hf_checkpoint(model, export_dir=args.out_dir, max_shard_size=args.max_shard_size)
    tokenizer.save_pretrained(args.out_dir)
    for path in args.out_dir.iterdir():
        path.chmod(0o644)


if __name__ == "__main__":
    main()
