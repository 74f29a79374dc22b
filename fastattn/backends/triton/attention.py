"""Launches the attention kernels of fastattn.kernels.attention. Arguments and results: fastattn.backends.protocol."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.backends.triton.launch import architecture, launch
from fastattn.backends.triton.plan import Mask, Plan, mask_arguments, plan_keys, plan_queries
from fastattn.biases.lowered import LoweredBias
from fastattn.masks.lowered import LoweredMask
from fastattn.packed import Packed
from fastattn.problems import AttentionProblem
from fastattn.reference.philox import dropout_scale, dropout_threshold

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_DIM = 256
_MAX_LENGTH = 2**30  # positions and band limits are added in int32
_MAX_PROGRAMS = 2**31
_BIAS_PROGRAMS = 512  # what keeps a GPU busy; with fewer tiles of the bias its gradient is summed up in parts
_SECTION_BYTES = 32 * 2**20  # keys and values that programs running at the same time may share an L2 cache for


def attention_reasons(problem: AttentionProblem) -> list[str]:
    """Why the kernels refuse an attention problem, whatever its device."""
    reasons = []
    for name, dtype in (("q", problem.dtype), ("bias", problem.bias)):
        if dtype is not None and dtype not in _DTYPES:
            shown = str(dtype).removeprefix("torch.")
            reasons.append(f"the Triton attention takes float32, bfloat16 and float16, and {name} is {shown}")
    for name, dim in (("D", problem.dim_qk), ("Dv", problem.dim_v)):
        if not 1 <= dim <= _MAX_DIM:
            reasons.append(f"the Triton attention takes head dims of 1 to {_MAX_DIM}, and {name} is {dim}")
    for name, length in (("Sq", problem.len_q), ("Skv", problem.len_k)):
        if length >= _MAX_LENGTH:
            reasons.append(f"the Triton attention takes fewer than 2**30 positions, and {name} is {length}")
    if problem.table or problem.slopes:
        reasons.append("the Triton attention takes no bias by distance")
    if problem.packed:
        reasons.append("the Triton attention takes no packed batches")
    tiles = -(-max(problem.len_q, problem.len_k) // 16)
    if problem.batch * problem.heads_q * tiles >= _MAX_PROGRAMS:
        reasons.append(f"the Triton attention has too many tiles: {problem.batch} x {problem.heads_q} x {tiles}")
    return reasons


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: LoweredMask,
    bias: LoweredBias,
    packed: Packed | None,
    sinks: Tensor | None,
    dropout_seed: Tensor | None,
    scale: float,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """See the protocol."""
    from fastattn.kernels.attention.forward import attention_forward_kernel

    batch, heads, len_q, _ = q.shape
    out = q.new_empty(batch, len_q, heads, v.shape[3]).transpose(1, 2)
    lse = q.new_empty(batch, heads, len_q, dtype=torch.float32)
    call = Call(q, k, v, mask, bias.dense, sinks, dropout_seed, scale, softcap, dropout_p)
    if 0 in (batch, heads, len_q):
        return out, lse
    tile = call.tile("forward")
    plan = plan_keys(call.mask, len_q, k.shape[2], tile.block_q, tile.block_k)
    arguments = call.arguments | call.of_tile(tile, plan, -(-len_q // tile.block_q))
    arguments |= {"out": out, **_strides("out", out), "lse": lse}
    launch(
        attention_forward_kernel,
        (batch * heads * -(-len_q // tile.block_q),),
        arguments,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out, lse


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: LoweredMask,
    bias: LoweredBias,
    packed: Packed | None,
    sinks: Tensor | None,
    dropout_seed: Tensor | None,
    scale: float,
    softcap: float,
    dropout_p: float,
    bias_requires_grad: bool,
    table_requires_grad: bool,
    slopes_requires_grad: bool,
    sinks_requires_grad: bool,
    deterministic: bool,  # every sum of these kernels has a fixed order
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See the protocol."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    dbias, dsinks = lse.new_empty(0), lse.new_empty(0)
    if lse.numel() == 0:
        dbias = lse.new_zeros(bias.dense.shape) if bias.dense is not None and bias_requires_grad else dbias
        dsinks = lse.new_zeros(q.shape[1]) if sinks_requires_grad else dsinks
        return dq, dk.zero_(), dv.zero_(), dbias, lse.new_empty(0), lse.new_empty(0), dsinks
    call = Call(q, k, v, mask, bias.dense, sinks, dropout_seed, scale, softcap, dropout_p)
    grad_out, out = _addressable(grad_out), _addressable(out)
    call.arguments |= {"out": out, **_strides("out", out), "lse": lse, "grad_lse": grad_lse}
    call.arguments |= {"grad_out": grad_out, **_strides("grad_out", grad_out)}
    call.arguments |= {"norm_out": torch.empty_like(lse), "centre_out": torch.empty_like(lse)}
    sink_terms = torch.empty_like(lse) if sinks_requires_grad else None
    written = {name: _writable(grad) for name, grad in (("grad_q", dq), ("grad_k", dk), ("grad_v", dv))}
    _launch_queries(call, written["grad_q"], sink_terms)
    _launch_keys(call, written["grad_k"], written["grad_v"])
    if bias.dense is not None and bias_requires_grad:
        dbias = _launch_bias(call, bias.dense)
    if sink_terms is not None:
        dsinks = sink_terms.sum(dim=(0, 2))
    for grad, wide in zip((dq, dk, dv), written.values(), strict=True):
        if wide is not grad:
            grad.copy_(wide)
    return dq, dk, dv, dbias, lse.new_empty(0), lse.new_empty(0), dsinks


def _launch_queries(call: Call, grad_q: Tensor, sink_terms: Tensor | None) -> None:
    from fastattn.kernels.attention.backward import attention_queries_kernel

    batch, heads, len_q, _ = call.q.shape
    tile = call.tile("queries")
    tiles = -(-len_q // tile.block_q)
    plan = plan_keys(call.mask, len_q, call.k.shape[2], tile.block_q, tile.block_k)
    arguments = call.arguments | call.of_tile(tile, plan, tiles)
    arguments |= {
        "grad_q": grad_q,
        **_strides("grad_q", grad_q),
        "sink_terms": sink_terms,
        "CHECKED": call.q.dtype != torch.float32,
        "tolerance": torch.finfo(call.q.dtype).eps / 4,
    }
    grid = (batch * heads * tiles,)
    launch(attention_queries_kernel, grid, arguments, num_warps=tile.warps, num_stages=tile.stages)


def _launch_keys(call: Call, grad_k: Tensor, grad_v: Tensor) -> None:
    from fastattn.kernels.attention.backward import attention_keys_kernel

    batch, heads_kv, len_k, _ = call.k.shape
    tile = call.tile("keys")
    tiles = -(-len_k // tile.block_k)
    plan = plan_queries(call.mask, call.q.shape[2], len_k, tile.block_q, tile.block_k)
    arguments = call.arguments | call.of_tile(tile, plan, tiles)
    arguments |= {"grad_k": grad_k, **_strides("grad_k", grad_k), "grad_v": grad_v, **_strides("grad_v", grad_v)}
    grid = (batch * heads_kv * tiles,)
    launch(attention_keys_kernel, grid, arguments, num_warps=tile.warps, num_stages=tile.stages)


def _launch_bias(call: Call, bias: Tensor) -> Tensor:
    """dbias float32 of bias' shape: the sum of what a few programs for each of its tiles found."""
    from fastattn.kernels.attention.backward import attention_bias_kernel

    batch, heads, len_q, _ = call.q.shape
    len_k = call.k.shape[2]
    sums_q, sums_k = bias.shape[2] < len_q, bias.shape[3] < len_k
    tile = call.tile("bias")
    tiles_q = 1 if sums_q else -(-len_q // tile.block_q)
    tiles_k = 1 if sums_k else -(-len_k // tile.block_k)
    programs = bias.shape[0] * bias.shape[1] * tiles_q * tiles_k
    shared = (batch // bias.shape[0], heads // bias.shape[1])
    pairs = shared[0] * shared[1]
    parts = min(pairs, -(-_BIAS_PROGRAMS // max(programs, 1)))
    grad_bias = torch.empty(parts, *bias.shape, dtype=torch.float32, device=bias.device)
    plan = plan_keys(call.mask, len_q, len_k, tile.block_q, tile.block_k)
    arguments = call.arguments | call.of_tile(tile, plan, tiles_q * tiles_k)
    arguments |= {
        "grad_bias": grad_bias,
        "states": plan.states,
        **dict(zip(("bias_batches", "bias_heads", "bias_len_q", "bias_len_k"), bias.shape, strict=True)),
        "bias_tiles_q": tiles_q,
        "bias_tiles_k": tiles_k,
        "pairs": pairs,
        "shared_heads": shared[1],
        "SUMS_Q": sums_q,
        "SUMS_K": sums_k,
    }
    launch(attention_bias_kernel, (programs, parts), arguments, num_warps=tile.warps, num_stages=tile.stages)
    return grad_bias.sum(dim=0)


class Call:
    """What forward and backward kernels get alike."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: LoweredMask,
        bias: Tensor | None,
        sinks: Tensor | None,
        dropout_seed: Tensor | None,
        scale: float,
        softcap: float,
        dropout_p: float,
    ) -> None:
        from fastattn.kernels.tiles import pieces

        q, k, v = (_addressable(t) for t in (q, k, v))
        self.q, self.k, self.v = q, k, v
        batch, heads, len_q, dim = q.shape
        _, heads_kv, len_k, dim_v = v.shape
        self.mask: Mask = mask_arguments(mask, batch, heads, len_q, len_k)
        wide, rest = pieces(dim)
        wide_v, rest_v = pieces(dim_v)
        steps = (0, 0, 0, 0) if bias is None else bias.expand(batch, heads, len_q, len_k).stride()
        self.arguments: dict[str, Any] = {
            "q": q,
            "k": k,
            "v": v,
            **_strides("q", q),
            **_strides("k", k),
            **_strides("v", v),
            **self.mask.arguments,
            "bias": bias,
            **dict(zip(("bias_b", "bias_h", "bias_q", "bias_k"), steps, strict=True)),
            "sinks": None if sinks is None else sinks.float(),
            "seed_pointer": dropout_seed if dropout_p > 0.0 else None,
            "threshold": dropout_threshold(dropout_p),
            "keep_scale": dropout_scale(dropout_p),
            "batches": batch,
            "heads_q": heads,
            "group": heads // max(heads_kv, 1),
            "len_q": len_q,
            "len_k": len_k,
            "scale": scale,
            "softcap": softcap,
            "DIM": dim,
            "WIDE": wide,
            "REST": rest,
            "DIM_V": dim_v,
            "WIDE_V": wide_v,
            "REST_V": rest_v,
            "FOLDED": scale > 0.0 and softcap == 0.0 and bias is None,
            "SOFTCAP": softcap != 0.0,
            "PRECISION": "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
        }

    def tile(self, kernel: str) -> Any:
        """The Tile of a kernel for this call."""
        from fastattn.kernels.tiles import attention_tile

        arch = architecture(self.q.device)
        return attention_tile(
            kernel, arch, self.q.element_size(), self.q.shape[3], self.v.shape[3], self.mask.has_blocks
        )

    def of_tile(self, tile: Any, plan: Plan, tiles: int) -> dict[str, Any]:
        """The arguments that depend on the tile shape. tiles: how many programs a batch entry and head has."""
        per_head = self.k.shape[2] * (self.k.shape[3] + self.v.shape[3]) * self.k.element_size()
        section = self.arguments["group"] * max(1, _SECTION_BYTES // max(per_head, 1))
        most = (_MAX_PROGRAMS - 1) // max(tiles, 1)
        return {
            **plan.arguments,
            "BLOCK_Q": tile.block_q,
            "BLOCK_K": tile.block_k,
            "section": max(1, min(section, self.q.shape[0] * self.q.shape[1], most)),
            "LAST_FIRST": self.mask.arguments["HAS_BAND"],
        }


def _strides(name: str, tensor: Tensor) -> dict[str, int]:
    """Strides of batch, head and row under the names the kernels know them by."""
    return {f"{name}_{letter}": tensor.stride(d) for d, letter in enumerate("bhs")}


def _addressable(tensor: Tensor) -> Tensor:
    """The kernels address a tile's rows in int32 from its first one; a copy where their distance is too great."""
    return tensor if tensor.stride(2) * 256 < 2**31 else tensor.contiguous()


def _writable(grad: Tensor) -> Tensor:
    """The gradient itself, or one that the kernels can write where its last dimension is not contiguous."""
    is_plain = (grad.stride(3) == 1 or grad.shape[3] == 1) and _addressable(grad) is grad
    return grad if is_plain else torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
