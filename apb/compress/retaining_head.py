"""Locret's retaining heads: a small trained network per layer scores each token (arXiv 2410.01805; APB's choice)."""

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from apb.compress.backend import CompressBackend, choose_backend
from apb.compress.compressor import Candidates, Compressor, Need, Projections
from apb.costs import ModelShape

__all__ = [
    "PACKAGED",
    "RetainingHead",
    "find_heads",
    "head_scores",
    "load_retaining_head",
    "save_retaining_head",
    "warn_of_another_model",
]

PACKAGED = ("smollm2-135m",)
"""Heads that come with this package, by name; each has a model card in `apb/data/heads`."""

_KEY = "model.layers.{layer}.self_attn.{part}.weight"


@dataclass(frozen=True, kw_only=True, repr=False)
class RetainingHead(Compressor):
    """scores(t) = fc2(silu(fc1(concat(q_t, k_t, v_t)))) on the projections before RoPE; one score per KV head.

    Attributes:
        fc1: per layer, `[width, (q_heads + 2 · kv_heads) · dim]` (the paper's width is 1024).
        fc2: per layer, `[kv_heads, width]`.
        trained_for: what their file says about it: the name of the "base_model", and of the "adapter" ("none").
    """

    fc1: tuple[Tensor, ...]
    fc2: tuple[Tensor, ...]
    trained_for: Mapping[str, str] = field(default_factory=dict, compare=False)  # a dict has no hash

    def __repr__(self) -> str:
        """Tell checkpoints apart by the sums of their weights, so that hosts can agree on one."""
        sums = [float(weight.double().sum()) for weight in (*self.fc1, *self.fc2)]
        mark = sha256(repr(sums).encode()).hexdigest()[:12]
        return f"RetainingHead(pool={self.pool}, layers={len(self.fc1)}, weights={mark})"

    @property
    def needs(self) -> frozenset[Need]:
        """The projections before RoPE."""
        return frozenset({"projections"})

    def check_fits(self, *, layers: int, heads: int, kv_heads: int, head_dim: int) -> None:
        """Check that the heads were made for a model of this shape.

        Raises:
            ValueError: naming what the checkpoint holds and what the model has.
        """
        wide = (heads + 2 * kv_heads) * head_dim
        held = (len(self.fc1), self.fc1[0].shape[1], self.fc2[0].shape[0])
        if held != (layers, wide, kv_heads):
            raise ValueError(
                f"retaining heads: the checkpoint is for a model of {held[0]} layers, (q + 2 kv heads) · dim = "
                f"{held[1]} and {held[2]} KV heads; this model has {layers}, {wide} and {kv_heads}. Load the "
                f"checkpoint trained for this model, or use a compressor that needs none (query-aware)"
            )

    def prepare(self, shape: ModelShape, device: torch.device, dtype: torch.dtype) -> "RetainingHead":
        """Check that the heads fit the model, and return them on its device and in its dtype."""
        self.check_fits(layers=shape.layers, heads=shape.heads, kv_heads=shape.kv_heads, head_dim=shape.head_dim)
        fc1, fc2 = (tuple(w.to(device, dtype) for w in part) for part in (self.fc1, self.fc2))
        return replace(self, fc1=fc1, fc2=fc2)

    def score(self, candidates: Candidates) -> Float[Tensor, "batch kv_heads tokens"]:
        """Return the layer's scores, as `head_scores` computes them."""
        p, layer = candidates.projections, candidates.layer
        assert p is not None  # `compress` has checked `needs`
        if layer >= len(self.fc1):
            raise ValueError(f"layer: the checkpoint holds {len(self.fc1)} layers, got layer {layer}")
        return head_scores(p, self.fc1[layer], self.fc2[layer])


def head_scores(
    projections: Projections,
    fc1: Float[Tensor, "width inputs"],
    fc2: Float[Tensor, "kv_heads width"],
    *,
    backend: CompressBackend = "auto",
) -> Float[Tensor, "batch kv_heads tokens"]:
    """Return fc2(silu(fc1(concat(q, k, v)))) of each token, computed in the weights' dtype.

    Args:
        projections: before RoPE, of any stride.
        fc1, fc2: one layer's weights.
        backend: "torch" runs anywhere and returns the weights' dtype; "triton" makes no concatenation, keeps the
            hidden units in registers and returns float32; "auto" takes it on CUDA.

    Raises:
        ValueError: a backend that cannot run here.
    """
    q, k, v = (part.to(fc1.dtype) for part in (projections.q, projections.k, projections.v))
    if q.shape[2] and choose_backend(backend, q, k, v, fc1, fc2) == "triton":
        from apb.kernels.retaining_head import retaining_head_scores

        return retaining_head_scores(q, k, v, fc1.contiguous(), fc2.contiguous())
    x = torch.cat([rearrange(part, "b h n d -> b n (h d)") for part in (q, k, v)], dim=-1)
    return rearrange(F.linear(F.silu(F.linear(x, fc1)), fc2), "b n h -> b h n")


def find_heads(path: str | Path) -> Path:
    """Return the file of retaining heads, from its path or from a name of `PACKAGED`.

    Raises:
        FileNotFoundError: no such file.
    """
    path = Path(path).expanduser()
    if not path.is_file() and str(path) in PACKAGED:
        path = Path(__file__).parents[1] / "data" / "heads" / path / "heads.safetensors"
    if not path.is_file():
        raise FileNotFoundError(
            f"retaining heads: no file at {path}; expected one, or the name of packaged heads: {', '.join(PACKAGED)}"
        )
    return path


def load_retaining_head(path: str | Path) -> RetainingHead:
    """Load retaining heads from a flat state dict in the released APB-Locret checkpoints' format.

    Args:
        path: a `.safetensors` file, or `.bin`/`.pt` (read with `weights_only=True`); keys
            `model.layers.{i}.self_attn.fc1.weight` and `…fc2.weight`, with or without a `module.` prefix. Or a name
            of `PACKAGED`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, missing layers, or widths that do not fit each other.
    """
    path = find_heads(path)
    if path.suffix not in (".safetensors", ".bin", ".pt"):
        raise ValueError(f"retaining heads: expected a .safetensors, .bin or .pt file, got {path.name}")
    weights = {key.removeprefix("module."): value for key, value in _read(path).items()}
    layers = sum(key.endswith("self_attn.fc1.weight") for key in weights)
    wanted = [_KEY.format(layer=i, part=part) for i in range(layers) for part in ("fc1", "fc2")]
    missing = [key for key in wanted if key not in weights]
    if not layers or missing:
        found = ", ".join(list(weights)[:3]) or "nothing"
        raise ValueError(
            f"retaining heads: {path.name} lacks {missing[0] if missing else _KEY.format(layer=0, part='fc1')}; it "
            f"holds {found}, … . Expected a flat state dict of fc1 and fc2 weights for every layer"
        )
    fc1, fc2 = (tuple(weights[key] for key in wanted[i::2]) for i in (0, 1))
    for layer, (one, two) in enumerate(zip(fc1, fc2, strict=True)):
        fits = one.ndim == two.ndim == 2 and one.shape[0] == two.shape[1]
        if not fits or one.shape != fc1[0].shape or two.shape != fc2[0].shape:
            raise ValueError(
                f"retaining heads: layer {layer} has fc1 {tuple(one.shape)} and fc2 {tuple(two.shape)}; expected "
                f"[width, inputs] and [kv_heads, width], the same in every layer"
            )
    return RetainingHead(fc1=fc1, fc2=fc2, trained_for=_trained_for(path))


def warn_of_another_model(compressor: object, *, model: str | Path, adapter: str | Path | None = None) -> None:
    """Warn on rank 0 if a compressor's retaining heads were trained for another model or adapter than they run with.

    Names are compared by their last part: a directory, or a hub id. Heads whose file names no model are taken as they
    are.

    Args:
        compressor: of any kind, or None.
        model, adapter: what the compressor is to run with, as `load_model` reads them.
    """
    trained = compressor.trained_for if isinstance(compressor, RetainingHead) else {}
    here = {"base_model": str(model), "adapter": str(adapter or "none")}
    others = [name for name, given in here.items() if name in trained and not _names(trained[name]) & _names(given)]
    if others and os.environ.get("RANK", "0") == "0":
        was, runs = (_adapted(what["base_model"], what.get("adapter", "none")) for what in (trained, here))
        warnings.warn(
            f"retaining heads: they were trained for {was}, and are to run with {runs}, where they may choose badly. "
            f"Train heads for what runs here (apb train-heads), or use a compressor that needs none (query-aware)",
            stacklevel=2,
        )


def save_retaining_head(heads: RetainingHead, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write retaining heads in the released checkpoints' format, which `load_retaining_head` reads.

    Args:
        heads: of any dtype; they are stored in it.
        path: a `.safetensors` file.
        metadata: stored in the file's header, such as the model that the heads were trained for.

    Raises:
        ValueError: a file of another kind.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"retaining heads: they are written as .safetensors, got {path.name}")
    from safetensors.torch import save

    weights = {
        _KEY.format(layer=layer, part=part): weight.detach().cpu().contiguous()
        for part, layers in (("fc1", heads.fc1), ("fc2", heads.fc2))
        for layer, weight in enumerate(layers)
    }
    path.write_bytes(save(weights, metadata={"format": "pt", **(metadata or {})}))


def _trained_for(path: Path) -> dict[str, str]:
    """Return what a file's header says of the model; nothing if it names none."""
    if path.suffix != ".safetensors":
        return {}
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        header = file.metadata() or {}
    return {name: header[name] for name in ("base_model", "adapter") if name in header and "base_model" in header}


def _adapted(model: str, adapter: str) -> str:
    return model if adapter == "none" else f"{model} with the adapter {adapter}"


def _names(place: str) -> set[str]:
    """Return what a model or an adapter may be called: the last part of a path or hub id, and of what it links to."""
    path = Path(place).expanduser()
    return {path.name, path.resolve().name}


def _read(path: Path) -> Mapping[str, Tensor]:
    """Read a flat state dict, never running code from the file."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise
    except Exception as error:  # each reader has error types of its own for a damaged file
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"retaining heads: cannot read {path} as a checkpoint of tensors ({reason})") from error
    if not isinstance(found, Mapping) or not all(isinstance(key, str) for key in found):
        raise ValueError(f"retaining heads: {path.name} holds a {type(found).__name__}; expected a flat state dict")
    return found
