"""The check of `fastattn.attention` and `fastattn.attention_varlen` under the parity rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import functional, reference
from fastattn.biases import Bias, Dense
from fastattn.masks import Mask
from fastattn.parity.bound import ParityRow
from fastattn.parity.eager import eager_attention
from fastattn.parity.magnitude import attention_magnitudes
from fastattn.parity.packing import Packing
from fastattn.parity.probe import Conditions, Probe, Tensors, differentiable, named, run_probe
from fastattn.reference.attention import dense_mask
from fastattn.reference.philox import dropout_scale, keep_mask


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    backend: str | None,
    mask: Mask | Tensor | None = None,
    bias: Bias | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_lse: bool = True,
    deterministic: bool = False,
    packing: Packing | None = None,
    conditions: Conditions | None = None,
) -> list[ParityRow]:
    """`fastattn.attention`: out, lse, the gradients of q, k, v, sinks, and of a bias or float mask that requires grad.

    Arguments as in `fastattn.attention`; dropout needs an explicit dropout_seed. packing: the call is made packed.
    """
    batch, heads, len_q = q.shape[:3]
    full = (batch, heads, len_q, k.size(2))
    terms: dict[str, Bias] = {}
    if isinstance(mask, Tensor) and mask.is_floating_point():
        terms["mask"] = Dense(mask)
    if bias is not None:
        terms["bias"] = Dense(bias) if isinstance(bias, Tensor) else bias
    learned = [name for name, term in terms.items() if term.tensor.requires_grad]
    hidden_by = None if "mask" in terms else mask
    tensors = named(q=q, k=k, v=v, sinks=sinks, **{name: term.tensor for name, term in terms.items()})
    if isinstance(hidden_by, Tensor):
        tensors["mask"] = hidden_by
    inputs = differentiable(tensors, "q", "k", "v", "sinks", *learned)
    numbers: dict[str, Any] = {"scale": scale, "softcap": softcap}

    def dense(name: str, tensor: Tensor) -> Tensor:
        term = terms[name].with_tensor(tensor)
        return term.to_dense(*full) if packing is None else packing.dense_bias(term, full)

    def biases(t: Tensors) -> dict[str, Tensor]:
        return {name: dense(name, t[name]) for name in terms}

    visible = dense_mask(hidden_by, full, q.device) if packing is None else packing.visible(hidden_by, full, q.device)
    for added in biases(tensors).values():
        visible = visible & ~torch.isneginf(added)
    keep = None
    if dropout_p > 0:
        assert dropout_seed is not None, "check_attention draws no seed of its own: pass dropout_seed"
        kept = keep_mask(dropout_seed, dropout_p, batch * heads, len_q, k.size(2)).view(full)
        keep = kept.double() * dropout_scale(dropout_p)
    unseen = ~visible.any(dim=2).any(dim=1)[:, None, :, None]

    def outputs(found: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return dict(zip(("out", "lse"), found, strict=True)) if return_lse else {"out": found[0]}

    def call(t: Tensors) -> dict[str, Any]:
        own = terms["bias"].with_tensor(t["bias"]) if "bias" in terms else None
        return {"mask": t.get("mask", mask), "bias": own, "sinks": t.get("sinks"), **numbers}

    dropout: dict[str, Any] = {"dropout_p": dropout_p, "dropout_seed": dropout_seed}

    def fused(t: Tensors) -> dict[str, Tensor]:
        options = {**call(t), **dropout, "deterministic": deterministic, "backend": backend}
        if packing is not None:
            return outputs(packing.attention(t["q"], t["k"], t["v"], **options))
        found = functional.attention(t["q"], t["k"], t["v"], **options, return_lse=return_lse)
        return outputs(found) if return_lse else {"out": found}

    def truth(t: Tensors) -> dict[str, Tensor]:
        options = call(t)
        if packing is not None:
            added = [a.to(t["q"].dtype) for a in biases(t).values()]
            options |= {"mask": packing.visible(hidden_by, full, q.device), "bias": sum(added) if added else None}
        return outputs(reference.attention(t["q"], t["k"], t["v"], **options, **dropout, return_lse=True))

    def eager(t: Tensors) -> dict[str, Tensor]:
        extras = {"visible": visible, "biases": tuple(biases(t).values()), "sinks": t.get("sinks"), "keep": keep}
        return outputs(eager_attention(t["q"], t["k"], t["v"], **extras, **numbers))

    def magnitudes(t: Tensors, grads: Tensors) -> dict[str, Tensor]:
        leaves = {name: t[name].detach().double().requires_grad_() for name in terms}
        added = biases(leaves)
        extras = {"visible": visible, "biases": added, "sinks": t.get("sinks"), "keep": keep}
        with torch.no_grad():
            found = attention_magnitudes(
                t["q"], t["k"], t["v"], grads.get("out"), grads.get("lse"), **extras, **numbers
            )
        for name, leaf in leaves.items():  # every element of a bias is a multiple of one of its tensor's
            found["d" + name] = torch.autograd.grad(added[name], leaf, found["d" + name])[0].abs()
        return found

    def clean(t: Tensors) -> dict[str, Tensor]:
        return {**t, "k": t["k"].masked_fill(unseen, 0), "v": t["v"].masked_fill(unseen, 0)}

    def form(found: Tensors) -> list[str]:
        out = found["out"]
        wrong = [] if out.dtype == q.dtype else [f"out is {out.dtype}, q {q.dtype}"]
        if not out.transpose(1, 2).is_contiguous():
            wrong.append(f"out has strides {out.stride()} at shape {tuple(out.shape)}, not those of (B,S,H,D) memory")
        if "lse" in found and found["lse"].dtype != torch.float32:
            wrong.append(f"lse is {found['lse'].dtype} instead of float32")
        return wrong + ([] if packing is None else packing.stray)

    probe = Probe(
        dtype=q.dtype,
        fused=fused,
        truth=truth,
        eager=eager,
        magnitudes=magnitudes,
        clean=clean,
        # sinks and lower-dimensional biases have no batch entry or no head to be judged by
        group_dims=lambda name, t: 2 if name in ("out", "lse", "q", "k", "v") else max(0, t.dim() - 2),
        same_layout=frozenset({"q", "k", "v"} if packing is None else ()),
        float32_outputs=frozenset({"lse"}),
        form=form,
    )
    return run_probe(probe, inputs, backend, conditions or Conditions())
