"""What the nearest tools make of the case book: each case's checkpoint through each tool, and the dense weights that come out.

    python -m bench.peers [--only TEXT] [--markdown] [--json FILE]

Tools (those that are not installed are left out):
qconvert            convert, then export to dense weights
compressed-tensors  `convert_checkpoint` with the converter that it has for the producer (its NVFP4 then by the formula)
llm-dequant         `llm_dequant.model.convert` (pip install llm-dequant)
transformers        `from_pretrained`, which repairs while it loads; the weights of the model

A case is a checkpoint that stands for certain weights, or one that stands for nothing and has to be refused
(`tests/test_casebook.py`).  What a tool did with it:
right     all weights are there and are what the checkpoint stands for; or it was refused, and had to be
refused   an error, though the checkpoint can be read
wrong     no error, and weights that are other ones, still quantised, or missing; or nothing was refused that had to be
none      the tool has nothing for this producer or scheme

Weights count as right within 2^-7 of the largest of their tensor, so rounding, even to bfloat16, does not matter.  The judge is
the builder of the tests, which knows the weights before they are quantised; it is no part of qconvert.  Weights alone are
judged: neither activation scales nor KV scales, which most of these tools do not carry.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import logging
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from build import Built, build  # noqa: E402
from test_casebook import CASES, Case, Refused, prepared  # noqa: E402

TOLERANCE = 2.0**-7
QUANTISED = {torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e8m0fnu}
Weights = Mapping[str, NDArray[np.float32] | None]  # None: still quantised


Tool = Callable[[Built, Path], tuple[Weights, Mapping[str, NDArray[np.float32]] | None]]
# what came out; and what is meant, where the names are not those of the builder


class NoWayError(Exception):
    """The tool has nothing for such a checkpoint."""


def quantization(directory: Path) -> dict[str, Any]:
    """The quantisation config that tools look at."""
    config = json.loads((directory / "config.json").read_text())
    return config.get("quantization_config") or config.get("text_config", {}).get("quantization_config") or {}


def stored(directory: Path) -> Weights:
    """All tensors of a checkpoint as float32, quantised ones as None."""
    found: dict[str, NDArray[np.float32] | None] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                tensor = file.get_tensor(name)
                found[name] = None if tensor.dtype in QUANTISED else tensor.float().numpy()
    return found


def by_qconvert(built: Built, work: Path) -> tuple[Weights, Any]:
    """Convert and export."""
    import convert

    convert.convert_checkpoint(built.directory, work / "canonical")
    convert.export_checkpoint(work / "canonical", work / "dense")
    return stored(work / "dense"), None


def by_compressed_tensors(built: Built, work: Path) -> tuple[Weights, Any]:
    """`convert_checkpoint`: to compressed-tensors from modelopt's NVFP4, to dense weights from its own format and block FP8."""
    from compressed_tensors.entrypoints import convert as tools

    config = quantization(built.directory)
    method, source = str(config.get("quant_method")), built.directory
    algo = str(config.get("quant_algo", ""))
    if method == "modelopt" and "NVFP4" in algo:
        # It wants to be told which modules are quantised: the names of those that are.
        targets = [name.removesuffix(".weight_scale_2") for name in stored(source) if name.endswith(".weight_scale_2")]
        step = tools.ModelOptNvfp4Converter(targets=targets)
        tools.convert_checkpoint(source, work / "compressed", step, max_workers=1)
        return nvfp4_by_hand(stored(work / "compressed"), work / "compressed"), None
    if method == "compressed-tensors":
        last: Any = tools.CompressedTensorsDequantizer(source, dtype=torch.float32)
    elif method == "fp8" and config.get("weight_block_size"):
        last = tools.FP8BlockDequantizer.from_pretrained(source, dtype=torch.float32)
    else:
        raise NoWayError(f"{method} {algo}")
    tools.convert_checkpoint(source, work / "dense", last, max_workers=1)
    return stored(work / "dense"), None


def nvfp4_by_hand(found: Weights, directory: Path) -> Weights:
    """Dense weights of NVFP4 as compressed-tensors stores it: codes * block scale / global scale."""
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
    dense = dict(found)
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in [n for n in file.keys() if n.endswith(".weight_packed")]:  # noqa: SIM118
                module = name.removesuffix(".weight_packed")
                packed, scale = file.get_tensor(name).numpy(), file.get_tensor(f"{module}.weight_scale").float().numpy()
                codes = np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)
                divisor = file.get_tensor(f"{module}.weight_global_scale").numpy()
                fits = codes.shape[-1] == 16 * scale.shape[-1]
                dense[f"{module}.weight"] = values[codes] * np.repeat(scale, 16, -1) / divisor if fits else None
    return dense


def by_llm_dequant(built: Built, work: Path) -> tuple[Weights, Any]:
    """NVFP4 of compressed-tensors only."""
    from llm_dequant.model import convert

    if quantization(built.directory).get("quant_method") != "compressed-tensors":
        raise NoWayError("another producer")
    convert(built.directory, work / "dense", dtype="fp32")
    return stored(work / "dense"), None


def by_transformers(built: Built, work: Path) -> tuple[Weights, Any]:
    """What a loaded model has; the names are those of a model loaded from the weights that are meant."""
    from test_runtime_families import hugging_face
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, CompressedTensorsConfig, FineGrainedFP8Config

    config = quantization(built.directory)
    options: dict[str, Any] = {}
    if config.get("quant_method") == "compressed-tensors":
        options = {"quantization_config": CompressedTensorsConfig(run_compressed=False)}
    elif config.get("quant_method") == "fp8" and config.get("weight_block_size"):
        options = {"quantization_config": FineGrainedFP8Config(dequantize=True)}
    whole = json.loads((built.directory / "config.json").read_text())
    try:
        meant = hugging_face(whole, built.dense, work / "meant").state_dict()
    except Exception as error:  # a class that transformers has not
        raise NoWayError(str(error)) from None
    auto = AutoModelForImageTextToText if "vision_config" in whole else AutoModelForCausalLM
    model = auto.from_pretrained(built.directory, dtype=torch.float32, **options)
    found = model.state_dict()
    same: dict[str, NDArray[np.float32] | None] = {}
    for name, value in meant.items():
        there = found.get(name)
        if "visual" in name.split("."):  # without a tower on disk, both have a random one
            continue
        quantised = there is None or there.dtype in QUANTISED or there.shape != value.shape
        same[name] = None if quantised else there.float().numpy()
    return same, {name: meant[name].float().numpy() for name in same}


TOOLS: Mapping[str, tuple[str, Tool]] = {
    "qconvert": ("convert", by_qconvert),
    "compressed-tensors": ("compressed_tensors", by_compressed_tensors),
    "llm-dequant": ("llm_dequant", by_llm_dequant),
    "transformers": ("transformers", by_transformers),
}


PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",)}


def experts(found: Weights, name: str) -> NDArray[np.float32] | None:
    """A stack of experts, put together from weights that lie one by one; None where they do not."""
    module, _, last = name.rpartition(".")
    stacks = []
    while all(f"{module}.{len(stacks)}.{part}.weight" in found for part in PARTS.get(last, ("",))):
        parts = [found[f"{module}.{len(stacks)}.{part}.weight"] for part in PARTS[last]]
        if any(part is None for part in parts):
            return None
        stacks.append(np.concatenate([part for part in parts if part is not None]))
    return np.stack(stacks) if stacks else None


def compare(found: Weights, meant: Mapping[str, NDArray[np.float32]], disk: Mapping[str, str]) -> str:
    """The first thing that is wrong, or nothing."""
    for name, expected in meant.items():
        here = next((n for n in (name, disk.get(name, name)) if n in found), None)
        one_by_one = experts(found, name) if here is None else None
        if here is None and one_by_one is None:
            return f"{name} is missing"
        value = found[here] if here is not None else one_by_one
        if value is None:
            return f"{name} is still quantised"
        if value.shape != expected.shape:
            return f"{name} has shape {list(value.shape)}, not {list(expected.shape)}"
        error = float(np.abs(value.astype(np.float64) - expected).max(initial=0))
        if not error <= TOLERANCE * float(np.abs(expected).max(initial=0)):
            return f"{name} is off by {error:.2g}"
    return ""


def judge(case: Case, tool: Tool, work: Path) -> tuple[str, str]:
    """(right, refused, wrong or none; why)."""
    built = prepared(case, work / "in", lambda **options: build(work / "in", **options))
    try:
        found, meant = tool(built, work)
        problem = compare(found, built.dense, built.disk) if meant is None else compare(found, meant, {})
    except NoWayError as error:
        return "none", str(error)
    except Exception as error:  # whatever a tool raises is its way of refusing
        said = f"{type(error).__name__}: {error}".replace(str(work), ".")[:200]
        return "right" if isinstance(case.outcome, Refused) else "refused", said
    if isinstance(case.outcome, Refused):
        return "wrong", "nothing was refused"
    return ("wrong", problem) if problem else ("right", "")


def main() -> None:
    """Run every case through every tool, and print how often each did what."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="", help="cases whose name has this")
    parser.add_argument("--markdown", action="store_true", help="the table of the README")
    parser.add_argument("--json", type=Path, help="where to write every verdict")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    with contextlib.suppress(ImportError):
        from loguru import logger

        logger.remove()
    tools = {name: tool for name, (module, tool) in TOOLS.items() if importlib.util.find_spec(module)}
    verdicts: dict[str, dict[str, tuple[str, str]]] = {}
    for case in CASES:
        if args.only not in case.name:
            continue
        verdicts[case.name] = {}
        for name, tool in tools.items():
            quiet = io.StringIO()
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
                verdicts[case.name][name] = judge(case, tool, Path(folder))
    if args.json:
        args.json.write_text(json.dumps(verdicts, indent=1) + "\n")
    must_refuse = {case.name for case in CASES if isinstance(case.outcome, Refused)}
    print(f"{len(verdicts)} cases, of which {len(must_refuse & verdicts.keys())} must be refused")
    rows = []
    for name in tools:
        count = Counter(verdicts[case][name][0] for case in verdicts)
        rows.append([name, *(str(count[kind]) for kind in ("right", "refused", "wrong", "none"))])
    head = ["", "right", "refused, though readable", "wrong, no error", "has nothing for it"]
    for row in [head, ["---"] * 5, *rows] if args.markdown else [head, *rows]:
        print("| " + " | ".join(row) + " |" if args.markdown else "".join(f"{cell:<26}" for cell in row))


if __name__ == "__main__":
    main()
