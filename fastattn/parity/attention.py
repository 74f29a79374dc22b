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
    call = _Call(
        q,
        k,
        v,
        mask,
        bias,
        sinks,
        {"scale": scale, "softcap": softcap},
        {"dropout_p": dropout_p, "dropout_seed": dropout_seed},
        {"deterministic": deterministic, "backend": backend},
        return_lse,
        packing,
    )
    probe = Probe(
        dtype=q.dtype,
        fused=call.fused,
        truth=call.truth,
        eager=call.eager,
        magnitudes=call.magnitudes,
        clean=call.clean,
        # sinks and lower-dimensional biases have no batch entry or no head to be judged by
        group_dims=lambda name, t: 2 if name in ("out", "lse", "q", "k", "v") else max(0, t.dim() - 2),
        same_layout=frozenset({"q", "k", "v"} if packing is None else ()),
        float32_outputs=frozenset({"lse"}),
        form=call.form,
    )
    return run_probe(probe, call.inputs, backend, conditions or Conditions())


class _Call:
    """One call as the computations of a probe, each from the tensors that it may vary.

    numbers, dropout, how: arguments of the formula, of the dropout, and of the kernels alone. inputs: the tensors, by
    name; those that get a gradient as leaves. A float mask is a second bias.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Mask | Tensor | None,
        bias: Bias | Tensor | None,
        sinks: Tensor | None,
        numbers: dict[str, Any],
        dropout: dict[str, Any],
        how: dict[str, Any],
        return_lse: bool,
        packing: Packing | None,
    ) -> None:
        self.mask, self.numbers, self.dropout, self.how = mask, numbers, dropout, how
        self.return_lse, self.packing, self.dtype = return_lse, packing, q.dtype
        self.full = (*q.shape[:3], k.size(2))
        self.terms: dict[str, Bias] = {}
        if isinstance(mask, Tensor) and mask.is_floating_point():
            self.terms["mask"] = Dense(mask)
        if bias is not None:
            self.terms["bias"] = Dense(bias) if isinstance(bias, Tensor) else bias
        hidden_by = None if "mask" in self.terms else mask
        added = {name: term.tensor for name, term in self.terms.items()}
        tensors = named(q=q, k=k, v=v, sinks=sinks, **added)
        if isinstance(hidden_by, Tensor):
            tensors["mask"] = hidden_by
        learned = [name for name, tensor in added.items() if tensor.requires_grad]
        self.inputs = differentiable(tensors, "q", "k", "v", "sinks", *learned)

        self.unhidden = (
            dense_mask(hidden_by, self.full, q.device)
            if packing is None
            else packing.visible(hidden_by, self.full, q.device)
        )
        self.visible = self.unhidden
        for tensor in self._biases(tensors).values():
            self.visible = self.visible & ~torch.isneginf(tensor)
        self.unseen = ~self.visible.any(dim=2).any(dim=1)[:, None, :, None]
        self.keep = self._keep()

    def fused(self, t: Tensors) -> dict[str, Tensor]:
        options = {**self._options(t), **self.dropout, **self.how}
        if self.packing is not None:
            return self._named(self.packing.attention(t["q"], t["k"], t["v"], **options))
        found = functional.attention(t["q"], t["k"], t["v"], **options, return_lse=self.return_lse)
        return self._named(found) if self.return_lse else {"out": found}

    def truth(self, t: Tensors) -> dict[str, Tensor]:
        options = self._options(t)
        if self.packing is not None:
            added = [a.to(t["q"].dtype) for a in self._biases(t).values()]
            options |= {"mask": self.unhidden, "bias": sum(added) if added else None}
        return self._named(reference.attention(t["q"], t["k"], t["v"], **options, **self.dropout, return_lse=True))

    def eager(self, t: Tensors) -> dict[str, Tensor]:
        biases = tuple(self._biases(t).values())
        return self._named(eager_attention(t["q"], t["k"], t["v"], biases=biases, **self._seen(t), **self.numbers))

    def magnitudes(self, t: Tensors, grads: Tensors) -> dict[str, Tensor]:
        leaves = {name: t[name].detach().double().requires_grad_() for name in self.terms}
        biases = self._biases(leaves)
        with torch.no_grad():
            found = attention_magnitudes(
                t["q"],
                t["k"],
                t["v"],
                grads.get("out"),
                grads.get("lse"),
                biases=biases,
                **self._seen(t),
                **self.numbers,
            )
        for name, leaf in leaves.items():  # every element of a bias is a multiple of one of its tensor's
            found["d" + name] = torch.autograd.grad(biases[name], leaf, found["d" + name])[0].abs()
        return found

    def clean(self, t: Tensors) -> dict[str, Tensor]:
        return {**t, **{name: t[name].masked_fill(self.unseen, 0) for name in "kv"}}

    def form(self, found: Tensors) -> list[str]:
        out = found["out"]
        wrong = [] if out.dtype == self.dtype else [f"out is {out.dtype}, q {self.dtype}"]
        if not out.transpose(1, 2).is_contiguous():
            wrong.append(f"out has strides {out.stride()} at shape {tuple(out.shape)}, not those of (B,S,H,D) memory")
        if "lse" in found and found["lse"].dtype != torch.float32:
            wrong.append(f"lse is {found['lse'].dtype} instead of float32")
        return wrong + ([] if self.packing is None else self.packing.stray)

    def _keep(self) -> Tensor | None:
        """The factors of the dropout, 0 or 1 / (1 - p)."""
        p, seed = self.dropout["dropout_p"], self.dropout["dropout_seed"]
        if p == 0:
            return None
        assert seed is not None, "check_attention draws no seed of its own: pass dropout_seed"
        batch, heads, len_q, len_k = self.full
        return keep_mask(seed, p, batch * heads, len_q, len_k).view(self.full).double() * dropout_scale(p)

    def _biases(self, t: Tensors) -> dict[str, Tensor]:
        """Each term of the bias in full."""
        own = {name: term.with_tensor(t[name]) for name, term in self.terms.items()}
        if self.packing is None:
            return {name: term.to_dense(*self.full) for name, term in own.items()}
        return {name: self.packing.dense_bias(term, self.full) for name, term in own.items()}

    def _options(self, t: Tensors) -> dict[str, Any]:
        bias = self.terms["bias"].with_tensor(t["bias"]) if "bias" in self.terms else None
        return {"mask": t.get("mask", self.mask), "bias": bias, "sinks": t.get("sinks"), **self.numbers}

    def _seen(self, t: Tensors) -> dict[str, Any]:
        return {"visible": self.visible, "sinks": t.get("sinks"), "keep": self.keep}

    def _named(self, found: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return dict(zip(("out", "lse"), found, strict=True)) if self.return_lse else {"out": found[0]}
