"""Count the bytes of living tensors, and note the shapes of all that are made, while a body runs on the CPU."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """As a context manager; what lived before it, and storages that later operations only look at, do not count.

    Attributes:
        peak: the most bytes of tensors made inside that lived at once.
        shapes: of every floating-point tensor made inside.
    """

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.shapes = 0, 0, set()
        self._known = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if not isinstance(x, torch.Tensor):
                continue
            if x.is_floating_point():
                self.shapes.add(tuple(x.shape))
            storage = x.untyped_storage()
            if storage._cdata in before or storage._cdata in self._known:
                continue
            self._known[storage._cdata] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, storage._cdata)
        return out

    def _forget(self, key):
        self.live -= self._known.pop(key)
