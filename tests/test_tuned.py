"""The table of tuned cuts: what it may hold, that kernels read it, and how the benchmark brings it up to date."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from bench import tune
from bench.gpu_rows import Bench, Line
from bench.gpu_rows import kernels as kernels_with_cases
from runtime.format import ACTIVATIONS
from runtime.kernels import fp8_linear, nvfp4_linear, tiles, tuned
from runtime.kernels.cases import Case, make_inputs, make_tensors

CPU = torch.device("cpu")
MODULES = {"fp8_linear": fp8_linear, "nvfp4_linear": nvfp4_linear}


def test_the_file_holds_what_kernels_understand() -> None:
    for gpu, kernels in json.loads(tuned.FILE.read_text()).items():
        assert gpu.startswith("sm_")
        for name, shapes in kernels.items():
            short, scheme, activations = name.split(" ")
            module = dict(kernels_with_cases())[short]
            assert scheme in module.SCHEMES
            assert activations == "full" or activations in ACTIVATIONS
            for shape, widths in shapes.items():
                N, K = map(int, shape.split("x"))
                for tokens, change in widths.items():
                    default = tiles.choose_tiles(module.SHAPES, int(tokens), N, K)
                    cut = tiles.recut(default, K, **change)
                    assert default.tokens == int(tokens)
                    assert change.keys() <= set(tuned.FIELDS)
                    assert cut != default
                    assert cut.split == 1 or -(-N // cut.rows) <= tiles.COUNTERS


@pytest.mark.parametrize(("split", "expected"), [(1, (1, 10)), (3, (3, 4)), (4, (4, 3)), (6, (5, 2)), (99, (10, 1))])
def test_no_range_is_empty(split: int, expected: tuple[int, int]) -> None:
    cut = tiles.recut(tiles.Tiles(64, 8, 2, 5, 2, 4), 1270, split=split)
    assert (cut.split, cut.steps) == expected
    assert (cut.split - 1) * cut.steps < 10 <= cut.split * cut.steps


@pytest.mark.parametrize("short", MODULES)
def test_kernels_are_cut_as_the_file_says(short: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = MODULES[short]
    case = Case("", module.SCHEMES[0], (70,), 1024, tiny=True)
    spec, tensors, x = case.spec(), make_tensors(case, CPU, 1), make_inputs(case, 2, CPU, 2)
    expected = module.reference(x, spec, tensors)
    name, made = tuned.name(short, case.scheme, None), []
    original = tiles.recut

    def watched(*arguments: Any, **change: Any) -> Any:
        made.append(change)
        return original(*arguments, **change)

    monkeypatch.setattr(tiles, "recut", watched)
    for content, change in (
        ({}, {}),
        ({"cpu": {name: {"70x1024": {"8": {"split": 3, "stages": 2}}}}}, {"split": 3, "stages": 2}),
        ({"sm_90, 132 SMs": {name: {"70x1024": {"8": {"split": 3}}}}}, {}),  # another GPU
        ({"cpu": {name: {"70x1024": {"16": {"split": 3}}}}}, {}),  # more tokens
    ):
        made.clear()
        tiles._tiles_for.cache_clear()
        monkeypatch.setattr(tuned, "table", lambda content=content: content)
        out = torch.full(expected.shape, torch.nan)
        module.prepare(spec, tensors)(x, out=out)
        assert made == [change]
        assert (out - expected).abs().max() < 1e-5 * expected.abs().max()
    tiles._tiles_for.cache_clear()


def line(gain: float, change: dict[str, int], tokens: int = 8, failed: bool = False) -> Line:
    values = {
        "us": 9.0, "best us": 9.0 / gain, "gain": gain, "kernel": "a b full", "shape": "3x5", "tokens": tokens,
        "change": json.dumps(change),
    }  # fmt: skip
    return Line("tune", "", values, failed)


def test_the_file_is_brought_up_to_date(tmp_path: Path) -> None:
    """What is better is entered; what is no better any more goes; other GPUs, kernels and widths stay."""
    old = {"x": {"a b full": {"3x5": {"8": {"split": 4}, "16": {"split": 2}}}}, "other": {"k": {"1x1": {"8": {"stages": 3}}}}}
    file = tmp_path / "tuned.json"
    file.write_text(json.dumps(old))
    tune.save([line(1.2, {"split": 6}), line(1.5, {"split": 1}, failed=True)], "x", file)
    new = json.loads(file.read_text())
    assert new == {**old, "x": {"a b full": {"3x5": {"8": {"split": 6}, "16": {"split": 2}}}}}
    tune.save([line(1.01, {"split": 5}), line(1.0, {}, 16)], "x", file)
    assert json.loads(file.read_text()) == {"other": old["other"]}


def test_tuning_finds_the_faster_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock under which one number of ranges is fastest, and one cut that is wrong, however fast."""
    case = Case("", "fp8_tensor", (70,), 1024, tiny=True)
    cuts: list[Any] = []
    original = fp8_linear.prepare

    def prepare(*arguments: Any) -> Any:
        launch = original(*arguments)

        def watched(x: Any, out: Any = None, tiles: Any = None) -> Any:
            assert out is None or out.dtype == x.dtype  # what is checked is what is timed, and compiled once
            cuts.append(tiles)
            return launch(x, out if tiles.split != 1 else torch.empty_like(out), tiles)

        return watched

    def seconds(launch: Any, bench: Bench) -> float:
        return {2: 5.0, 4: 2.0, 1: 1.0}.get(cuts[-1].split, 9.0) - (cuts[-1].stages == 5)

    monkeypatch.setattr(fp8_linear, "prepare", prepare)
    monkeypatch.setattr(tune, "seconds", seconds)
    (found,) = tune.tune("a b full", fp8_linear, case, 8, Bench(CPU, quick=True))
    assert json.loads(str(found.values["change"])) == {"split": 4, "stages": 5}
    assert found.values["best us"] == pytest.approx(1e6)


def test_cuts_are_compiled_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each number of ranges, and other depths of the default."""
    cuts: list[Any] = []
    monkeypatch.setattr(fp8_linear, "prepare", lambda spec, tensors: lambda x, tiles: cuts.append((tiles.split, tiles.stages)))
    case = next(case for case in fp8_linear.CASES if case.tiny and case.K == 1024)
    monkeypatch.setattr(tune, "problems", lambda quick: [("a b full", fp8_linear, case, 8)])
    (row,) = tune.compile_rows(Bench(CPU))
    assert list(row.run(Bench(CPU))) == []
    default = tune.default_of(fp8_linear, case, 8, CPU)
    assert {split for split, _ in cuts} == {1, 2, 3, 4, 8}
    assert {stages for split, stages in cuts if split == default.split} == {default.stages, *tune.STAGES}
