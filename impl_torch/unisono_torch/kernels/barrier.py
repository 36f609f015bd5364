"""How programs of one launch wait for others: what one stored before it arrived, those load that waited for it."""

# Triton's own language, which checkers of Python read wrongly
# pyright: basic, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl

_ARRIVE = tl.constexpr(
    "{ .reg .pred first; .reg .b32 thread; mov.u32 thread, %tid.x; setp.eq.u32 first, thread, 0; "
    "@first red.release.gpu.global.add.u32 [$1], 1; mov.u32 $0, 0; }"
)
_WAIT = tl.constexpr(
    "{ .reg .pred first, early; .reg .b32 thread, here; mov.u32 thread, %tid.x; setp.eq.u32 first, thread, 0; mov.u32 here, 0; "
    "again: @first ld.acquire.gpu.global.u32 here, [$1]; setp.lt.and.s32 early, here, $2, first; @early bra again; mov.u32 $0, 0; }"
)


@triton.jit
def arrive(counter):
    """One more at `counter`; what this program has stored is there for all who `wait`."""
    tl.debug_barrier()  # its other threads' stores come before its one release
    tl.inline_asm_elementwise(_ARRIVE, "=r,l", [counter], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def wait(counter, count):
    """Until `count` have arrived."""
    tl.inline_asm_elementwise(_WAIT, "=r,l,r", [counter, count], dtype=tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()
