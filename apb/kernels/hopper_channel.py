"""How the warps of a Hopper kernel hand each other data and turns: rings of buffers, and named barriers."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.core import _aggregate as aggregate

__all__ = ["Channel", "copy_box", "make_channel", "pass_turn", "take_turn"]

_FIRST_TURN = 9  # the number of a named barrier; those that the compiler takes are lower


@aggregate
class Channel:
    """A ring of buffers in shared memory, filled by one warp and read by warpgroups; use n has buffer n mod slots.

    `full` completes when the bytes have come, `empty` when every reader has released the buffer.
    """

    buffers: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    slots: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, buffers, full, empty, slots):
        self.buffers = buffers
        self.full = full
        self.empty = empty
        self.slots = gl.constexpr(slots)

    @gluon.jit
    def await_free(self, n):
        """Wait until use n may be filled: its buffer's earlier use has been released."""
        mbarrier.wait(self.empty.index(n % self.slots), n // self.slots & 1 ^ 1)

    @gluon.jit
    def await_full(self, n):
        """Wait until use n has been filled, and return its buffer."""
        mbarrier.wait(self.full.index(n % self.slots), n // self.slots & 1)
        return self.buffers.index(n % self.slots)

    @gluon.jit
    def release(self, n):
        """Say that this warpgroup has read use n."""
        mbarrier.arrive(self.empty.index(n % self.slots), count=1)

    @gluon.jit
    def fetch(self, n, source, where):
        """Start the copy of the box at `where` of the tensor map `source` into use n, once that is free."""
        self.await_free(n)
        copy_box(source, where, self.full.index(n % self.slots), self.buffers.index(n % self.slots))

    @gluon.jit
    def send(self, n, number):
        """Put one integer into use n, once that is free; by one warp."""
        self.await_free(n)
        self.buffers.index(n % self.slots).store(gl.full([1], number, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
        mbarrier.arrive(self.full.index(n % self.slots), count=1)

    @gluon.jit
    def receive(self, n):
        """Read the integer of use n, and release it; by a warpgroup."""
        number = gl.max(self.await_full(n).load(gl.BlockedLayout([1], [32], [4], [0])), 0)
        self.release(n)
        # Every lane holds the same number; read it from lane 0, so that the assembler knows it too.
        return gl.inline_asm_elementwise("shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;", "=r,r", [number],
                                         dtype=gl.int32, is_pure=False, pack=1)  # fmt: skip


@gluon.jit
def copy_box(source, where, full, buffer):
    """Start the copy of the box at `where` of the tensor map `source` into a buffer; it arrives at `full`."""
    mbarrier.expect(full, source.block_type.nbytes)
    tma.async_copy_global_to_shared(source, where, full, buffer)


@gluon.jit
def make_channel(buffers, SLOTS: gl.constexpr, READERS: gl.constexpr):
    """Make a channel of SLOTS buffers, each to be released by READERS warpgroups; a fence must follow."""
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=READERS)
    return Channel(buffers, full, empty, SLOTS)


@gluon.constexpr_function
def _barrier(instruction, consumer):
    return f"bar.{instruction} {_FIRST_TURN + consumer}, 256; mov.u32 $0, 0;"


@gluon.jit
def take_turn(CONSUMER: gl.constexpr):
    """Wait until the warpgroup before CONSUMER has passed it the turn."""
    asm: gl.constexpr = _barrier("sync", CONSUMER)
    gl.inline_asm_elementwise(asm, "=r,r", [gl.to_tensor(0)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def pass_turn(CONSUMER: gl.constexpr):
    """Give the turn to warpgroup CONSUMER, without waiting."""
    asm: gl.constexpr = _barrier("arrive", CONSUMER)
    gl.inline_asm_elementwise(asm, "=r,r", [gl.to_tensor(0)], dtype=gl.int32, is_pure=False, pack=1)
