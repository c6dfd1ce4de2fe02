"""The parts of a GPU that our Hopper kernel touches, on a CPU: barriers, shared memory, copies, products, warp groups.

They are strict about what a GPU would punish: a barrier has phases, and a wait for the wrong parity passes too early or
never; a copy lands some time after it was started; a product reads its operands when it is waited for, so that a buffer
given back too soon gives a wrong result; whoever waits for half a minute has deadlocked.
"""

import random
import re
import threading
import time
from types import SimpleNamespace

import torch

PATIENCE_S = 30.0


class Deadlock(AssertionError):
    """Somebody waited for longer than a kernel takes."""


class Barrier:
    """An mbarrier: a phase ends when all arrivals and all bytes of it have come."""

    def __init__(self, count=0):
        self.changed = threading.Condition()
        self.bytes = self.phase = 0
        self.init(count)

    def init(self, count):
        self.count = self.pending = count

    def arrive(self, count=1, expected=0, came=0):
        with self.changed:
            self.bytes += expected - came
            self.pending -= count
            assert self.pending >= 0, "more arrivals than the barrier counts"
            if self.pending == 0 and self.bytes == 0:
                self.phase, self.pending = self.phase + 1, self.count
                self.changed.notify_all()

    def wait(self, parity):
        with self.changed:
            if not self.changed.wait_for(lambda: self.phase & 1 != int(parity), PATIENCE_S):
                raise Deadlock(f"waiting for phase parity {parity}")


class Shared:
    """Shared memory: poisoned, and an array along its first axis."""

    def __init__(self, values):
        self.values = values

    dtype = property(lambda self: self.values.dtype)

    def index(self, i):
        return Shared(self.values[int(i)])

    def load(self, layout):
        return self.values.clone()

    def store(self, values):
        self.values.copy_(values)

    def reshape(self, shape):
        return Shared(self.values.view(shape))

    def permute(self, order):
        return Shared(self.values.permute(order))

    def _reinterpret(self, dtype, shape, layout):
        return Shared(self.values.view(-1)[: torch.Size(shape).numel()].view(shape))

    layout = None


class Barriers(list):
    """What an allocation of mbarriers is."""

    def index(self, i):
        return self[int(i)]


class Box:
    """A tensor map: a tensor and the box that is copied; what lies outside reads as zero."""

    def __init__(self, tensor, box):
        self.tensor, self.box, self.layout, self.dtype = tensor, box, None, tensor.dtype
        self.block_type = SimpleNamespace(shape=box, nbytes=torch.Size(box).numel() * tensor.element_size())

    def copy(self, where, target):
        target.zero_()
        ends = [min(int(at) + size, full) for at, size, full in zip(where, self.box, self.tensor.shape, strict=True)]
        inside = tuple(slice(int(at), max(int(at), end)) for at, end in zip(where, ends, strict=True))
        piece = self.tensor[inside]
        target[tuple(slice(0, n) for n in piece.shape)].copy_(piece)

    def write(self, where, source):
        """Copy a box of one head out, but for its rows beyond the last, and poison what it came from."""
        batch, head, row, _ = (int(at) for at in where)
        target = self.tensor[batch, head, row : row + self.box[2]]
        target.copy_(source.values[0, 0, : len(target)])
        source.values.fill_(torch.nan)


class Pointer:
    """A pointer, or a tensor of pointers, into a tensor's storage."""

    def __init__(self, base, offset=0):
        self.base, self.offset = base, offset
        self.dtype = SimpleNamespace(element_ty=base.dtype)

    def __add__(self, offset):
        return Pointer(self.base, self.offset + offset)


class Machine:
    """One launch: the named barriers of each program, and who is to be waited for."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.lock = threading.Lock()
        self.named = threading.local()
        self.errors = []

    def run(self, roles):
        """Run calls side by side, and raise the first error."""
        threads = [threading.Thread(target=self._guarded, args=role, daemon=True) for role in roles]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(4 * PATIENCE_S)
            assert not thread.is_alive(), "a warp group never ended"
        if self.errors:
            raise self.errors[0]

    def _guarded(self, function, args, place):
        self.named.barriers, self.named.warps = place or ({}, 0)
        try:
            function(*args)
        except BaseException as error:
            self.errors.append(error)

    def specialise(self, roles, warps, registers):
        named = {}  # by number and count of threads
        self.run([(*role, (named, n)) for role, n in zip(roles, (4, *warps), strict=True)])
        assert all(barrier.pending == barrier.count for barrier in named.values()), "arrivals that nobody came for"

    def copy(self, source, where, barrier, target):
        def land():
            time.sleep(self.random.random() * 1e-3)
            source.copy(where, target.values)
            barrier.arrive(0, came=source.block_type.nbytes)

        threading.Thread(target=land, daemon=True).start()

    def send(self, target, where, source):
        """Copy a box out some time later; `sent` waits for this warp group's last one."""
        self.named.leaving = threading.Timer(self.random.random() * 5e-3, target.write, (where, source))
        self.named.leaving.start()

    def sent(self, left):
        self.named.leaving.join()

    def assembly(self, text, constraints, args, dtype, **_):
        if text.startswith("cvt.rn"):
            return args[0].to(dtype)
        if "vote.sync" in text:  # of all warps of the group at once: the others gain nothing by it, nor lose
            self.named.vote = not bool((args[0] <= 2**12).all())
        if text.startswith("selp"):
            return int(self.named.vote)
        if "apb_vote" in text:
            return args[0]
        bars = re.findall(r"(?:setp\.eq\.s32 p, \$1, (\d+); @p )?bar\.(sync|arrive) (\$1|\d+), (\d+);", text)
        assert bars or text.startswith("shfl.sync"), text
        for only, what, number, threads in bars:
            if not only or int(args[0]) == int(only):
                name = int(args[0] if number == "$1" else number), int(threads)
                barrier = self.named.barriers.setdefault(name, Barrier(int(threads)))
                phase = barrier.phase  # it cannot end without this warp group
                barrier.arrive(32 * self.named.warps)
                if what == "sync":
                    barrier.wait(phase & 1)
        return args[0]

    def add(self, pointer, value):
        with self.lock:
            old = pointer.base[0].clone()
            pointer.base[0] += value
            return old


def allocate(dtype, shape, layout):
    if layout == "mbarrier":
        return Barriers(Barrier() for _ in range(shape[0]))
    poison = torch.nan if dtype.is_floating_point else -(10**6)
    return Shared(torch.full([int(n) for n in shape], poison, dtype=dtype))


class Product:
    """A product that has been issued; computed, in the order of issue, when somebody waits for it."""

    issued = threading.local()

    def __init__(self, a, b, acc, *, use_acc=True, is_async=False):
        self.operands, self.acc, self.result = (a, b), acc if use_acc else None, None
        vars(self.issued).setdefault("pending", []).append(self)

    def compute(self):
        left, right = (x.values if isinstance(x, Shared) else x for x in self.operands)
        self.result = left.float() @ right.float()
        if self.acc is not None:
            self.result = self.acc + self.result

    @classmethod
    def wait(cls, newest, deps):
        """Complete all products of this warp group but the `newest`, and return the one in `deps`."""
        pending = cls.issued.pending
        while len(pending) > newest:
            pending.pop(0).compute()
        assert deps[0].result is not None, "read while the tensor cores are still at it"
        return deps[0].result


def arrive(barrier, count, pred=True):
    if pred:
        barrier.arrive(count)


def store(pointer, values, mask):
    offset, values, mask = torch.broadcast_tensors(torch.as_tensor(pointer.offset), values, mask)
    pointer.base.view(-1)[offset[mask]] = values[mask]
