"""KV-cache scales: where checkpoints keep them, and the steps that carry them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from runtime.format import DENSE_DTYPES, DTYPE_BYTES

from .dialects.base import Rules
from .draft import Draft
from .errors import Problem
from .families.base import Part
from .ops import Step, Term
from .recognise import INCOMPLETE
from .source import TensorInfo

# How KV-cache scales are spelt, relative to the attention module -> the canonical scales that the tensor stands for.
SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "k_proj.k_scale": ("k_scale",),
    "v_proj.v_scale": ("v_scale",),
    "qkv_proj.k_scale": ("k_scale",),
    "qkv_proj.v_scale": ("v_scale",),
    "attn.k_scale": ("k_scale",),
    "attn.v_scale": ("v_scale",),
    "k_scale": ("k_scale",),
    "v_scale": ("v_scale",),
    "k_proj.output_scale": ("k_scale",),
    "v_proj.output_scale": ("v_scale",),
    "kv_scale": ("k_scale", "v_scale"),  # AutoFP8: one for both
}


def plan_kv_scales(draft: Draft, configs: Sequence[Rules], part: Part, attention: Sequence[str], heads: int) -> None:
    """Plan the KV-cache scales of a part; partial sets are refused.

    `attention`: canonical names of its attention modules; `heads`: how many KV heads they have.
    """
    claims = [(r, r.kv_cache) for r in configs if r.kv_cache is not None]
    found: dict[str, dict[str, TensorInfo]] = {}
    for module in attention:
        scales: dict[str, TensorInfo] = {}
        for spelling, roles in SPELLINGS.items():
            info = draft.index.take(f"{module}.{spelling}")
            for role in roles if info is not None else ():
                assert info is not None
                twin = scales.setdefault(role, info)
                if twin is not info:
                    draft.problem(info, f"one {role} of {module}", f"two: also {twin.name}", "remove one of them")
        found[module] = scales
    if not any(found.values()):
        for rules, claim in claims if not part.optional else ():
            draft.note(f"{rules.where} says KV cache {claim.label}, the files have no KV scales: none is used")
        return
    if claims and len(claims) < len(configs):
        silent = ", ".join(r.where for r in configs if r.kv_cache is None)
        draft.note(f"{claims[0][0].where} says KV cache {claims[0][1].label}, {silent} does not mention it")
    formats = {claim.format for _, claim in claims}
    if formats - {"fp8"}:
        where = ", ".join(f"{r.where}: {c.label}" for r, c in claims)
        draft.problems.append(
            Problem("", "KV cache", "FP8", where, "export with an FP8 KV cache, or without KV quantisation")
        )
    if not formats:
        draft.note("no config mentions a KV cache, the files have KV scales: taken as FP8")
    for module, scales in found.items():
        for role in ("k_scale", "v_scale"):
            info = scales.get(role)
            if info is None:
                near = next(iter(scales.values()), None) or next(i for s in found.values() for i in s.values())
                name = draft.index.stored_spelling(f"{module}.{role}")
                draft.problems.append(
                    Problem(near.file, name, f"a {role}, as other layers have", "no such tensor", INCOMPLETE)
                )
                continue
            count = max(1, (info.end - info.start) // DTYPE_BYTES[info.dtype])
            if info.dtype not in DENSE_DTYPES or count not in (1, heads):
                draft.problem(info, f"a float scale of [1] or [{heads}]", f"{info.dtype} {list(info.shape)}", INCOMPLETE)
                continue
            draft.kv_cache[module] = "tensor" if count == 1 else "head"
            step = Step(f"{module}.{role}", "F32", (count,), (Term(info.name, "f32"),), "scale")
            draft.step(step, [(info.name, info, step.terms)])
