"""Launches the attention kernels of fastattn.kernels.attention. Arguments and results: fastattn.backends.protocol."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.backends.few import as_decoding
from fastattn.backends.triton import flash
from fastattn.backends.triton.decode import MAX_ENTRIES, attention_decode, input_reasons
from fastattn.backends.triton.launch import architecture, dot_precision, launch
from fastattn.backends.triton.plan import Mask, Plan, bias_arguments, mask_arguments, plan_keys, plan_queries
from fastattn.backends.views import copied, empty_out, writable
from fastattn.biases.lowered import LoweredBias
from fastattn.masks.lowered import LoweredMask
from fastattn.packed import Packed
from fastattn.problems import AttentionProblem
from fastattn.reference.philox import dropout_scale, dropout_threshold

_MAX_PROGRAMS = 2**31
_MAX_MASKED_KEYS = (2**16 - 1) * 32  # in tiles of at least 32, of a grid's second dimension
_BIAS_PROGRAMS = 512  # what keeps a GPU busy; with fewer tiles of the bias its gradient is summed up in parts
_TABLE_SUMS = 2**24  # numbers of all partial sums of a table's gradient
_SECTION_BYTES = 32 * 2**20  # keys and values that programs running at the same time may share an L2 cache for


def attention_reasons(problem: AttentionProblem) -> list[str]:
    """Why the kernels refuse an attention problem, whatever its device."""
    reasons = input_reasons("attention", problem)
    tiles = -(-max(problem.len_q, problem.len_k) // 16)
    if problem.batch * problem.heads_q * tiles >= _MAX_PROGRAMS:
        reasons.append(f"the Triton attention has too many tiles: {problem.batch} x {problem.heads_q} x {tiles}")
    if problem.dense_mask and problem.len_k > _MAX_MASKED_KEYS:
        reasons.append(f"the Triton attention takes dense masks of up to {_MAX_MASKED_KEYS} keys, not {problem.len_k}")
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
    batch, heads, rows, _ = q.shape
    fits = packed is None and dropout_p == 0.0 and batch * k.shape[1] < MAX_ENTRIES
    decoding = as_decoding(mask, bias, rows, k.shape[2], q.device) if fits else None
    if decoding is not None:
        lengths = torch.full((batch,), k.shape[2], dtype=torch.int32, device=q.device)
        return attention_decode(q, k, v, lengths, None, *decoding, sinks, scale, softcap)
    from fastattn.kernels.attention.forward import attention_forward_kernel

    out = empty_out(q, v.shape[3])
    lse = q.new_empty(q.shape[0], heads, rows, dtype=torch.float32)
    if packed is not None:  # rows that belong to no sequence
        out.zero_()
        lse.fill_(-torch.inf)
    call = Call(q, k, v, mask, bias, packed, sinks, dropout_seed, scale, softcap, dropout_p)
    if 0 in (call.batch, heads, call.len_q):
        return out, lse
    tile = call.tile("forward")
    tiles = -(-call.len_q // tile.block_q)
    plan = plan_keys(call.mask, call.len_q, call.len_k, tile.block_q, tile.block_k)
    arguments = call.arguments | call.of_tile(tile, plan, tiles)
    arguments |= {"out": out, **call.strides("out", out), "lse": lse}
    grid = (call.batch * heads * tiles,)
    launch(attention_forward_kernel, grid, arguments, **tile.options(call.plain))
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
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See the protocol."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    written = [_writable(grad) for grad in (dq, dk, dv)]
    call = Call(q, k, v, mask, bias, packed, sinks, dropout_seed, scale, softcap, dropout_p)
    is_empty = 0 in (call.batch, lse.numel(), call.len_q, call.len_k)
    if packed is not None or is_empty:  # what belongs to no sequence, is seen by no query or sees no key
        for wide in written:
            wide.zero_()
    if is_empty:
        dbias, dtable, dslopes = (
            lse.new_zeros((0,) if t is None or not asked else t.shape)
            for t, asked in (
                (bias.dense, bias_requires_grad),
                (bias.table, table_requires_grad),
                (bias.slopes, slopes_requires_grad),
            )
        )
        dsinks = lse.new_zeros(q.shape[1] if sinks_requires_grad else 0)
        return *copied(written, (dq, dk, dv)), dbias, dtable, dslopes, dsinks
    grad_out, out = _aligned(_addressable(grad_out)), _aligned(_addressable(out))
    is_plain = call.plain and scale > 0.0 and grad_lse is None and packed is None and sinks is None
    # Of the kernels below every sum has a fixed order.
    if not deterministic and is_plain and flash.is_faster(architecture(q.device), call.q, call.k, call.v, mask):
        found = flash.gradients(grad_out, call.q, call.k, call.v, out, lse, mask, scale)
        pairs = zip((dq, dk, dv), found, strict=True)
        dq, dk, dv = (new if new.stride() == own.stride() else own.copy_(new) for own, new in pairs)
        nothing = lse.new_empty(0)
        return dq, dk, dv, nothing, nothing, nothing, nothing
    call.arguments |= {"out": out, **call.strides("out", out), "lse": lse, "grad_lse": grad_lse}
    call.arguments |= {"grad_out": grad_out, **call.strides("grad_out", grad_out)}
    call.arguments |= {"norm_out": torch.empty_like(lse), "centre_out": torch.empty_like(lse)}
    sink_terms = torch.zeros_like(lse) if sinks_requires_grad else None
    _launch_queries(call, written[0], sink_terms)
    _launch_keys(call, *written[1:])
    dbias, dtable, dslopes, dsinks = (lse.new_empty(0) for _ in range(4))
    if bias.dense is not None and bias_requires_grad:
        dbias = _launch_bias(call, bias.dense)
    if table_requires_grad or slopes_requires_grad:
        dtable, dslopes = _launch_distance(call, bias, table_requires_grad, slopes_requires_grad)
    if sink_terms is not None:
        dsinks = sink_terms.sum(dim=(0, 2))
    return *copied(written, (dq, dk, dv)), dbias, dtable, dslopes, dsinks


def _launch_queries(call: Call, grad_q: Tensor, sink_terms: Tensor | None) -> None:
    from fastattn.kernels.attention.backward import attention_queries_kernel
    from fastattn.kernels.tiles import NARROW_HEAD

    tile = call.tile("queries")
    tiles = -(-call.len_q // tile.block_q)
    plan = plan_keys(call.mask, call.len_q, call.len_k, tile.block_q, tile.block_k)
    arguments = call.arguments | call.of_tile(tile, plan, tiles)
    has_two_factors = arguments["sinks"] is not None and arguments["grad_lse"] is not None
    arguments |= {
        "grad_q": grad_q,
        **call.strides("grad_q", grad_q),
        "sink_terms": sink_terms,
        "CHECKED": has_two_factors or call.q.dtype != torch.float32,
        # Of a narrow head nothing averages a rounded out: its tiles are always walked again.
        "tolerance": 0.0 if call.arguments["WIDE"] <= NARROW_HEAD else torch.finfo(call.q.dtype).eps / 4,
    }
    grid = (call.batch * call.heads * tiles,)
    launch(attention_queries_kernel, grid, arguments, **tile.options(call.plain))


def _launch_keys(call: Call, grad_k: Tensor, grad_v: Tensor) -> None:
    from fastattn.kernels.attention.backward import attention_keys_kernel

    tile = call.tile("keys")
    tiles = -(-call.len_k // tile.block_k)
    plan = plan_queries(call.mask, call.len_q, call.len_k, tile.block_q, tile.block_k)
    arguments = call.arguments | call.of_tile(tile, plan, tiles)
    arguments |= {"grad_k": grad_k, **call.strides("grad_k", grad_k)}
    arguments |= {"grad_v": grad_v, **call.strides("grad_v", grad_v)}
    grid = (call.batch * call.k.shape[1] * tiles,)
    launch(attention_keys_kernel, grid, arguments, **tile.options(call.plain))


def _launch_bias(call: Call, bias: Tensor) -> Tensor:
    """dbias float32 of bias' shape: the sum of what a few programs for each of its tiles found."""
    from fastattn.kernels.attention.bias import attention_bias_kernel

    batch, heads, len_q, len_k = call.batch, call.heads, call.len_q, call.len_k
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
    launch(attention_bias_kernel, (programs, parts), arguments, **tile.options(call.plain))
    return grad_bias.sum(dim=0)


def _launch_distance(
    call: Call, bias: LoweredBias, table_requires_grad: bool, slopes_requires_grad: bool
) -> tuple[Tensor, Tensor]:
    """dtable and dslopes float32 of their shapes, empty where not asked for."""
    from fastattn.kernels.attention.bias import attention_distance_kernel

    tile = call.tile("bias")
    tile = tile._replace(block_q=min(tile.block_q, tile.block_k))
    tiles = -(-call.len_q // tile.block_q)
    rows, columns = (1, 1) if not table_requires_grad or bias.table is None else bias.table.shape
    shared_heads = call.heads // rows
    items = call.batch * shared_heads * tiles
    parts = max(1, min(items, -(-_BIAS_PROGRAMS // rows), _TABLE_SUMS // (rows * columns)))
    device = call.q.device
    table_sums = torch.zeros(parts, rows, columns, dtype=torch.float32, device=device)
    slope_sums = torch.empty(call.batch, call.heads, tiles, dtype=torch.float32, device=device)
    plan = plan_keys(call.mask, call.len_q, call.len_k, tile.block_q, tile.block_k)
    arguments = call.arguments | call.of_tile(tile, plan, parts)
    arguments |= {
        "table_sums": table_sums,
        "slope_sums": slope_sums,
        "states": plan.states,
        "table_last": columns - 1 if table_requires_grad else call.arguments["table_last"],
        "items": items,
        "shared_heads": shared_heads,
        "SUMS_TABLE": table_requires_grad,
        "SUMS_SLOPES": slopes_requires_grad,
    }
    launch(attention_distance_kernel, (rows, parts), arguments, **tile.options(call.plain))
    dtable = table_sums.sum(dim=0) if table_requires_grad else table_sums.new_empty(0)
    dslopes = table_sums.new_empty(0)
    if slopes_requires_grad and bias.slopes is not None:
        dslopes = slope_sums.sum(dim=2).sum_to_size(bias.slopes.shape)
    return dtable, dslopes


class Call:
    """What forward and backward kernels get alike. batch, len_q, len_k: of a packed batch its sequences and the most
    that one may have."""

    def __init__(
        self,
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
    ) -> None:
        from fastattn.kernels.tiles import pieces, takes_tf32

        q, k, v = (_aligned(_addressable(t)) for t in (q, k, v))
        self.q, self.k, self.v, self.is_packed = q, k, v, packed is not None
        biased = any(t is not None for t in (bias.dense, bias.table, bias.slopes))
        self.plain = not biased and softcap == 0.0 and dropout_p == 0.0 and mask.blocks is None
        self.batch, self.heads, self.len_q, dim = q.shape
        _, heads_kv, self.len_k, dim_v = v.shape
        rows_q, rows_k = self.len_q, self.len_k
        if packed is not None:
            self.batch, self.len_q, self.len_k = packed.batch, packed.max_len_q, packed.max_len_k
        self.mask: Mask = mask_arguments(mask, self.batch, self.heads, self.len_q, self.len_k, packed, rows_q, rows_k)
        wide, rest = pieces(dim)
        wide_v, rest_v = pieces(dim_v)
        full = (self.batch, self.heads, self.len_q, self.len_k)
        may_round = takes_tf32(architecture(q.device), q.element_size(), dim, dim_v)
        self.arguments: dict[str, Any] = {
            "q": q,
            "k": k,
            "v": v,
            **self.strides("q", q),
            **self.strides("k", k),
            **self.strides("v", v),
            "lse_b": 0 if self.is_packed else self.heads * rows_q,
            "lse_h": rows_q,
            **self.mask.arguments,
            **bias_arguments(bias, full),
            "sinks": None if sinks is None else sinks.float(),
            "seed_pointer": dropout_seed if dropout_p > 0.0 else None,
            "threshold": dropout_threshold(dropout_p),
            "keep_scale": dropout_scale(dropout_p),
            "batches": self.batch,
            "heads_q": self.heads,
            "group": self.heads // max(heads_kv, 1),
            "len_q": self.len_q,
            "len_k": self.len_k,
            "scale": scale,
            "softcap": softcap,
            "DIM": dim,
            "WIDE": wide,
            "REST": rest,
            "DIM_V": dim_v,
            "WIDE_V": wide_v,
            "REST_V": rest_v,
            "FOLDED": scale > 0.0 and softcap == 0.0 and not biased,
            "SOFTCAP": softcap != 0.0,
            "PRECISION": dot_precision() if may_round else "ieee",
        }

    def strides(self, name: str, tensor: Tensor) -> dict[str, int]:
        """Strides of batch, head and row under the names the kernels know them by; a packed batch is one entry."""
        found = {f"{name}_{letter}": tensor.stride(d) for d, letter in enumerate("bhs")}
        return found | {f"{name}_b": 0} if self.is_packed else found

    def tile(self, kernel: str) -> Any:
        """The Tile of a kernel for this call."""
        from fastattn.kernels.tiles import attention_tile, bytes_of_pairs

        arch = architecture(self.q.device)
        dims = self.q.shape[3], self.v.shape[3]
        pair_bytes = bytes_of_pairs(*(self.arguments[name] for name in ("bias", "dense", "table")))
        return attention_tile(kernel, arch, self.q.element_size(), *dims, self.mask.has_blocks, self.plain, pair_bytes)

    def of_tile(self, tile: Any, plan: Plan, tiles: int) -> dict[str, Any]:
        """The arguments that depend on the tile shape. tiles: how many programs a batch entry and head has."""
        per_head = self.len_k * (self.k.shape[3] + self.v.shape[3]) * self.k.element_size()
        section = self.arguments["group"] * max(1, _SECTION_BYTES // max(per_head, 1))
        most = (_MAX_PROGRAMS - 1) // max(tiles, 1)
        return {
            **plan.arguments,
            "BLOCK_Q": tile.block_q,
            "BLOCK_K": tile.block_k,
            "section": max(1, min(section, self.batch * self.heads, most)),
            "LAST_FIRST": self.mask.arguments["HAS_BAND"],
        }


def _addressable(tensor: Tensor) -> Tensor:
    """The kernels address a tile's rows in int32 from its first one; a copy where their distance is too great."""
    return tensor if tensor.stride(2) * 256 < 2**31 else tensor.contiguous()


def _aligned(tensor: Tensor) -> Tensor:
    """A tensor (B, H, S, D) whose rows begin at multiples of 16 bytes, as loads of 16 bytes need: the given one or a
    copy, which costs less than the loads of single elements that would be left. It also spares the user a compilation
    for each way to be unaligned."""
    step = 16 // tensor.element_size()
    steps = zip(tensor.shape[:3], tensor.stride()[:3], strict=True)
    if tensor.data_ptr() % 16 == 0 and all(size == 1 or stride % step == 0 for size, stride in steps):
        return tensor
    batch, heads, rows, dim = tensor.shape
    copy = tensor.new_empty(batch, rows, heads, -(-dim // step) * step).transpose(1, 2)[..., :dim]
    return copy.copy_(tensor)


def _writable(grad: Tensor) -> Tensor:
    """The gradient itself, or room for it where the kernels could not address it."""
    return writable(grad) if _addressable(grad) is grad else grad.new_empty(grad.shape)
