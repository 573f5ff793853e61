"""Kernels that lose a barrier, a wait, a fence or a mask."""

from collections import Counter

import numpy as np

from tests.support.emulation import lane_address, launch
from tools.ptx_emulator.mutation import mutate, summary

EXCHANGE = f"""{lane_address(0, 4, "%d10")} {lane_address(1, 4, "%d11")} mov.b32 %r1, global_smem; shl.b32 %r2, %r0, 2;
    add.s32 %r3, %r1, %r2; setp.lt.u32 %p1, %r0, 60; selp.b32 %r9, 4, 0, %p1;
    cp.async.ca.shared.global [%r3], [%d10], 4, %r9; cp.async.commit_group; cp.async.wait_group 0; bar.sync 0;
    xor.b32 %r5, %r0, 32; shl.b32 %r5, %r5, 2; add.s32 %r5, %r1, %r5; ld.shared.b32 %r6, [%r5]; bar.sync 0; bar.sync 0;
    st.shared.b32 [%r3], %r6; bar.warp.sync -1; xor.b32 %r7, %r0, 1; shl.b32 %r7, %r7, 2; add.s32 %r7, %r1, %r7;
    ld.shared.b32 %r8, [%r7]; @%p1 st.global.b32 [%d11], %r8; setp.gt.u32 %p2, %r0, 99;
    @%p2 bra $never; bra $end; $never: bar.sync 0; $end:"""


def test_what_is_needed_is_found_and_what_is_not_is_harmless() -> None:
    """Of two barriers in a row either may go, the one before may not; masks of a copy and a store; a path not taken."""
    x, y = np.arange(1, 61, dtype=np.uint32), np.zeros(60, np.uint32)
    own = launch(EXCHANGE, [x, y], threads=64, shared=256)
    outcomes = mutate(own)
    results = Counter((outcome.kind, outcome.result) for outcome in outcomes)
    assert results == {
        ("mask", "found"): 2,
        ("wait", "found"): 1,
        ("barrier", "found"): 1,
        ("barrier", "harmless"): 2,
        ("barrier", "not executed"): 1,
        ("barrier of a warp", "found"): 1,
    }
    assert (y == 0).all()  # the memory is as it was
    assert summary(outcomes)[:3] == ["mask: 2 found", "wait: 1 found", "barrier: 1 found, 2 harmless, 1 not executed"]
    assert not own.check().findings


def test_a_lost_mask_that_changes_results() -> None:
    y = np.zeros(32, np.uint32)
    body = f"{lane_address(0, 4, '%d10')} setp.lt.u32 %p1, %r0, 7; @%p1 st.global.b32 [%d10], 5;"
    (outcome,) = mutate(launch(body, [y]))
    assert (outcome.kind, outcome.result, outcome.finding) == ("mask", "other results", "")
