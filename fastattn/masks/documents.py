"""Documents packed into one sequence, each seeing only itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.masks.arguments import check_device, check_integers, describe
from fastattn.masks.base import Mask
from fastattn.masks.intervals import IntervalSet, interval
from fastattn.masks.lowered import Index, Size


class Document(Mask):
    """Keeps the keys of the query's own document: key j for query i where ids_k[b, j] == ids_q[b, i].

    ids_q: the document of each query, an integer tensor (B, Sq), (1, Sq) or (Sq,) on q's device. ids_k: of each key,
    (B, Skv), (1, Skv) or (Skv,); ids_q by default, which then needs Sq = Skv. Often joined with `Causal`.

    contiguous: the keys of a document lie next to one another, as packing leaves them, in any order of documents. It
    makes the mask one interval per query. Ids on the CPU are checked here; elsewhere nothing is read, and ids that
    break the promise would show a query what lies between its document's parts. False takes any ids, and builds blocks.

    Raises TypeError or ValueError for other values, and ValueError for ids on the CPU that are not contiguous.
    """

    def __init__(self, ids_q: Tensor, ids_k: Tensor | None = None, *, contiguous: bool = True) -> None:
        self.ids_q = _as_ids("ids_q", ids_q)
        self.ids_k = self.ids_q if ids_k is None else _as_ids("ids_k", ids_k)
        self.contiguous = contiguous
        if contiguous:
            _check_contiguous("ids_q" if ids_k is None else "ids_k", self.ids_k)

    def parts(self) -> tuple[Any, ...]:
        return self.ids_q, self.ids_k, self.contiguous

    def check(self, size: Size, device: torch.device | None) -> None:
        for name, ids, length, of in (
            ("ids_q", self.ids_q, size.len_q, "Sq"),
            ("ids_k", self.ids_k, size.len_k, "Skv"),
        ):
            check_device(f"Document: {name}", ids, device)
            rows = 1 if ids.dim() == 1 else ids.shape[0]
            if ids.shape[-1] == length and rows in (1, size.batch):
                continue
            shared = name == "ids_k" and self.ids_k is self.ids_q
            remedy = "pass ids_k too" if shared else f"pass ({size.batch}, {length}) or ({length},)"
            raise ValueError(
                f"Document: {'ids_q, which stands for ids_k,' if shared else name} has shape {tuple(ids.shape)}, but "
                f"this call has B={size.batch} and {of}={length}: {remedy}"
            )

    def extent(self, size: Size, device: torch.device) -> tuple[int, int]:
        batches = (1 if ids.dim() == 1 else ids.shape[0] for ids in (self.ids_q, self.ids_k))
        return torch.broadcast_shapes(*((batch,) for batch in batches))[0], 1

    def rule(self, at: Index) -> Tensor:
        return _of(self.ids_q, at.batch, at.query) == _of(self.ids_k, at.batch, at.key)

    def intervals(self, size: Size, device: torch.device) -> IntervalSet | None:
        if not self.contiguous:
            return None
        ids_q, ids_k = (ids if ids.dim() == 2 else ids[None] for ids in (self.ids_q, self.ids_k))
        ids_q, ids_k = ids_q[:, : size.len_q], ids_k[:, : size.len_k]  # of one sequence of a packed batch
        rows = torch.broadcast_shapes(ids_q.shape[:1], ids_k.shape[:1])[0]
        ids_q, ids_k = ids_q.long().expand(rows, -1).contiguous(), ids_k.long().expand(rows, -1)
        if size.len_k == 0:
            return interval(0, 0)
        ordered, place = ids_k.sort(dim=1, stable=True)
        first = torch.searchsorted(ordered, ids_q)
        past = torch.searchsorted(ordered, ids_q, right=True)
        start = place.gather(1, first.clamp(max=size.len_k - 1))
        # a document without keys ends where it starts
        end = start + (past - first)
        return interval(start[:, None].to(torch.int32), end[:, None].to(torch.int32))

    def __repr__(self) -> str:
        keys = "" if self.ids_k is self.ids_q else f", {describe(self.ids_k)}"
        return f"Document({describe(self.ids_q)}{keys}{'' if self.contiguous else ', contiguous=False'})"


def _as_ids(name: str, ids: Tensor) -> Tensor:
    check_integers("Document", name, ids)
    if ids.dim() not in (1, 2):
        raise ValueError(f"Document: {name} has shape {tuple(ids.shape)}: pass one id per token, (B, S) or (S,)")
    return ids


def _of(ids: Tensor, batch: Tensor, token: Tensor) -> Tensor:
    ids = ids.to(token.device)
    if ids.dim() == 1:
        return ids[token]
    return ids[batch if ids.shape[0] > 1 else torch.zeros_like(batch), token]


def _check_contiguous(name: str, ids: Tensor) -> None:
    """ValueError where an id of a row comes back after another; only for tensors whose values are at hand."""
    if torch.compiler.is_compiling() or ids.device.type != "cpu" or type(ids) is not Tensor:
        return
    if torch._C._functorch.is_functorch_wrapped_tensor(ids) or ids.shape[-1] == 0:
        return
    rows = ids if ids.dim() == 2 else ids[None]
    ordered = rows.sort(dim=1).values
    runs, documents = ((x[:, 1:] != x[:, :-1]).sum(dim=1) for x in (rows, ordered))
    broken = (runs != documents).nonzero()
    if broken.numel():
        raise ValueError(
            f"Document: {name} has an id in row {int(broken[0])} that comes back after another one: sort the documents "
            "so that each lies in one piece, or pass contiguous=False"
        )
