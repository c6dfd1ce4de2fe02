"""The oracle: every operation in float64, written to be read.

Nothing here is fast and nothing here is shared with the code it judges. Each function is one formula of the paper
on plain tensors; the kernels, the compressors and the communicator are tested against these.
"""

import math

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["apb_mask", "ape_mask", "ape_mix", "attention", "causal_mask", "kept_indices", "merge", "star_mask"]


def apb_mask(rows: int, columns: int, anchor_tokens: int, passing_tokens: int) -> Bool[Tensor, "rows columns"]:
    """Say which of the keys [A, P, B] each query row of [A, B] may see.

    Anchor row i sees A[0..i]; block row j sees all of A, all of P and B[0..j]. With fewer rows than |A| + |B|, they
    are the *last* ones, as in a bottom-right aligned causal mask (APB section 3.5; plain causal when |A| = |P| = 0).
    """
    block_tokens = columns - anchor_tokens - passing_tokens
    row = torch.arange(rows) + (anchor_tokens + block_tokens - rows)
    column = torch.arange(columns)
    limit = torch.where(row < anchor_tokens, row, row + passing_tokens)
    return column[None, :] <= limit[:, None]


def causal_mask(tokens: int) -> Bool[Tensor, "tokens tokens"]:
    """Say which document tokens see which under exact attention: all up to themselves."""
    token = torch.arange(tokens)
    return token[None, :] <= token[:, None]


def star_mask(tokens: int, hosts: int, anchor: int) -> Bool[Tensor, "tokens tokens"]:
    """Say which document tokens see which under Star Attention: their own block and the first l_a tokens, causally.

    Args:
        tokens: n, cut into blocks of ceil(n / hosts).
        hosts: H, one block each.
        anchor: l_a, at most a block.
    """
    token = torch.arange(tokens)
    block = token // math.ceil(tokens / hosts)
    own = block[None, :] == block[:, None]
    return causal_mask(tokens) & (own | (token < anchor)[None, :])


def ape_mask(tokens: int, hosts: int, prefix: int) -> Bool[Tensor, "tokens tokens"]:
    """Say which document tokens see which under APE: the shared prefix and their own chunk, causally.

    Args:
        tokens: n, the prefix and behind it chunks of ceil((n − prefix) / hosts).
        hosts: H, one chunk each.
        prefix: p, tokens that belong to no chunk.
    """
    token = torch.arange(tokens)
    chunk = (token - prefix) // max(1, math.ceil((tokens - prefix) / hosts))
    own = chunk[None, :] == chunk[:, None]
    return causal_mask(tokens) & (own | (token < prefix)[None, :])


def ape_mix(
    q: Float[Tensor, "batch q_heads rows dim"],
    contexts: tuple[Float[Tensor, "batch kv_heads context dim"], Float[Tensor, "batch kv_heads context dim"]],
    other: tuple[Float[Tensor, "batch kv_heads other dim"], Float[Tensor, "batch kv_heads other dim"]],
    *,
    temperature: float,
    scale: float,
    softmax_scale: float | None = None,
) -> Float[Tensor, "batch q_heads rows dim"]:
    """Let new rows attend to all of APE's chunks at once, at temperature T, and to the other keys, in float64.

    With s = softmax_scale · q kᵀ: softmax([S · T · log Σ exp(s_c / T), log Σ exp(s_o)]) · [o_c, o_o], where o_c is
    softmax(s_c / T) · v_c and o_o is softmax(s_o) · v_o.

    Args:
        q: the new rows.
        contexts: keys and values of all chunks, whichever hosts hold them; every row sees all of them.
        other: keys and values of the prefix and of what follows the document, the rows' own the last ones; causal.
        temperature: T > 0.
        scale: S > 0.
        softmax_scale: None is 1/√dim.
    """
    plain = 1 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    rows, columns = q.shape[2], other[0].shape[2]
    everything = torch.ones(rows, contexts[0].shape[2], dtype=torch.bool)
    up_to_itself = torch.arange(columns)[None, :] <= torch.arange(columns - rows, columns)[:, None]
    context_out, context_lse = attention(q, *contexts, everything, plain / temperature)
    other_out, other_lse = attention(q, *other, up_to_itself, plain)
    power = scale * temperature
    return merge(torch.stack((context_out, other_out)), torch.stack((power * context_lse, other_lse)))[0]


def attention(
    q: Float[Tensor, "batch q_heads rows dim"],
    k: Float[Tensor, "batch kv_heads columns dim"],
    v: Float[Tensor, "batch kv_heads columns dim"],
    mask: Bool[Tensor, "rows columns"],
    scale: float | None = None,
) -> tuple[Float[Tensor, "batch q_heads rows dim"], Float[Tensor, "batch q_heads rows"]]:
    """Compute softmax(scale · q kᵀ, where mask) v and its log-sum-exp, in float64.

    A row that sees nothing gives output 0 and LSE −inf. Query head h reads KV head h // (q_heads / kv_heads).
    """
    group = q.shape[1] // k.shape[1]
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    k = repeat(k.double(), "b h m d -> b (h g) m d", g=group)
    v = repeat(v.double(), "b h m d -> b (h g) m d", g=group)
    scores = scale * (q.double() @ rearrange(k, "b h m d -> b h d m"))
    scores = scores.masked_fill(~mask.to(scores.device), -math.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse[..., None]).masked_fill(torch.isneginf(lse)[..., None], 0.0)
    return weights @ v, lse


def merge(
    outs: Float[Tensor, "parts *rows dim"], lses: Float[Tensor, "parts *rows"]
) -> tuple[Float[Tensor, "*rows dim"], Float[Tensor, "*rows"]]:
    """Join attention over disjoint sets of keys into attention over their union, in float64.

    l = log Σ exp(lᵢ), o = Σ oᵢ · exp(lᵢ − l); where every lᵢ is −inf the result is (0, −inf).
    """
    lse = torch.logsumexp(lses.double(), dim=0)
    weights = torch.exp(lses.double() - lse).masked_fill(torch.isneginf(lse), 0.0)
    return (outs.double() * weights[..., None]).sum(dim=0), lse


def kept_indices(scores: Float[Tensor, "*heads tokens"], keep: int) -> Int[Tensor, "*heads kept"]:
    """Return the positions of the `keep` highest scores, ascending; equal scores go to the lowest position."""
    flat = scores.double().reshape(-1, scores.shape[-1]).tolist()
    kept = [sorted(sorted(range(len(row)), key=lambda i: (-row[i], i))[:keep]) for row in flat]
    return torch.tensor(kept, dtype=torch.int64).reshape(*scores.shape[:-1], -1)
