"""What a provider's results must be: float64 truths of the very tensors that are timed, for the parity rule.

Whole truths of large cases would take longer than timing them. Each truth is therefore taken of a part that stands for
itself, exactly: attention, of one key-value head of one batch entry with its query heads, over all keys and, but for
the forward of long cases, all queries (a few at a time, and only keys that they see); feed-forward blocks, of some
rows of y and dx and of some hidden units of the weight gradients, over all rows. Norms are cheap and judged whole.
The bound is that of `fastattn.parity.bound`; `fastattn verify` checks more, on small random calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastattn import reference
from fastattn.parity.bound import ParityRow, parity, verdict
from fastattn.parity.eager import eager_attention, eager_ffn, eager_gated_ffn, eager_norm
from fastattn.parity.magnitude import attention_magnitudes, ffn_magnitudes, gated_ffn_magnitudes, norm_magnitudes

if TYPE_CHECKING:
    from fastattn.bench.cases.attention import AttentionCase
    from fastattn.bench.cases.ffn import FfnCase
    from fastattn.bench.cases.norm import NormCase

_SCORES_AT_ONCE = 2**22
_QUERIES, _STRETCHES = 1024, 8
_ROWS, _UNITS = 64, 64
_KINDS = ("ref", "eager", "magnitude")


def _whole(tensor: Tensor) -> Tensor:
    return tensor


def _at(index: tuple[slice, ...]) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor[index]


def _rows_of(pick: Callable[[Tensor], Tensor], chunks: list[tuple[int, int]]) -> Callable[[Tensor], Tensor]:
    return lambda tensor: torch.cat([pick(tensor)[:, :, first:last] for first, last in chunks], dim=2)


@dataclass(frozen=True)
class Expected:
    """One quantity: which part of a result is judged, the truth of that part, eager's value and T."""

    name: str
    ref: Tensor
    eager: Tensor
    magnitude: Tensor
    pick: Callable[[Tensor], Tensor] = _whole
    group_dims: int = 0

    def check(self, found: Mapping[str, Tensor]) -> ParityRow:
        """The verdict on one provider's results; a missing or NaN result fails."""
        if self.name not in found:
            return verdict(self.name, "no such result")
        part = self.pick(found[self.name].detach())
        return parity(self.name, part, self.ref, self.eager, self.magnitude, group_dims=self.group_dims)


def _leaves(tensors: Mapping[str, Tensor], wanted: bool, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    return {n: t.detach().to(dtype or t.dtype).requires_grad_(wanted) for n, t in tensors.items()}


# --- Attention ------------------------------------------------------------------------------------------------


class _Sums:
    """One of truth, eager and T of an attention part: rows of out and dq side by side, the rest summed over rows."""

    def __init__(self) -> None:
        self.rows: dict[str, list[Tensor]] = {}
        self.sums: dict[str, Tensor] = {}

    def append(self, name: str, part: Tensor) -> None:
        self.rows.setdefault(name, []).append(part.detach())

    def add(self, name: str, part: Tensor, like: Tensor, at: slice) -> None:
        """Adds a part of the gradient of `like` (keys lie in dimension 2) at some of its keys."""
        if name not in self.sums:
            wide = torch.float64 if part.dtype == torch.float64 else torch.float32
            self.sums[name] = torch.zeros(like.shape, dtype=wide, device=like.device)
        self.sums[name][:, :, at] += part.detach()

    def get(self, name: str) -> Tensor:
        return torch.cat(self.rows[name], dim=2) if name in self.rows else self.sums[name]


def attention_truth(case: AttentionCase, tensors: Mapping[str, Tensor], grad: Tensor | None) -> list[Expected]:
    """Truths of out, and where grad (that of out) is given of dq, dk, dv and dtable.

    The judged head is the last one of the last batch entry; a bias table's gradient sums over the batch, so its truth
    takes that head of every entry.
    """
    found: list[Expected] = []
    table: dict[str, Tensor] = {}
    head = case.heads_kv - 1
    for entry in range(case.batch) if case.t5_bias and grad is not None else (case.batch - 1,):
        part = _attention_part(case, tensors, grad, entry, head)
        if case.t5_bias and grad is not None:
            for kind in _KINDS:
                column = part[kind].sums["dtable"][0, 0]
                table[kind] = table[kind] + column if kind in table else column
        if entry != case.batch - 1:
            continue
        group = case.heads_q // case.heads_kv
        of_queries = _at((slice(entry, entry + 1), slice(head * group, (head + 1) * group)))
        of_keys = _at((slice(entry, entry + 1), slice(head, head + 1)))
        chunks = _chunks(case, backward=grad is not None)
        for name in ("out", "dq", "dk", "dv") if grad is not None else ("out",):
            pick = of_keys if name in ("dk", "dv") else _rows_of(of_queries, chunks)
            ref, eager, size = (part[kind].get(name) for kind in _KINDS)
            found.append(Expected(name, ref, eager, size, pick, group_dims=2))
    if grad is not None and table:
        table["eager"] = _eager_dtable(case, tensors, grad, head)
        ref, eager, size = (table[kind] for kind in _KINDS)
        found.append(Expected("dtable", ref, eager, size, _at((slice(None), slice(-1, None)))))
    return found


def _eager_dtable(case: AttentionCase, tensors: Mapping[str, Tensor], grad: Tensor, head: int) -> Tensor:
    """The gradient of the judged head's biases as a model has it, (buckets, G): of all entries at once, whose half
    gradients are added up in their own dtype. Entry by entry in float32 it would be a better one than torch's."""
    group = case.heads_q // case.heads_kv
    heads = slice(head * group, (head + 1) * group)
    seen = [case.visible.rows(b, 0, case.len_q, case.len_q, case.len_k, case.device) for b in range(case.batch)]
    keys = slice(head, head + 1)
    chunk = {"q": tensors["q"][:, heads], "k": tensors["k"][:, keys], "v": tensors["v"][:, keys]}
    leaves = _leaves({**chunk, "table": tensors["table"][:, heads]}, True, case.dtype)
    whole = _AttentionChunk(case.scale, torch.stack(seen)[:, None], case.buckets())
    with torch.enable_grad():
        out = whole.eager(leaves)
    (found,) = torch.autograd.grad(out, [leaves["table"]], grad[:, heads].to(case.dtype))
    return found.detach()


def _chunks(case: AttentionCase, *, backward: bool) -> list[tuple[int, int]]:
    """The judged queries, first and last + 1, a few at a time: all of them where keys have gradients, which sum over
    them; else of a long case some stretches, from the first query to the last."""
    stretches = [(0, case.len_q)]
    if not backward and case.len_q > _QUERIES:
        size = _QUERIES // _STRETCHES
        apart = (case.len_q - size) / (_STRETCHES - 1)
        stretches = [(round(i * apart), round(i * apart) + size) for i in range(_STRETCHES)]
    step = max(1, _SCORES_AT_ONCE // (case.len_k * case.heads_q // case.heads_kv))
    return [(at, min(at + step, last)) for first, last in stretches for at in range(first, last, step)]


def _attention_part(
    case: AttentionCase, tensors: Mapping[str, Tensor], grad: Tensor | None, entry: int, head: int
) -> dict[str, _Sums]:
    group = case.heads_q // case.heads_kv
    heads = slice(head * group, (head + 1) * group)
    q, k, v = tensors["q"][entry, heads][None], tensors["k"][entry, head][None, None], tensors["v"][entry, head]
    v = v[None, None]
    out_grad = None if grad is None else grad[entry, heads][None]
    sums = {kind: _Sums() for kind in _KINDS}
    buckets = case.buckets() if case.t5_bias else None
    for first, last in _chunks(case, backward=grad is not None):
        seen = case.visible.rows(entry, first, last, case.len_q, case.len_k, case.device)
        columns = seen.any(dim=0).nonzero()
        at = slice(int(columns[0]), int(columns[-1]) + 1) if len(columns) else slice(0, 1)
        chunk = {"q": q[:, :, first:last], "k": k[:, :, at], "v": v[:, :, at]}
        if buckets is not None:
            chunk["table"] = tensors["table"][:, heads]
        part = _AttentionChunk(
            case.scale, seen[None, None, :, at], None if buckets is None else buckets[first:last, at]
        )
        part_grad = None if out_grad is None else out_grad[:, :, first:last]
        part.add(sums, chunk, part_grad, {"k": k, "v": v}, at)
    return sums


@dataclass(frozen=True)
class _AttentionChunk:
    """Some rows of queries of one key-value head, and the keys that they see."""

    scale: float
    seen: Tensor
    buckets: Tensor | None

    def bias(self, table: Tensor) -> Tensor:
        """(1, G, rows, keys) from the table (buckets, G)."""
        assert self.buckets is not None
        return table[self.buckets].permute(2, 0, 1).unsqueeze(0)

    def add(
        self, sums: dict[str, _Sums], chunk: dict[str, Tensor], grad: Tensor | None, whole: dict[str, Tensor], at: slice
    ) -> None:
        wanted = grad is not None
        for kind, dtype in (("ref", torch.float64), ("eager", chunk["q"].dtype)):
            leaves = _leaves(chunk, wanted, dtype)
            with torch.set_grad_enabled(wanted):
                out = self._truth(leaves) if kind == "ref" else self.eager(leaves)
            sums[kind].append("out", out)
            if grad is not None:
                grads = torch.autograd.grad(out, list(leaves.values()), grad.to(dtype))
                self._add_gradients(sums[kind], dict(zip(leaves, grads, strict=True)), whole, at)
        size = self._magnitudes(chunk, grad)
        sums["magnitude"].append("out", size["out"])
        if grad is not None:
            self._add_gradients(sums["magnitude"], {n: size["d" + n] for n in chunk}, whole, at)

    def _add_gradients(self, sums: _Sums, grads: dict[str, Tensor], whole: dict[str, Tensor], at: slice) -> None:
        sums.append("dq", grads["q"])
        for name in ("k", "v"):
            sums.add("d" + name, grads[name], whole[name], at)
        if "table" in grads:
            column = grads["table"][None, None]
            sums.add("dtable", column, column, slice(None))

    def _truth(self, t: dict[str, Tensor]) -> Tensor:
        bias = self.bias(t["table"]) if "table" in t else None
        found: Any = reference.attention(t["q"], t["k"], t["v"], mask=self.seen, bias=bias, scale=self.scale)
        return found

    def eager(self, t: dict[str, Tensor]) -> Tensor:
        visible = self.seen.expand(-1, t["q"].size(1), -1, -1)
        biases = (self.bias(t["table"]),) if "table" in t else ()
        return eager_attention(t["q"], t["k"], t["v"], visible=visible, biases=biases, scale=self.scale)[0]

    def _magnitudes(self, t: dict[str, Tensor], grad: Tensor | None) -> dict[str, Tensor]:
        visible = self.seen.expand(1, t["q"].size(1), *self.seen.shape[2:])
        biases = {"bias": self.bias(t["table"])} if "table" in t else {}
        found = attention_magnitudes(
            t["q"], t["k"], t["v"], grad, None, visible=visible, biases=biases, scale=self.scale
        )
        if self.buckets is not None:
            scores = found["dbias"][0].flatten(1)
            table = scores.new_zeros(t["table"].shape[0], scores.shape[0])
            found["dtable"] = table.index_add_(0, self.buckets.flatten(), scores.T)
        return found


# --- Norms and feed-forward blocks ------------------------------------------------------------------------------


def norm_truth(
    case: NormCase, tensors: Mapping[str, Tensor], grads: tuple[Tensor, ...], backward: bool
) -> list[Expected]:
    """Truths of y, of z where there is a residual, and of the gradients of all inputs."""
    names = case.leaves()

    def truth(t: dict[str, Tensor]) -> tuple[Tensor, ...]:
        found = reference.norm(
            t["x"],
            t["weight"],
            t.get("bias"),
            kind=case.kind,
            eps=case.eps,
            residual=t.get("residual"),
            return_residual=case.residual,
        )
        return (found,) if isinstance(found, Tensor) else found

    def eager(t: dict[str, Tensor]) -> tuple[Tensor, ...]:
        y, z = eager_norm(t["x"], t["weight"], t.get("bias"), kind=case.kind, eps=case.eps, residual=t.get("residual"))
        return (y, z) if case.residual else (y,)

    values: dict[str, dict[str, Tensor]] = {}
    for kind, run, dtype in (("ref", truth, torch.float64), ("eager", eager, case.dtype)):
        leaves = _leaves(tensors, backward, dtype)
        outs = run(leaves)
        values[kind] = dict(zip(case.outputs, (o.detach() for o in outs), strict=True))
        if backward:
            got = torch.autograd.grad(outs, [leaves[n] for n in names], [g.to(dtype) for g in grads])
            values[kind] |= {"d" + n: g for n, g in zip(names, got, strict=True)}
    size = norm_magnitudes(
        tensors["x"],
        tensors["weight"],
        tensors.get("bias"),
        grads[0],
        grads[1] if case.residual else None,
        kind=case.kind,
        eps=case.eps,
        residual=tensors.get("residual"),
    )
    return [Expected(n, values["ref"][n], values["eager"][n], size[n]) for n in values["ref"]]


def ffn_truth(case: FfnCase, tensors: Mapping[str, Tensor], grad: Tensor | None) -> list[Expected]:
    """Truths of some rows of y and dx and, over all rows, of some units' weight gradients."""
    rows = torch.linspace(0, case.rows - 1, min(_ROWS, case.rows)).long().to(case.device)
    few = {n: t[rows] if n == "x" else t for n, t in tensors.items()}
    found = _ffn_part(case, few, None if grad is None else grad[rows], {"y", "dx"}, lambda _name: lambda t: t[rows])
    if grad is None:
        return found
    units = torch.linspace(0, case.hidden - 1, min(_UNITS, case.hidden)).long().to(case.device)

    def pick(name: str) -> Callable[[Tensor], Tensor]:
        if name in ("x", "b2"):
            return _whole
        return (lambda t: t[:, units]) if name in ("w2", "w_down") else (lambda t: t[units])

    # y is a sum over hidden units, so the block restricted to some of them has their weights' gradients exactly.
    restricted = {n: pick(n)(t) for n, t in tensors.items()}
    wanted = {"d" + n for n in tensors} - {"dx"}
    return found + _ffn_part(case, restricted, grad, wanted, lambda name: pick(name.removeprefix("d")))


def _ffn_part(
    case: FfnCase,
    tensors: dict[str, Tensor],
    grad: Tensor | None,
    wanted: set[str],
    pick: Callable[[str], Callable[[Tensor], Tensor]],
) -> list[Expected]:
    def arguments(t: Mapping[str, Tensor]) -> list[Any]:
        if case.gated:
            return [t["x"], t["w_gate"], t["w_up"], t["w_down"], case.activation]
        return [t["x"], t["w1"], t.get("b1"), t["w2"], t.get("b2"), case.activation]

    runs: dict[str, tuple[Callable[..., Tensor], torch.dtype]] = {
        "ref": (reference.gated_ffn if case.gated else reference.ffn, torch.float64),
        "eager": (eager_gated_ffn if case.gated else eager_ffn, case.dtype),
    }
    magnitudes: Callable[..., dict[str, Tensor]] = gated_ffn_magnitudes if case.gated else ffn_magnitudes
    biases = (None, None, None) if case.gated else ()
    values: dict[str, dict[str, Tensor]] = {}
    for kind, (run, dtype) in runs.items():
        leaves = _leaves(tensors, grad is not None, dtype)
        y = run(*arguments(leaves))
        values[kind] = {"y": y.detach()}
        if grad is not None:
            got = torch.autograd.grad(y, list(leaves.values()), grad.to(dtype))
            values[kind] |= {"d" + n: g for n, g in zip(leaves, got, strict=True)}
    out_grad = torch.zeros_like(values["eager"]["y"]) if grad is None else grad
    size = magnitudes(*arguments(tensors), *biases, out_grad)
    return [Expected(n, values["ref"][n], values["eager"][n], size[n], pick(n)) for n in values["ref"] if n in wanted]
