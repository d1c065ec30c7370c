"""Exports checkpoints that have an oracle, loads them in transformers, and compares: `python tests/corpus_export.py CORPUS`.

CORPUS has a directory for each checkpoint: `<name>/ckpt`, and `<name>/oracle/logits.safetensors` with `input_ids` and
`logits_f32` (dense weights, float32), or `oracle/facts.json` whose `oracle_of` names another one.  No test: it takes minutes.

transformers is used unpatched.  A line says how many weights are bit for bit those of the dense export, and how far logits are
from the oracle's (norm of the difference over the norm): as loaded, and with the library's quantisation of inputs switched off.
Where transformers reads experts wrongly or not at all, compressed-tensors itself decompresses them, which the line says.
Packed forms become bfloat16 in both; the last number is that of the library's formulas in float32.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import convert
from convert.compressed import EXPERTS_IN_TRANSFORMERS


def oracle_of(entry: Path) -> dict[str, torch.Tensor]:
    """The oracle of an entry, or of the one that it shares it with."""
    path = entry / "oracle" / "logits.safetensors"
    if not path.exists():
        path = entry.parent / json.loads((entry / "oracle" / "facts.json").read_text())["oracle_of"] / "oracle" / path.name
    return load_file(path)


def distance(found: torch.Tensor, wanted: torch.Tensor) -> str:
    """Relative distance of logits."""
    return f"{float((found.float() - wanted).norm() / wanted.norm()):.1e}"


def stored(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    return {name: t for file in sorted(set(index.values())) for name, t in load_file(directory / file).items()}


class Export:
    """An exported checkpoint, read with compressed-tensors alone."""

    def __init__(self, directory: Path) -> None:
        from compressed_tensors.quantization import QuantizationConfig

        block = json.loads((directory / "config.json").read_text()).get("quantization_config")
        self.config = QuantizationConfig.model_validate(block) if block else None
        self.tensors = stored(directory)

    def weight(self, module: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight of a module as the library decompresses it; NVFP4 in `dtype`, if one is given."""
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
        from compressed_tensors.quantization.lifecycle.forward import dequantize
        from compressed_tensors.utils.match import match_name

        groups = self.config.config_groups.values()
        scheme = next(g for g in groups if any(t == "Linear" or match_name(module, t) for t in g.targets))
        state = {name.rpartition(".")[2]: t for name, t in self.tensors.items() if name.rpartition(".")[0] == module}
        if dtype is None or "weight_packed" not in state:
            return BaseCompressor.get_value_from_registry(scheme.format).decompress(state, scheme)["weight"].float()
        rows, packed = state["weight_packed"].shape
        codes = unpack_fp4_from_uint8(state["weight_packed"], rows, 2 * packed, dtype=dtype)
        scale, above = state["weight_scale"].to(dtype), state.get("weight_global_scale")
        return dequantize(codes, scale, args=scheme.weights, global_scale=above, dtype=dtype)

    def fill_experts(self, model: Any, dtype: torch.dtype | None = None) -> int:
        """Give stacked experts what the library makes of each expert's tensors.  Returns the number of stacks."""
        filled = 0
        for name, parameter in model.named_parameters():
            container, _, last = name.rpartition(".")
            if not container.endswith(".experts"):
                continue
            parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else (last,)
            stack = range(len(parameter))
            each = [torch.cat([self.weight(f"{container}.{e}.{part}", dtype) for part in parts]) for e in stack]
            whole = torch.stack(each)
            parameter.data = whole if whole.shape == parameter.shape else whole.transpose(1, 2)
            filled += 1
        return filled

    def fill_linears(self, model: Any, dtype: torch.dtype) -> None:
        """The same for packed linears."""
        for name, module in model.named_modules():
            if f"{name}.weight_packed" in self.tensors:
                module.weight.data = self.weight(name, dtype)


def plain_notes(report: dict[str, Any]) -> list[str]:
    """Notes without their counts."""
    return [note.rpartition(" (")[0] if note.endswith(")") else note for note in report["notes"]]


def run(entry: Path, work: Path) -> str:
    """One line about an entry."""
    import transformers

    transformers.logging.set_verbosity_error()
    convert.convert_checkpoint(entry / "ckpt", work / "out")
    report = convert.export_checkpoint(work / "out", work / "ct", to="compressed-tensors")
    convert.export_checkpoint(work / "out", work / "dense")
    architecture = json.loads((work / "ct" / "config.json").read_text())["architectures"][0]
    model_class = getattr(transformers, architecture, None)
    if model_class is None:
        return f"exported; transformers has no {architecture}"
    model, loading = model_class.from_pretrained(work / "ct", dtype=torch.float32, output_loading_info=True)
    dense = model_class.from_pretrained(work / "dense", dtype=torch.float32).state_dict()
    said = []
    packed = any(g["scheme"] in ("nvfp4", "mxfp4") for g in report["groups"])
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.compressor.decompress_model(model)
        for parameter in model.parameters():  # packed forms become bfloat16, whatever the model is
            parameter.data = parameter.data.float()
    export = Export(work / "ct")
    alone = bool(loading["missing_keys"]) or any(note in EXPERTS_IN_TRANSFORMERS.values() for note in plain_notes(report))
    if alone:
        said.append(f"{export.fill_experts(model)} stacks of experts by compressed-tensors itself")
    held = model.state_dict()
    exact = sum(torch.equal(held[name].float(), value) for name, value in dense.items())
    worst = max(float((held[n].float() - v).abs().max() / v.abs().max().clamp_min(1e-30)) for n, v in dense.items())
    said.append(f"{exact} of {len(dense)} weights exact" + (f", others within {worst:.1e} (bfloat16)" if packed else ""))
    oracle = oracle_of(entry)
    with torch.no_grad():
        as_loaded = model.eval()(oracle["input_ids"]).logits
        for module in model.modules():
            if getattr(module, "quantization_scheme", None) is not None:
                module.quantization_enabled = False
        plain = model(oracle["input_ids"]).logits
    said.append(f"logits {distance(plain, oracle['logits_f32'])}, inputs quantised {distance(as_loaded, oracle['logits_f32'])}")
    if packed:
        export.fill_linears(model, torch.float32)
        if alone:
            export.fill_experts(model, torch.float32)
        with torch.no_grad():
            said.append(f"in float32 {distance(model(oracle['input_ids']).logits, oracle['logits_f32'])}")
    return "; ".join(said)


def main() -> None:
    """Run over the entries of a corpus, or over those that are named."""
    warnings.filterwarnings("ignore")
    corpus, names = Path(sys.argv[1]), sys.argv[2:]
    for entry in sorted(path for path in corpus.iterdir() if (path / "ckpt").is_dir()):
        if not names or entry.name in names:
            with tempfile.TemporaryDirectory() as work:
                print(f"{entry.name}: {run(entry, Path(work))}", flush=True)


if __name__ == "__main__":
    main()
