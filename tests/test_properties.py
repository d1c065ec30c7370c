"""Properties over random sizes: expanding a scale and reducing it again, block rows that restart, nothing lost.

Whole conversions of random tiny networks, and the contract's shape rules on random partitions.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from build import BLOCK, E4M3, RECIPES, Built, Sizes, build, per_row, read_json, read_tensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import convert
from convert.dialects.base import Claim, Experts, ModuleNames, Rules, has_wildcard
from convert.families import FAMILIES
from convert.names import canonical_name
from convert.ops import TRANSFORMS, Term, term_nbytes
from runtime.format import DTYPE_BYTES, ModuleSpec, block_rows, module_tensors

FEW = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None)
MANY = settings(max_examples=100, deadline=None, database=None)

FACTORS = st.integers(1, 3)
NETWORKS = st.builds(
    # K is a multiple of 32 everywhere, rows are anything.
    lambda hidden, inter, vocab, kv, group, keys, repeat, value: Sizes(
        hidden=32 * hidden, intermediate=32 * inter, vocab=vocab, heads=kv * group, kv_heads=kv,
        head_dim=32, key_heads=keys, value_heads=keys * repeat, key_dim=8, value_dim=32 * value,
    ),
    FACTORS, FACTORS, st.integers(80, 90), FACTORS, FACTORS, FACTORS, FACTORS, FACTORS,
)  # fmt: skip
WIDE = st.builds(  # rows around the edges of 128 x 128 blocks
    lambda hidden, inter, key_dim, value_dim, heads: Sizes(
        hidden=hidden, intermediate=inter, vocab=80, heads=heads, kv_heads=1, head_dim=64, key_heads=2, value_heads=2,
        key_dim=key_dim, value_dim=value_dim,
    ),
    st.sampled_from([96, 128, 160]), st.sampled_from([64, 128, 256, 288]), st.sampled_from([32, 48, 64, 128]),
    st.sampled_from([32, 64, 80]), st.integers(1, 3),
)  # fmt: skip
PER_TENSOR = ["fp8", "nvfp4", "mixed", "mixed_inputs", "mixed_groups"]


@contextmanager
def converted(scheme: tuple[str, str], sizes: Sizes, seed: int) -> Iterator[tuple[Built, Path]]:
    """Build and convert a random network in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        built = build(path / "in", family="qwen3_5", dialect=scheme[0], scheme=scheme[1], sizes=sizes, seed=seed)
        convert.convert_checkpoint(path / "in", path / "out")
        yield built, path / "out"


@FEW
@given(sizes=NETWORKS, scheme=st.sampled_from(sorted(RECIPES)), seed=st.integers(0, 9))
def test_any_sizes(sizes: Sizes, scheme: tuple[str, str], seed: int) -> None:
    """Canonical tensors are the builder's for partitions of any size, and `verify` agrees."""
    with converted(scheme, sizes, seed) as (built, out):
        assert read_tensors(out) == built.canonical
        convert.verify_conversion(built.directory, out)


@FEW
@given(sizes=NETWORKS, scheme=st.sampled_from(PER_TENSOR), seed=st.integers(0, 9))
def test_expand_then_reduce(sizes: Sizes, scheme: str, seed: int) -> None:
    """One value per stored scale comes back from the partitions that it was given to, each partition having its own."""
    shards = {"in_proj_qkvz": ("in_proj_qkv",) * 3 + ("in_proj_z",), "qkv_proj": ("q_proj", "k_proj", "v_proj"),
              "gate_up_proj": ("gate_proj", "up_proj"), "in_proj_ba": ("in_proj_b", "in_proj_a"),
              "in_proj_qkv": ("in_proj_qkv",) * 3}  # fmt: skip
    with converted(("modelopt", scheme), sizes, seed) as (built, out):
        source, found = read_tensors(built.directory), read_tensors(out)
        for module, entry in read_json(out / "config.json")["quantization"]["modules"].items():
            role = {"nvfp4": "weight_scale_2", "fp8_tensor": "weight_scale"}[entry["scheme"]]
            parent, dot, last = module.rpartition(".")
            expanded = found[f"{module}.{role}"].floats()
            of = shards.get(last, (last,))
            assert len(expanded) == len(entry.get("partitions", [0])) == len(of)
            reduced: dict[str, set[float]] = {}
            for shard, value in zip(of, expanded.tolist(), strict=True):
                reduced.setdefault(f"{parent}{dot}{shard}", set()).add(value)
            assert reduced == {shard: {source[f"{shard}.{role}"].floats().item()} for shard in reduced}
            if "partitions" in entry:
                assert sum(rows for _, rows in entry["partitions"]) == entry["shape"][0]


@FEW
@given(sizes=WIDE, scheme=st.sampled_from(["fp8_pb_wo"]), seed=st.integers(0, 9))
def test_block_rows_restart(sizes: Sizes, scheme: str, seed: int) -> None:
    """Reading the canonical scale with blocks that restart at each partition gives each projection its own blocks."""
    with converted(("modelopt", scheme), sizes, seed) as (built, out):
        found = read_tensors(out)
        for module, entry in read_json(out / "config.json")["quantization"]["modules"].items():
            parts = entry.get("partitions", [["", entry["shape"][0]]])
            scale, codes = found[f"{module}.weight_scale"].floats(), found[f"{module}.weight"].codes()
            assert scale.shape == (sum(math.ceil(n / BLOCK) for _, n in parts), math.ceil(entry["shape"][1] / BLOCK))
            rows = np.concatenate([np.arange(n) // BLOCK for _, n in parts])
            starts = np.cumsum([0, *(math.ceil(n / BLOCK) for _, n in parts)])[:-1]
            rows += per_row(starts, parts)
            dense = E4M3[codes] * scale[rows].repeat(BLOCK, 1)[:, : entry["shape"][1]]
            parent, dot, last = module.rpartition(".")
            names = {"in_proj_qkvz": ("in_proj_qkv", "in_proj_z"), "gate_up_proj": ("gate_proj", "up_proj"),
                     "qkv_proj": ("q_proj", "k_proj", "v_proj")}.get(last, (last,))  # fmt: skip
            expected = np.concatenate([built.dense[f"{parent}{dot}{name}.weight"] for name in names])
            assert np.array_equal(dense.view(np.uint32), expected.view(np.uint32))


PARTITIONS = st.lists(st.integers(1, 400), min_size=1, max_size=5)


@MANY
@given(rows=PARTITIONS, columns=st.integers(1, 20))
def test_shapes_of_the_contract(rows: list[int], columns: int) -> None:
    """A module's spec survives its JSON form; block rows are those of its partitions, one by one."""
    partitions = tuple((f"p{i}", n) for i, n in enumerate(rows)) if len(rows) > 1 else (("", rows[0]),)
    for scheme in ("fp8_tensor", "fp8_channel", "fp8_block", "nvfp4", "mxfp8", "mxfp4"):
        spec = ModuleSpec(scheme, (sum(rows), 32 * columns), partitions, None)
        assert ModuleSpec.from_json("m", spec.to_json()) == spec
        tensors = module_tensors(spec)
        assert tensors["weight"].shape[0] == sum(rows)
        assert all(t.nbytes == math.prod(t.shape) * DTYPE_BYTES[t.dtype] for t in tensors.values())
    blocks = [block_rows(ModuleSpec("fp8_block", (n, 128), (("", n),))) for n in rows]
    assert block_rows(ModuleSpec("fp8_block", (sum(rows), 128), partitions)) == sum(blocks)


@MANY
@given(count=st.integers(1, 50), repeat=st.integers(1, 4), name=st.sampled_from(sorted(TRANSFORMS)))
def test_size_rule_of_terms(count: int, repeat: int, name: str) -> None:
    """An operation's size rule agrees with what it does to bytes."""
    from convert.apply import transform

    for dtype in TRANSFORMS[name].inputs:
        data = bytes([0x3F]) * (count * DTYPE_BYTES[dtype])
        done = transform(name, data, dtype) * repeat
        assert len(done) == term_nbytes(Term("t", name, repeat), dtype, (count,))
        assert len(done) == term_nbytes(Term("t", name, repeat, (3, 3 + count)), dtype, (count + 7,))


SEGMENT = st.sampled_from(["model", "language_model", "base_model", "base_layer", "layers", "lm_head", "visual", "mtp",
                           "norm", "embed_tokens", "0", "1", "mlp", "q_proj", "weight", "backbone", "x"])  # fmt: skip


@MANY
@given(segments=st.lists(SEGMENT, min_size=1, max_size=8))
def test_renaming_is_idempotent(segments: list[str]) -> None:
    """A canonical name is its own canonical name, and never holds a wrapper's segments again."""
    from convert.families import FAMILIES

    for family in FAMILIES:
        name = canonical_name(".".join(segments), family.names)
        if name is not None:
            assert canonical_name(name, family.names) == name
            assert "base_layer" not in name.split(".")
            assert not name.startswith("base_model.")


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_widening_and_reciprocals(dtype: str) -> None:
    """The converter's float rules against the builder's, on values of every exponent."""
    from build import raw

    from convert.apply import transform

    exponents = np.arange(-12, 13)
    values = raw(dtype, (2.0**exponents * 1.37).astype(np.float32))
    assert transform("f32", values.data, dtype) == raw("F32", values.floats()).data
    inverse = np.array([np.float32(1 / float(v)) for v in values.floats()])  # float64, then one rounding
    assert transform("reciprocal", values.data, dtype) == raw("F32", inverse).data


PARENT = "model.layers.1.mlp.experts"
EACH = tuple(f"{PARENT}.{expert}.up_proj" for expert in range(12))
ENTRIES: tuple[tuple[str, ...], ...] = (  # what lists of configs say of experts: of one, of some, of all, of others
    (), EACH, EACH[1:], EACH[:1], tuple(f"{PARENT}.{expert}" for expert in range(12)), ("lm_head",),
    *((f"{wrapper}{PARENT}{rest}",) for wrapper in ("", "language_model.") for rest in ("", ".3", ".3.up_proj", "*", ".3*",
      ".1*", ".3.gate_up_proj", ".1?.up_proj", ".*.up_proj", ".[0-4].*")),
    ("model.layers.1*",), ("model.layers.10*",), ("*up_proj*",), ("*.3.*",), ("*experts.1*",),
    ("re:.*up_proj",), ("re:.*experts.*up_proj$",), (r"re:.*experts\.\d\.up_proj",), (r"re:.*experts..\.up_proj",),
    ("re:.*mlp.experts.*",), (r"re:.*\.(3|4)\..*",), (r"re:.*[12]\.up.*",), ("re:model.layers.*",),
    ("re:.*p.up_proj|.*router",), ("re:.+up_proj",),
)  # fmt: skip


@pytest.mark.parametrize("place", ["ignored", "exact", "ordered"])
def test_experts_asked_together(place: str) -> None:
    """A config that is asked for all experts at once says of each what it says when asked for that one."""
    space = next(family.names for family in FAMILIES if family.name == "qwen3_5_moe")

    def names(*entries: str) -> ModuleNames:
        listed = ModuleNames()
        for entry in entries:
            if entry.startswith("re:"):
                listed.add_regex(entry[3:], "config.json")
            elif has_wildcard(entry):
                listed.add_wildcard(entry, space, "config.json")
            else:
                listed.add_name(entry, space)
        return listed

    wrappers = ("model.language_model", "language_model.model")
    spellings = tuple([name.replace("model", wrapper, 1) for name in EACH] for wrapper in wrappers)
    experts = Experts(EACH, spellings, f"{PARENT}.gate_up_proj", True, (f"{PARENT}.0.up_proj",))
    for first, second in product(ENTRIES, repeat=2):
        rules = Rules("config.json", "modelopt", default=Claim("nvfp4", "nvfp4", "NVFP4"))
        if place == "ignored":
            rules.ignored = names(*first, *second)
        elif place == "exact":
            claims = Claim("fp8_tensor", None, "FP8"), Claim("nvfp4", None, "W4A16_NVFP4")
            rules.exact = {canonical_name(e, space) or e: c for es, c in zip((first, second), claims, strict=True) for e in es}
        else:
            rules.ordered = [(names(*first), Claim("fp8_tensor", None, "FP8")), (names(*second), Claim("mxfp8", None, "MXFP8"))]
        assert rules.claims(experts) == [rules.claim(experts.module(index)) for index in range(12)], (first, second)
