"""Keys and values in pairs: a ring of buffers that warps give back through named barriers, each warp by itself."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.core import _aggregate as aggregate

from .hopper_channel import copy_box

__all__ = ["Pairs", "make_pairs"]

_FIRST_SLOT = gl.constexpr(11)  # of 16 named barriers, behind the turns' two: at most five slots


@aggregate
class Pairs:
    """A ring that one warp fills and two warpgroups use; pair n is keys n and values n − 1, in slot n mod slots.

    Keys and values are those of one block of tokens if their numbers are the same; they are counted on from tile to
    tile. `full` completes when both of a pair have come, or been left out. Who has used a pair arrives at its slot's
    named barrier, where an mbarrier would have the compiler gather the warpgroup before one thread arrives for it. Each
    arrives there once before the producer comes: only then is the slot filled again.
    """

    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    slots: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, k, v, full, slots):
        self.k, self.v, self.full, self.slots = k, v, full, gl.constexpr(slots)

    @gluon.jit
    def await_full(self, n):
        """Wait until pair n has come."""
        mbarrier.wait(self.full.index(n % self.slots), n // self.slots & 1)

    @gluon.jit
    def release(self, n):
        """Say that this warpgroup has used pair n."""
        _arrive(n % self.slots, self.slots)

    @gluon.jit
    def release_if(self, n, condition):
        """Say that this warpgroup has used pair n, if so."""
        _arrive(gl.where(condition, n % self.slots, -1), self.slots)

    @gluon.jit
    def await_free(self, n):
        """Wait until pair n may be filled: the one in its slot has been released; by the producer, once for each n."""
        if n >= self.slots:
            self._await_released(n)

    @gluon.jit
    def fetch_keys(self, n, source, where):
        """Start the copy of the box at `where` of the tensor map `source` into pair n, which is free."""
        copy_box(source, where, self.full.index(n % self.slots), self.k.index(n % self.slots))

    @gluon.jit
    def fetch_values(self, n, source, where):
        """Start the copy of the box at `where` of the tensor map `source` into pair n, which is free."""
        copy_box(source, where, self.full.index(n % self.slots), self.v.index(n % self.slots))

    @gluon.jit
    def leave_out(self, n):
        """Say that pair n, which is free, has no keys, or no values."""
        mbarrier.arrive(self.full.index(n % self.slots), count=1)

    @gluon.jit
    def drain(self, last):
        """Leave no arrival behind: wait until all pairs before `last`, which is the last one, have been released."""
        for n in range(gl.maximum(last - self.slots + 1, 0), last):
            self._await_released(n)

    @gluon.jit
    def _await_released(self, n):
        gl.inline_asm_elementwise("bar.sync $1, 288; mov.u32 $0, 0;", "=r,r", [_FIRST_SLOT + n % self.slots],
                                  dtype=gl.int32, is_pure=False, pack=1)  # fmt: skip


@gluon.jit
def make_pairs(k, v, SLOTS: gl.constexpr):
    """Make a ring of the buffers of keys and values; a fence must follow."""
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), count=2)
    return Pairs(k, v, full, SLOTS)


@gluon.constexpr_function
def _arrivals(first, slots):
    each = (f"setp.eq.s32 p, $1, {i}; @p bar.arrive {first + i}, 288;" for i in range(slots))
    return f"{{ .reg .pred p; {' '.join(each)} mov.u32 $0, 0; }}"


@gluon.jit
def _arrive(slot, SLOTS: gl.constexpr):
    """Arrive at a slot's barrier; with its number in a register, the assembler would put that off to the step's end."""
    asm: gl.constexpr = _arrivals(_FIRST_SLOT, SLOTS)
    gl.inline_asm_elementwise(asm, "=r,r", [slot], dtype=gl.int32, is_pure=False, pack=1)
