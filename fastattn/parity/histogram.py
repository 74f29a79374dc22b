"""The exact check of a mask: integers that come out right or wrong, no tolerance involved.

With q = 0 every visible key has the same weight 1/n. Let v be one-hot over key residues: then n * out[i, r] is the
number of visible keys with residue r. With the gradient of query i set to n_i times one-hot over its residue, dv[j, r]
is the number of queries of residue r that see key j. Low and high digits of the index are both taken as residues, so
that a key swapped for one a whole period away is seen too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import functional
from fastattn.masks import Mask
from fastattn.parity.bound import ParityRow, verdict
from fastattn.parity.guards import poisoned_outputs, torch_threads
from fastattn.parity.packing import Packing
from fastattn.reference.attention import dense_mask

RESIDUES = 32
_EXACT = {torch.float32: 1 << 16, torch.bfloat16: 63, torch.float16: 511}  # counts that weights rounded to a dtype keep


def _one_hot_digits(length: int, high: bool) -> Tensor:
    index = torch.arange(length)
    digit = index.div(RESIDUES, rounding_mode="floor") if high else index
    return torch.nn.functional.one_hot(digit % RESIDUES, RESIDUES).double()


def check_mask_histogram(
    mask: Mask | Tensor | None,
    batch: int,
    heads_q: int,
    heads_kv: int,
    len_q: int,
    len_k: int,
    dtype: torch.dtype,
    backend: str | None,
    *,
    device: torch.device | str = "cpu",
    grad: bool = True,
    threads: int | None = None,
    packing: Packing | None = None,
) -> list[ParityRow]:
    """Rows for the forward and, with grad, the backward mask, each for low and high digits of the index.

    mask: a mask object, or a bool or int32 tensor as `fastattn.attention` takes it. A count of a half dtype rounds to
    the right integer as long as fewer than 64 visible keys (queries) share a residue; lengths up to 1024 are safe.
    Where the heads of a group together count more, only some of them get a gradient: the first ones, then the last.
    packing: the calls are made packed.
    """
    full, place = (batch, heads_q, len_q, len_k), torch.device(device)
    seen = dense_mask(mask, full, place) if packing is None else packing.visible(mask, full, place)
    visible = seen.double().cpu()
    count = visible.sum(dim=-1, keepdim=True)
    rows = []
    for high in (False, True):
        name = "high" if high else "low"
        v = _one_hot_digits(len_k, high).to(device, dtype).expand(batch, heads_kv, len_k, RESIDUES).contiguous()
        q = torch.zeros(batch, heads_q, len_q, RESIDUES, device=device, dtype=dtype)
        k = torch.ones(batch, heads_kv, len_k, RESIDUES, device=device, dtype=dtype)
        v.requires_grad_(grad)
        with poisoned_outputs(), torch_threads(threads):
            if packing is None:
                out = functional.attention(q, k, v, mask=mask, backend=backend)
            else:
                out, _ = packing.attention(q, k, v, mask=mask, backend=backend)
        want = visible @ _one_hot_digits(len_k, high)
        rows.append(_integers(f"visible keys ({name} digit)", out.detach().double().cpu() * count, want))
        if grad:
            digits = _one_hot_digits(len_q, high)
            seen_by = (visible.transpose(-1, -2) @ digits).unflatten(1, (heads_kv, -1))
            asked = _heads_within(_EXACT[dtype], seen_by, last=high)
            grad_out = (count * digits * asked.flatten().view(1, -1, 1, 1)).to(device, dtype)
            with poisoned_outputs(), torch_threads(threads):
                (dv,) = torch.autograd.grad(out, v, grad_out)
            seen_by = (seen_by * asked[..., None, None]).sum(dim=2)
            rows.append(_integers(f"seeing queries ({name} digit)", dv.double().cpu(), seen_by))
    return rows


def _heads_within(most: int, counts: Tensor, last: bool) -> Tensor:
    """Float64 (heads_kv, heads per group), 1 for the first heads of each group, or the last, and 0 for others: as many
    as the sums of their counts (batch, heads_kv, heads per group, ...) stay exact for."""
    group = counts.shape[2]
    members = max(1, most // max(1, int(counts.max()))) if counts.numel() else group
    head = torch.arange(group)
    asked = (head >= group - members) if last else (head < members)
    return asked.double().expand(counts.shape[1], group)


def _integers(name: str, found: Tensor, want: Tensor) -> ParityRow:
    """Passes where every number rounds to the wanted integer."""
    wrong = ~((found - want).abs() < 0.5)
    if not wrong.any():
        return verdict(name, None)
    index = [int(i) for i in wrong.nonzero()[0]]
    got, count = float(found[tuple(index)]), float(want[tuple(index)])
    return verdict(name, f"at {index}: {got:.6g} instead of {count:.0f} ({int(wrong.sum())} wrong in all)")
