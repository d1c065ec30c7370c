"""What is not converted, by name, and what to do instead.  A table per way of recognising it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ..errors import ConvertError, Problem
from ..source import TensorInfo

REQUANTIZE = "export the original model again as FP8 or NVFP4 (nvidia-modelopt or llm-compressor)"
INTEGER = f"integer formats are not supported: {REQUANTIZE}"

MERGE = "merge the adapter into the base model first (peft: merge_and_unload)"
GROUPS_OF_32 = "export with NVFP4 or W4A16_NVFP4 in groups of 16, which is what engines read"

# quant_method -> remedy
QUANT_METHODS: Mapping[str, str] = {
    "gptq": INTEGER,
    "awq": INTEGER,
    "auto-round": INTEGER,
    "bitsandbytes": INTEGER,
    "hqq": INTEGER,
    "aqlm": INTEGER,
    "vptq": INTEGER,
    "higgs": INTEGER,
    "spqr": INTEGER,
    "eetq": INTEGER,
    "quanto": INTEGER,
    "bitnet": INTEGER,
    "mxfp4": f"the gpt-oss MXFP4 layout (blocks and scales apart) is not supported: {REQUANTIZE}",
    "mxfp8": "MiniMax-style MXFP8 is not supported yet: export as MXFP8 with nvidia-modelopt or llm-compressor",
    "quark": REQUANTIZE,
    "fp_quant": REQUANTIZE,
    "fbgemm_fp8": REQUANTIZE,
    "torchao": "save the model dequantised, or export it with nvidia-modelopt or llm-compressor",
    "nvfp4": "an on-the-fly pack of transformers is not a checkpoint format: export with nvidia-modelopt",
    "fouroversix": REQUANTIZE,
    "mlx": INTEGER,
    "gguf": "convert the original safetensors checkpoint instead",
}

# Suffixes of tensors under one module, all of which must be present -> (name, remedy).  First match wins.
TENSORS: tuple[tuple[frozenset[str], str, str], ...] = (
    (frozenset({"qweight", "g_idx"}), "GPTQ", INTEGER),
    (frozenset({"qweight", "qzeros"}), "AWQ or GPTQ", INTEGER),
    (frozenset({"weight", "SCB"}), "bitsandbytes int8", INTEGER),
    (frozenset({"weight_packed", "weight_shape"}), "compressed-tensors pack-quantized INT", INTEGER),
    (frozenset({"weight", "weight_zero_point"}), "asymmetric integer weights", INTEGER),
    (frozenset({"weight_sf"}), "transformers nvfp4 (swizzled scales)", "export with nvidia-modelopt"),
    (frozenset({"_weight_qdata"}), "torchao", "save the model dequantised, or export it with nvidia-modelopt"),
    (frozenset({"svdquant_lora_a"}), "NVFP4_SVD", "export with NVFP4 or NVFP4_AWQ"),
)
# Segments anywhere in a tensor name -> (name, remedy).
SEGMENTS: Mapping[str, tuple[str, str]] = {
    "quant_state": ("bitsandbytes 4-bit", INTEGER),
    "absmax": ("bitsandbytes 4-bit", INTEGER),
    "lora_E": ("an AdaLoRA adapter", MERGE),
    "trainable_tokens_delta": ("trainable tokens of PEFT", MERGE),
    "weight_quantizer": ("a quantiser's internal buffer", "export the model with the producer's export function"),
    "input_quantizer": ("a quantiser's internal buffer", "export the model with the producer's export function"),
}
# dtype of a `weight` -> (name, remedy)
WEIGHT_DTYPES: Mapping[str, tuple[str, str]] = {
    "I8": ("INT8 weights", INTEGER),
    "I32": ("packed integer weights", INTEGER),
    "F8_E5M2": ("float8_e5m2 weights", "export with float8_e4m3fn"),
}


def refuse_foreign(
    tensors: Collection[TensorInfo], modules: Mapping[str, Mapping[str, TensorInfo]], segments: set[str]
) -> None:
    """Raise `ConvertError` for checkpoints of these formats, by name, before anything else is looked at.

    `modules`: the same tensors by stored module and last segment; `segments`: every segment of their names.
    """
    problems: dict[str, Problem] = {}
    if not SEGMENTS.keys().isdisjoint(segments) or any(segment.endswith("_blocks") for segment in segments):
        for info in tensors:
            *_, suffix = path = info.name.split(".")
            for segment in path:
                if segment in SEGMENTS:
                    name, remedy = SEGMENTS[segment]
                    problems.setdefault(name, Problem(info.file, info.name, "plain weights", name, remedy))
            if suffix.endswith("_blocks") and info.dtype == "U8":
                remedy = QUANT_METHODS["mxfp4"]
                problems.setdefault("b", Problem(info.file, info.name, "plain weights", "gpt-oss MXFP4 blocks", remedy))
    first: dict[tuple[str, ...], TensorInfo] = {}  # a hundred thousand modules have few sets of tensors
    for module in modules.values():
        first.setdefault(tuple(module), next(iter(module.values())))
    for present, near in first.items():
        for wanted, name, remedy in TENSORS:
            if wanted <= set(present):
                found = f"{name} ({', '.join(sorted(wanted))})"
                problems.setdefault(name, Problem(near.file, near.name, "FP8, NVFP4, MX or unquantised weights", found, remedy))
                break
    if problems:
        raise ConvertError(problems.values())
