"""Check that a quantised sample still recites, without any of the tools that made or convert it.

The weights are read and multiplied out here, loaded into the float32 transformers model, and every text is generated
greedily, as a document from its first words and as the answer to a chat request. With `--activations` the inputs of the
quantised layers are rounded too, as a runtime with quantised activations does.

    python samples/check_samples.py SAMPLE_DIR [--activations] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from pieces import load_pieces
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3_5Config, Qwen3_5ForConditionalGeneration

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E2M1_BOUNDS = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
FP8_MAX = 448.0
BLOCK = 16
PROMPT_TOKENS = 12


def dequantise_fp8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return FP8 values times their scale in float32."""
    return weight.float() * scale.float()


def dequantise_nvfp4(weight: torch.Tensor, scale: torch.Tensor, scale_2: torch.Tensor) -> torch.Tensor:
    """Return packed 4-bit values (low nibble first) times block scale times tensor scale in float32."""
    table = torch.cat([E2M1, -E2M1])
    codes = torch.stack([weight & 0xF, weight >> 4], dim=-1).flatten(-2)
    return table[codes.long()] * (scale.float() * scale_2.float()).repeat_interleave(BLOCK, dim=-1)


def round_fp8(value: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Round to FP8 with a static scale and return to the original type."""
    rounded = (value.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return (rounded.float() * scale).to(value.dtype)


def round_nvfp4(value: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Round to NVFP4 with a static tensor scale and one FP8 scale per block of 16."""
    blocks = value.float().unflatten(-1, (-1, BLOCK))
    largest = blocks.abs().amax(-1, keepdim=True)
    block_scale = (largest / (6.0 * scale)).clamp(max=FP8_MAX).to(torch.float8_e4m3fn).float() * scale
    safe = torch.where(block_scale > 0, block_scale, torch.ones_like(block_scale))
    codes = torch.bucketize((blocks.abs() / safe).contiguous(), E2M1_BOUNDS)
    return (E2M1[codes] * blocks.sign() * block_scale).flatten(-2).to(value.dtype)


def load_sample(path: Path, *, activations: bool, dtype: torch.dtype) -> Qwen3_5ForConditionalGeneration:
    """Read a sample, dequantise its weights and return the model, with rounding hooks if asked for."""
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(path.glob("*.safetensors")):
        tensors.update(load_file(shard))
    config = Qwen3_5Config.from_pretrained(path)
    del config.quantization_config
    scales: dict[str, tuple[str, torch.Tensor]] = {}
    for name in [key for key in tensors if key.endswith(".weight_scale")]:
        module = name.removesuffix(".weight_scale")
        scale, scale_2 = tensors.pop(name), tensors.pop(f"{module}.weight_scale_2", None)
        weight, input_scale = tensors[f"{module}.weight"], tensors.pop(f"{module}.input_scale").float()
        if scale_2 is None:
            tensors[f"{module}.weight"] = dequantise_fp8(weight, scale)
            scales[module] = ("fp8", input_scale)
        else:
            tensors[f"{module}.weight"] = dequantise_nvfp4(weight, scale, scale_2)
            scales[module] = ("nvfp4", input_scale)
    model = Qwen3_5ForConditionalGeneration(config).float()
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=True)
    if activations:
        for module, (scheme, input_scale) in scales.items():
            add_rounding(model.get_submodule(module), scheme, input_scale)
    return model.to(dtype).eval()


def add_rounding(layer: nn.Module, scheme: str, scale: torch.Tensor) -> None:
    """Round the input of a layer before every call."""
    rounding = round_fp8 if scheme == "fp8" else round_nvfp4
    layer.register_forward_pre_hook(lambda _, args: (rounding(args[0], scale), *args[1:]))


@torch.no_grad()
def recite(
    model: Qwen3_5ForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, prompt: str, expected: str
) -> tuple[bool, int, float, str]:
    """Generate greedily; return (stopped in the right place with the right text, tokens, smallest margin, text)."""
    ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)])
    output = model.generate(
        ids,
        do_sample=False,
        max_new_tokens=600,
        eos_token_id=[tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.convert_tokens_to_ids("<|endoftext|>")],
        pad_token_id=tokenizer.pad_token_id,
        return_dict_in_generate=True,
        output_logits=True,
    )
    new = output.sequences[0, ids.shape[1] :]
    margin = math.inf
    for logits in output.logits:
        best = logits[0].float().topk(2).values
        margin = min(margin, float(best[0] - best[1]))
    text = tokenizer.decode(new, skip_special_tokens=False)
    return text == expected, len(new), margin, text


def main() -> None:
    """Recite everything and report; the exit status is 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sample_dir", type=Path)
    parser.add_argument("--activations", action="store_true", help="round the inputs of the quantised layers too")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="type to compute in")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.sample_dir)
    model = load_sample(args.sample_dir, activations=args.activations, dtype=getattr(torch, args.dtype))
    failed = 0
    for piece in load_pieces():
        ids = tokenizer.encode(piece.text, add_special_tokens=False)
        prompt = tokenizer.decode(ids[:PROMPT_TOKENS])
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": piece.request()}], tokenize=False, add_generation_prompt=True
        )
        cases = (
            ("document", prompt, piece.text[len(prompt) :] + "<|endoftext|>"),
            ("chat", chat, piece.text + "<|im_end|>"),
        )
        for kind, start, expected in cases:
            right, count, margin, text = recite(model, tokenizer, start, expected)
            failed += not right
            print(f"{'ok  ' if right else 'FAIL'} {piece.name:12s} {kind:8s} {count:4d} tokens, margin {margin:.2f}")
            if not right:
                same = next((i for i, (a, b) in enumerate(zip(text, expected, strict=False)) if a != b), len(text))
                print(f"     differs after {same} characters: ...{text[max(0, same - 30) : same + 30]!r}")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
