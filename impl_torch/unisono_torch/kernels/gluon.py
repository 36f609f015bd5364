"""Gluon, Triton's lower language; under Triton's interpreter, which does not know it, stand-ins that run the same source on a CPU.

There a layout says nothing, and what a GPU does in its own time is held to its rules: a copy is there once its group was waited for, a
product once it was; shared memory is not overwritten under a product that reads it, nor read by one before a fence.
"""

# the stand-ins take what the kernels here give, not all that Gluon takes
# pyright: reportAssignmentType=false

from __future__ import annotations

from typing import Any

from unisono_torch.kernels.registry import interpreted

if interpreted():
    import triton
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    jit: Any = triton.jit
    _products: list[_Product] = []  # those that are under way, in order
    _unfenced: list[Shared] = []
    _copies: list[list[tuple[Shared, Any]]] = [[]]  # by group; the last is not committed

    class Shared:
        """A tile of shared memory; of three axes, one tile for each of the first."""

        def __init__(self, parts: int | None = None) -> None:
            self.parts = None if parts is None else [Shared() for _ in range(parts)]
            self.held: Any = None

        def index(self, i: Any) -> Shared:
            assert self.parts is not None
            return self.parts[int(i)]

        def permute(self, order: tuple[int, int]) -> View:
            return View(self).permute(order)

        def slice(self, start: int, length: int) -> View:
            return View(self, slice(int(start), int(start) + int(length)))

        def store(self, value: Any) -> None:
            _overwritten(self)
            self.held = value
            _unfenced.append(self)

        def load(self, layout: None) -> Any:
            assert self.held is not None, "shared memory was read before it was written"
            return self.held

    class View:
        """Some rows of a tile, or its transpose."""

        def __init__(self, tile: Shared, rows: slice = slice(None), turned: bool = False) -> None:
            self.tile, self.rows, self.turned = tile, rows, turned

        def permute(self, order: tuple[int, int]) -> View:
            return View(self.tile, self.rows, not self.turned)

        def load(self) -> Any:
            held = self.tile.load(None)
            data = held.handle.data[self.rows]
            held = tl.tensor(TensorHandle(data, held.handle.dtype), tl.block_type(held.dtype, list(data.shape)))
            return tl.trans(held) if self.turned else held

    class _Product:
        def __init__(self, value: Any, reads: list[Shared]) -> None:
            self.value, self.reads = value, reads

    def _overwritten(tile: Shared) -> None:
        assert not any(tile in product.reads for product in _products), "a product under way reads what is overwritten"
        assert not any(tile is target for group in _copies for target, _ in group), "a copy under way writes there"

    class gl:
        @staticmethod
        def _no_layout(*_: Any, **__: Any) -> None:
            return None

        BlockedLayout = SliceLayout = DotOperandLayout = NVMMADistributedLayout = SwizzledSharedLayout = _no_layout
        bfloat16 = float32 = tl.float32  # the interpreter cannot compute in 16 bits
        int64, float64 = tl.int64, tl.float64
        static_range = staticmethod(lambda count: range(int(count)))

        class NVMMASharedLayout:
            get_default_for = staticmethod(lambda *_: None)

        @staticmethod
        def arange(start: int, end: int, layout: None) -> Any:
            return tl.arange(start, end)

        @staticmethod
        def zeros(shape: list[int], dtype: Any, layout: None) -> Any:
            return tl.zeros(shape, dtype)

        @staticmethod
        def convert_layout(value: Any, layout: None) -> Any:
            return value

        @staticmethod
        def allocate_shared_memory(dtype: Any, shape: list[int], layout: None) -> Shared:
            _products.clear()  # a program begins
            return Shared(int(shape[0]) if len(shape) == 3 else None)

        load, store, sum = (staticmethod(lambda *a, _name=name, **b: getattr(tl, _name)(*a, **b)) for name in ("load", "store", "sum"))
        where, maximum, minimum = (
            staticmethod(lambda *a, _name=name, **b: getattr(tl, _name)(*a, **b)) for name in ("where", "maximum", "minimum")
        )
        exp2, program_id, zeros_like = (
            staticmethod(lambda *a, _name=name, **b: getattr(tl, _name)(*a, **b)) for name in ("exp2", "program_id", "zeros_like")
        )

    class async_copy:
        @staticmethod
        def async_copy_global_to_shared(target: Shared, at: Any, mask: Any) -> None:
            _overwritten(target)
            target.held = None
            _copies[-1].append((target, tl.load(at, mask=mask, other=0)))

        @staticmethod
        def commit_group() -> None:
            _copies.append([])

        @staticmethod
        def wait_group(outstanding: int) -> None:
            assert not _copies[-1]
            while len(_copies) - 1 > int(outstanding):
                for target, value in _copies.pop(0):
                    target.held = value
                    _unfenced.append(target)

    def fence_async_shared() -> None:
        _unfenced.clear()

    def barrier() -> None:
        """Here a program's threads are one."""

    def warpgroup_mma(a: Any, b: Any, acc: Any, use_acc: bool = True, is_async: bool = False) -> _Product:
        reads, values = [], []
        for x in (a, b):
            held: Any = x
            if isinstance(x, Shared | View):
                view = x if isinstance(x, View) else View(x)
                assert view.tile not in _unfenced, "a product reads shared memory before a fence"
                reads.append(view.tile)
                held = view.load()
            values.append(held.to(tl.float32))
        made = tl.dot(*values, input_precision="ieee")
        if use_acc:
            made += acc.value if isinstance(acc, _Product) else acc
        _products.append(_Product(made, reads))
        return _products[-1]

    def warpgroup_mma_wait(outstanding: int, deps: list[_Product]) -> Any:
        del _products[: max(0, len(_products) - int(outstanding))]
        assert not any(each in _products for each in deps), "a product is used before it was waited for"
        return deps[0].value if len(deps) == 1 else tuple(each.value for each in deps)
else:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.ampere import async_copy
    from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

    jit = gluon.jit
    barrier = getattr(gl, "barrier" if hasattr(gl, "barrier") else "thread_barrier")  # the latter up to Triton 3.6

__all__ = ["async_copy", "barrier", "fence_async_shared", "gl", "jit", "warpgroup_mma", "warpgroup_mma_wait"]
