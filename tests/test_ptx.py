"""The machine that executes PTX, on programs written by hand: what ends a run, and what numbers come out."""

from __future__ import annotations

import re

import numpy as np
import ptx_blackwell  # noqa: F401  (its instructions, and those of `ptx_matrices`)
import pytest
import torch
from ptx import MAKERS, parse, to_bf16, to_e4m3
from ptx_machine import FaultError, Launch, Region, from_bf16

HEAD = """
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0
)
.reqntid 64
{
	.reg .pred %p<9>;
	.reg .b16 %rs<9>;
	.reg .b32 %r<40>;
	.reg .b64 %rd<9>;
	ld.param.b64 %rd1, [kernel_param_0];
	mov.u32 %r1, %tid.x;  // 0 to 63
	mul.wide.u32 %rd2, %r1, 4;
	add.s64 %rd3, %rd1, %rd2;
	shl.b32 %r2, %r1, 2;
	xor.b32 %r3, %r2, 128;  // the same place of the other warp
"""
TAIL = """
	st.global.b32 [ %rd3 + 0 ], %r9;
	ret;
}
"""


def run(code: str, out: np.ndarray | None = None, shared: int = 1024) -> list[int]:
    """What 64 threads, two warps, leave in `%r9`."""
    memory = np.zeros(256, np.uint8) if out is None else out
    Launch(parse(HEAD + code + TAIL), (1,), 2, shared, [4096], [Region("out", 4096, memory)]).run()
    return [int(x) for x in memory.view(np.uint32)]


def test_branches_meet_again() -> None:
    """A loop with another count for each thread, then a barrier."""
    code = """
	mov.b32 %r9, 0;
	mov.b32 %r4, %r1;
$L_loop:
	add.s32 %r9, %r9, %r1;
	add.s32 %r4, %r4, -1;
	setp.gt.s32 %p1, %r4, 0;
	@%p1 bra $L_loop;
	bar.sync 0;
"""
    assert run(code) == [max(t, 1) * t for t in range(64)]


FAULTS = {
    "a missing barrier": ("st.shared.b32 [%r2], %r1;\nld.shared.b32 %r9, [%r3];", "wrote, with no barrier"),
    "written too soon": (
        "st.shared.b32 [%r2], %r1;\nbar.sync 0;\nld.shared.b32 %r9, [%r3];\nst.shared.b32 [%r2], %r9;",
        "what another warp reads",
    ),
    "a barrier for some": ("setp.lt.u32 %p1, %r1, 5;\n@%p1 bar.sync 0;\nmov.b32 %r9, 0;", "some threads do not reach"),
    "part of a warp": ("setp.lt.u32 %p1, %r1, 5;\n@%p1 shfl.sync.bfly.b32 %r9, %r1, 1, 31, -1;", "part of a warp"),
    "misaligned": ("ld.global.v2.b32 {%r9, %r10}, [%rd3];", "not a multiple of 8"),
    "misaligned, shared": ("ld.shared.v2.b32 {%r9, %r10}, [%r2];", "not a multiple of 8"),
    "beyond shared memory": ("ld.shared.b32 %r9, [%r2+1020];", "beyond 1024 bytes"),
    "beyond": ("ld.global.b32 %r9, [%rd3+4];", "thread 63 of program 0: 4 bytes at out + 256, which has 256 bytes"),
    "before": ("ld.global.b32 %r9, [%rd3+-4];", "4 bytes at out + -4"),
    "something new": ("dp4a.u32.u32 %r9, %r1, %r1, %r1;", "not known: dp4a"),
    "a wrong width": ("add.s64 %rd4, %rd3, %r1;", "4 bytes, not those of s64"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_ends_a_run(name: str) -> None:
    code, said = FAULTS[name]
    with pytest.raises(FaultError, match=re.escape(said)):
        run(code)


def test_a_barrier_orders() -> None:
    assert run("st.shared.b32 [%r2], %r1;\nbar.sync 0;\nld.shared.b32 %r9, [%r3];") == [*range(32, 64), *range(32)]


def test_copies_arrive_when_they_are_waited_for() -> None:
    """Before that, shared memory is what it was."""
    before = np.arange(64, dtype=np.uint32).view(np.uint8).copy()
    start = "cp.async.ca.shared.global [ %r2 + 0 ], [ %rd3 + 0 ], 0x4, %r4;\ncp.async.commit_group;"
    waiting = "mov.b32 %r4, 4;\n" + start + "cp.async.wait_group 0;\nld.shared.b32 %r9, [%r2];"
    assert run(waiting, before.copy()) == [*range(64)]
    assert run(waiting.replace("group 0", "group 1"), before.copy()) != [*range(64)]
    none = "setp.lt.u32 %p1, %r1, 9;\nselp.b32 %r4, 4, 0, %p1;\n" + start + "cp.async.wait_group 0;\nld.shared.b32 %r9, [%r2];"
    assert run(none, before.copy()) == [*range(9), *[0] * 55]  # of 0 bytes: zeros


def test_registers_start_as_garbage() -> None:
    assert len({*run("mov.b32 %r9, %r20;")}) > 32


# 64 columns of tensor memory for two warps, each at lanes of its own: address in `%r7`
ALLOCATED = """
	mov.b32 %r4, 0;
	setp.lt.u32 %p1, %r1, 32;
	@%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r4], 64;
	bar.sync 0;
	ld.shared.b32 %r5, [%r4];
	shr.u32 %r6, %r1, 5;
	shl.b32 %r6, %r6, 21;
	add.s32 %r7, %r5, %r6;
"""
STORED = "tcgen05.st.sync.aligned.16x32bx2.x1.b32 [%r7], 1, {%r1};\n"
WAITED = "tcgen05.wait::st.sync.aligned;\n"
LOADED = "tcgen05.ld.sync.aligned.32x32b.x2.b32 {%r9, %r10}, [%r7 + 0];\ntcgen05.wait::ld.sync.aligned;\nbar.sync 0;\n"
FREED = "@%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r5, 64;\n"
BARRIER = """
	mov.b32 %r20, 512;
	setp.eq.u32 %p2, %r1, 0;
	@%p2 mbarrier.init.shared::cta.b64 [%r20], 1;
	bar.sync 0;
"""
WAIT = "{\n.reg .pred done;\nwait:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%r20], 0;\n@!done bra.uni wait;\n}\n"


def test_tensor_memory() -> None:
    """`16x32bx2` puts threads 16 to 31 of a warp beside the first 16; the other lanes are garbage."""
    one = run(ALLOCATED + STORED + WAITED + LOADED + FREED)
    assert [one[t] for t in (*range(16), *range(32, 48))] == [*range(16), *range(32, 48)]
    two = run(ALLOCATED + STORED + WAITED + LOADED + FREED + "mov.b32 %r9, %r10;")
    assert [two[t] for t in (*range(16), *range(32, 48))] == [*range(16, 32), *range(48, 64)]
    assert len({*one[16:32], *one[48:], *two[16:32], *two[48:]}) > 60


FACTORS = "mov.b32 %r21, 0x3F803F80;\n" + "".join(f"st.shared.b32 [%r2 + {1024 + 256 * i}], %r21;\n" for i in range(9))
FENCE = "fence.proxy.async.shared::cta;\n"
DESCRIPTOR = 8 << 16 | 16 << 32 | 1 << 46  # 8x8 elements after another
PRODUCT = f"""
	bar.sync 0;
	mov.b64 %rd4, {DESCRIPTOR | 1024 >> 4};
	mov.b64 %rd5, {DESCRIPTOR | 3072 >> 4};
	mov.b32 %r22, {1 << 4 | 1 << 7 | 1 << 10 | 1 << 17 | 4 << 24};  // bfloat16, 64x8
	mov.pred %p3, 0;
	@%p2 tcgen05.mma.cta_group::1.kind::f16 [%r5], %rd4, %rd5, %r22, %p3;
	@%p2 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r20];
"""
OVERWRITTEN = "bar.sync 0;\nst.shared.b32 [%r2 + 2048], %r1;\n"


def test_a_product_in_tensor_memory() -> None:
    code = ALLOCATED + BARRIER + FACTORS + FENCE + PRODUCT + WAIT + LOADED + FREED
    found = np.array(run(code, shared=4096), np.uint32).view(np.float32).reshape(2, 32)
    assert (found[:, :16] == 16).all()  # 16 ones; rows 16 and on are of the next warp
    for omitted, said in ((FENCE, "no fence.proxy.async"), (WAIT, "that is being written")):
        with pytest.raises(FaultError, match=re.escape(said)):
            run(code.replace(omitted, ""), shared=4096)
    with pytest.raises(FaultError, match="changed before it was done"):
        run(code.replace(WAIT, OVERWRITTEN + WAIT), shared=4096)
    alone = f"setp.lt.u32 %p4, %r1, 32;\n@!%p4 bra $L_other;\n{WAIT}{LOADED}bra $L_end;\n$L_other:\n{LOADED}$L_end:\n"
    with pytest.raises(FaultError, match="reads a product that it has not waited for"):
        run(code.replace(WAIT + LOADED, alone), shared=4096)


BLACKWELL_FAULTS = {
    "kept": (ALLOCATED, "leaves without tcgen05.dealloc"),
    "too much": (ALLOCATED + "@%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r4], 512;", "no 512 columns"),
    "beyond": (ALLOCATED + STORED.replace("], 1", "+ 64], 1"), "beyond tensor memory"),
    "not allocated": (ALLOCATED + STORED.replace("], 1", "+ -64], 1"), "not allocated"),
    "not waited for": (ALLOCATED + STORED + LOADED, "that is being written"),
    "lanes of others": (ALLOCATED + STORED.replace("%r7", "%r5"), "lanes of tensor memory that another warp has"),
    "no barrier object": ("mov.b32 %r20, 512;" + WAIT, "no mbarrier"),
    "for ever": (BARRIER + WAIT, "waits for what nobody does"),
    "an overwritten barrier": (BARRIER + "bar.sync 0;\n@%p2 st.shared.b32 [%r20], %r1;\nbar.sync 0;" + WAIT, "was overwritten"),
}


@pytest.mark.parametrize("name", BLACKWELL_FAULTS)
def test_what_ends_a_run_with_tensor_memory(name: str) -> None:
    code, said = BLACKWELL_FAULTS[name]
    with pytest.raises(FaultError, match=re.escape(said)):
        run(code)


def test_labels_in_braces_are_of_their_own() -> None:
    loop = "{\n.reg .pred go;\nagain:\nadd.s32 %r9, %r9, 1;\nsetp.lt.s32 go, %r9, LAST;\n@go bra again;\n}\n"
    assert run("mov.b32 %r9, 0;\n" + loop.replace("LAST", "5") + loop.replace("LAST", "9")) == [9] * 64


NUMBERS = {
    "prmt.b32 %r9, %r1, 0x01020384, 0xF540;": lambda t: t | 0x84 << 8 | 3 << 16,
    "bfe.u32 %r9, %r1, 2, 3;": lambda t: t >> 2 & 7,
    "bfe.s32 %r9, %r1, 0, 2;": lambda t: (t & 1) - (t & 2) & 0xFFFFFFFF,
    "lop3.b32 %r9, %r1, 0x2A, 0x11, 0xea;": lambda t: t & 0x2A | 0x11,
    "mad.lo.s32 %r9, %r1, -3, 7;": lambda t: 7 - 3 * t & 0xFFFFFFFF,
    "mul.hi.u32 %r9, %r1, 0x80000000;": lambda t: t >> 1,
    "shl.b32 %r9, %r1, 40;": lambda t: 0,
    "shr.s32 %r9, -64, 3;": lambda t: 0xFFFFFFF8,
    "div.s32 %r9, -7, 2;": lambda t: 0xFFFFFFFD,
    "rem.s32 %r9, -7, 4;": lambda t: 0xFFFFFFFD,
    "shfl.sync.idx.b32 %r9, %r1, 3, 31, -1;": lambda t: t // 32 * 32 + 3,
    "shfl.sync.up.b32 %r9, %r1, 1, 0, -1;": lambda t: max(t - 1, t // 32 * 32),
    "redux.sync.max.s32 %r9, %r1, -1;": lambda t: t | 31,
    "redux.sync.max.f32 %r9, 0f7FC00000, -1;": lambda t: 0x7FC00000,
    "setp.lt.u32 %p1, %r1, 9;\nselp.b32 %r4, %r1, 0x7FC00000, %p1;\nredux.sync.max.f32 %r9, %r4, -1;": lambda t: (
        8 if t < 32 else 0x7FC00000
    ),
    "cvt.u16.u32 %rs1, %r1;\nmov.b32 %r9, {%rs1, 7};": lambda t: t | 7 << 16,
}


@pytest.mark.parametrize("code", NUMBERS)
def test_integers(code: str) -> None:
    assert run(code) == [NUMBERS[code](t) for t in range(64)]


def test_rounding_of_bfloat16() -> None:
    """As torch does it, ties and NaN too."""
    random = torch.Generator().manual_seed(0)
    x = torch.randint(-(2**31), 2**31, (20000,), generator=random).to(torch.int32)
    x[:5000] = x[:5000] & -65536 | 0x8000  # ties
    x[-2:] = torch.tensor([0x7F800000, -(2**23)])  # infinite
    values = x.view(torch.float32)
    expected = values.bfloat16().float().numpy()
    np.testing.assert_array_equal(from_bf16(to_bf16(values.numpy())), expected)


def test_rounding_of_e4m3() -> None:
    """Every code, and the midpoints between them, which go to the even one; beyond 448 it saturates."""
    codes = np.arange(0, 0x7F, dtype=np.uint8)
    values = torch.from_numpy(codes).view(torch.float8_e4m3fn).double().numpy()
    np.testing.assert_array_equal(to_e4m3(values.astype(np.float32)), codes)
    between = ((values[1:] + values[:-1]) / 2).astype(np.float32)
    np.testing.assert_array_equal(to_e4m3(between), codes[:-1] + (codes[:-1] & 1))
    np.testing.assert_array_equal(to_e4m3(np.array([449, 1e9, np.inf], np.float32)), [0x7E] * 3)


def test_fragments_of_mma() -> None:
    """Identity times a matrix, laid out as the ISA says: row t / 4 and columns 2 (t % 4) and the next."""
    code = """
	mov.b32 %r9, 0;
	and.b32 %r10, %r1, 31;
	shr.u32 %r11, %r10, 2;
	and.b32 %r12, %r10, 3;
	shl.b32 %r13, %r12, 1;
	setp.eq.b32 %p1, %r11, %r13;
	selp.b32 %r14, 0x3F80, 0, %p1;
	add.s32 %r15, %r13, 1;
	setp.eq.b32 %p2, %r11, %r15;
	selp.b32 %r16, 0x3F800000, 0, %p2;
	or.b32 %r17, %r14, %r16;
	cvt.rn.f32.u32 %r18, %r10;
	cvt.rn.bf16x2.f32 %r19, 0f00000000, %r18;
	mov.b32 %r20, 0;
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
		{%r21, %r22, %r23, %r24}, {%r17, %r20, %r20, %r17}, {%r19, %r20}, {%r20, %r20, %r20, %r20};
	cvt.rzi.u32.f32 %r9, %r21;
"""
    # b[k = 2 (t % 4), n = t / 4] = t; c[m, n] = b[m, n]; thread t has c[t / 4, 2 (t % 4)]
    expected = [0 if t // 4 % 2 else t % 4 * 2 * 4 + t // 8 for t in range(32)]
    assert run(code) == expected * 2


def test_every_maker_is_named_as_the_isa_names_it() -> None:
    assert all(name.isidentifier() for name in MAKERS)
