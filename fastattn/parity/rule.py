"""Checks of whole operations under the parity rule; what the tests of every backend call.

Each `check_*` takes the arguments of the public function of that name, runs it through `backend` and returns a
`ParityRow` per quantity (see `fastattn.parity.bound` for the rule and `fastattn.parity.probe` for what is run).
Raises fastattn.NotSupported where the backend refuses the call.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastattn import functional, reference
from fastattn.masks import Mask
from fastattn.parity.bound import ParityRow, parity, unit_roundoff
from fastattn.parity.eager import eager_attention, eager_ffn, eager_gated_ffn, eager_linear_act, eager_norm
from fastattn.parity.histogram import check_mask_histogram
from fastattn.parity.magnitude import (
    attention_magnitudes,
    ffn_magnitudes,
    gated_ffn_magnitudes,
    linear_act_magnitudes,
    near_kink,
    norm_magnitudes,
)
from fastattn.parity.probe import Conditions, Probe, Tensors, run_probe
from fastattn.reference.attention import dense_mask
from fastattn.reference.philox import dropout_scale, keep_mask

__all__ = [
    "Conditions",
    "ParityRow",
    "check_attention",
    "check_ffn",
    "check_gated_ffn",
    "check_linear_act",
    "check_mask_histogram",
    "check_norm",
    "failures",
    "parity",
    "unit_roundoff",
]

DEFAULT = Conditions()


def failures(rows: list[ParityRow]) -> str:
    """The failed rows as text, one per line; empty when all passed. For `assert not failures(rows), ...`."""
    return "\n".join(str(row) for row in rows if not row.passed)


def _named(**tensors: Tensor | None) -> dict[str, Tensor]:
    return {name: t for name, t in tensors.items() if t is not None}


def _differentiable(tensors: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    """The same tensors; the floating ones (those named, or all) as leaves that require grad."""
    return {
        name: t.detach().requires_grad_() if t.is_floating_point() and (not names or name in names) else t
        for name, t in tensors.items()
    }


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    backend: str | None,
    mask: Mask | Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_lse: bool = True,
    deterministic: bool = False,
    conditions: Conditions = DEFAULT,
) -> list[ParityRow]:
    """`fastattn.attention`: out, lse, the gradients of q, k, v, sinks, and of a bias or float mask that requires grad.

    Arguments as in `fastattn.attention`; dropout needs an explicit dropout_seed.
    """
    batch, heads, len_q = q.shape[:3]
    full = (batch, heads, len_q, k.size(2))
    float_mask = isinstance(mask, Tensor) and mask.is_floating_point()
    names = [name for name, t in (("mask", mask), ("bias", bias)) if isinstance(t, Tensor) and t.requires_grad]
    tensors = _named(q=q, k=k, v=v, bias=bias, sinks=sinks, mask=mask if isinstance(mask, Tensor) else None)
    inputs = _differentiable(tensors, "q", "k", "v", "sinks", *names)
    numbers: dict[str, Any] = {"scale": scale, "softcap": softcap}

    visible = dense_mask(None if float_mask else mask, full, q.device)
    for name in ("bias", "mask"):
        if name in tensors and tensors[name].is_floating_point():
            visible = visible & ~torch.isneginf(tensors[name])
    keep = None
    if dropout_p > 0:
        assert dropout_seed is not None, "check_attention draws no seed of its own: pass dropout_seed"
        kept = keep_mask(dropout_seed, dropout_p, batch * heads, len_q, k.size(2)).view(full)
        keep = kept.double() * dropout_scale(dropout_p)
    unseen = ~visible.any(dim=2).any(dim=1)[:, None, :, None]

    def outputs(found: Tensor | tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"out": found} if isinstance(found, Tensor) else dict(zip(("out", "lse"), found, strict=True))

    def call(t: Tensors) -> dict[str, Any]:
        return {"mask": t.get("mask", mask), "bias": t.get("bias"), "sinks": t.get("sinks"), **numbers}

    def dropout() -> dict[str, Any]:
        return {"dropout_p": dropout_p, "dropout_seed": dropout_seed, "return_lse": return_lse}

    def biases(t: Tensors) -> dict[str, Tensor]:
        return {name: t[name] for name in ("bias", "mask") if name in t and t[name].is_floating_point()}

    def fused(t: Tensors) -> dict[str, Tensor]:
        chosen = {"deterministic": deterministic, "backend": backend}
        return outputs(functional.attention(t["q"], t["k"], t["v"], **call(t), **dropout(), **chosen))

    def truth(t: Tensors) -> dict[str, Tensor]:
        return outputs(reference.attention(t["q"], t["k"], t["v"], **call(t), **dropout()))

    def eager(t: Tensors) -> dict[str, Tensor]:
        extras = {"visible": visible, "biases": tuple(biases(t).values()), "sinks": t.get("sinks"), "keep": keep}
        found = eager_attention(t["q"], t["k"], t["v"], **extras, **numbers)
        return outputs(found if return_lse else found[0])

    def magnitudes(t: Tensors, grads: Tensors) -> dict[str, Tensor]:
        extras = {"visible": visible, "biases": biases(t), "sinks": t.get("sinks"), "keep": keep}
        return attention_magnitudes(t["q"], t["k"], t["v"], grads.get("out"), grads.get("lse"), **extras, **numbers)

    def clean(t: Tensors) -> dict[str, Tensor]:
        return {**t, "k": t["k"].masked_fill(unseen, 0), "v": t["v"].masked_fill(unseen, 0)}

    def form(found: Tensors) -> list[str]:
        out = found["out"]
        wrong = [] if out.dtype == q.dtype else [f"out is {out.dtype}, q {q.dtype}"]
        if not out.transpose(1, 2).is_contiguous():
            wrong.append(f"out has strides {out.stride()} at shape {tuple(out.shape)}, not those of (B,S,H,D) memory")
        if "lse" in found and found["lse"].dtype != torch.float32:
            wrong.append(f"lse is {found['lse'].dtype} instead of float32")
        return wrong

    probe = Probe(
        dtype=q.dtype,
        fused=fused,
        truth=truth,
        eager=eager,
        magnitudes=magnitudes,
        clean=clean,
        # sinks and lower-dimensional biases have no batch entry or no head to be judged by
        group_dims=lambda name, t: 2 if name in ("out", "lse", "q", "k", "v") else max(0, t.dim() - 2),
        same_layout=frozenset({"q", "k", "v"}),
        float32_outputs=frozenset({"lse"}),
        form=form,
    )
    return run_probe(probe, inputs, backend, conditions)


def check_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    backend: str | None,
    kind: str = "layer",
    eps: float | None = None,
    offset: float = 0.0,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_residual: bool = True,
    conditions: Conditions = DEFAULT,
) -> list[ParityRow]:
    """`fastattn.layer_norm` (kind "layer") or `fastattn.rms_norm` ("rms"): y, z and the gradients of every input.

    eps None is 1e-5 for layer norm and the machine epsilon of float32 for rms, as in torch, for halves too.
    """
    stands = (1e-5 if kind == "layer" else torch.finfo(torch.float32).eps) if eps is None else eps
    keep = _kept_rows(x, x.size(-1), dropout_p, dropout_seed)
    inputs = _differentiable(_named(x=x, weight=weight, bias=bias, residual=residual))
    wide = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)

    def outputs(found: Tensor | tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"y": found} if isinstance(found, Tensor) else dict(zip(("y", "z"), found, strict=True))

    def call(t: Tensors) -> dict[str, Any]:
        dropout = {"dropout_p": dropout_p, "dropout_seed": dropout_seed}
        return {"residual": t.get("residual"), "return_residual": return_residual, **dropout}

    def fused(t: Tensors) -> dict[str, Tensor]:
        if kind == "rms":
            return outputs(functional.rms_norm(t["x"], t.get("weight"), eps, offset=offset, **call(t)))
        return outputs(functional.layer_norm(t["x"], t.get("weight"), t.get("bias"), stands, **call(t)))

    def truth(t: Tensors) -> dict[str, Tensor]:
        extras = {"kind": kind, "eps": stands, "offset": offset}
        return outputs(reference.norm(t["x"], t.get("weight"), t.get("bias"), **extras, **call(t)))

    def eager(t: Tensors) -> dict[str, Tensor]:
        extras = {"kind": kind, "eps": stands, "offset": offset, "residual": t.get("residual"), "keep": keep}
        y, z = eager_norm(t["x"], t.get("weight"), t.get("bias"), **extras)
        return outputs((y, z) if return_residual else y)

    def magnitudes(t: Tensors, grads: Tensors) -> dict[str, Tensor]:
        extras = {"kind": kind, "eps": stands, "offset": offset, "residual": t.get("residual"), "keep": keep}
        grad_y = grads.get("y", torch.zeros_like(t["x"]))
        return norm_magnitudes(t["x"], t.get("weight"), t.get("bias"), grad_y, grads.get("z"), **extras)

    def form(found: Tensors) -> list[str]:
        wanted = {"y": x.dtype, "z": wide}
        return [f"{n} is {t.dtype} instead of {wanted[n]}" for n, t in found.items() if t.dtype != wanted[n]]

    return run_probe(Probe(x.dtype, fused, truth, eager, magnitudes, form=form), inputs, backend, conditions)


def check_linear_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    backend: str | None,
    conditions: Conditions = DEFAULT,
) -> list[ParityRow]:
    """`fastattn.linear_act`: y and the gradients of x, weight and bias."""

    def settle(t: Tensors, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        return _erase_rows(grads, near_kink(t["x"], t["weight"], t.get("bias"), activation))

    probe = Probe(
        dtype=x.dtype,
        fused=lambda t: {"y": functional.linear_act(t["x"], t["weight"], t.get("bias"), activation)},
        truth=lambda t: {"y": reference.linear_act(t["x"], t["weight"], t.get("bias"), activation)},
        eager=lambda t: {"y": eager_linear_act(t["x"], t["weight"], t.get("bias"), activation)},
        magnitudes=lambda t, g: linear_act_magnitudes(t["x"], t["weight"], t.get("bias"), activation, g["y"]),
        settle=settle,
        form=_dtype_of_x(x),
    )
    return run_probe(probe, _differentiable(_named(x=x, weight=weight, bias=bias)), backend, conditions)


def check_ffn(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str = "gelu",
    *,
    backend: str | None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    conditions: Conditions = DEFAULT,
) -> list[ParityRow]:
    """`fastattn.ffn`: y and the gradients of x, w1, b1, w2 and b2. Dropout needs an explicit dropout_seed."""
    keep = _kept_rows(x, w1.size(0), dropout_p, dropout_seed)
    dropout: dict[str, Any] = {"dropout_p": dropout_p, "dropout_seed": dropout_seed}

    def arguments(t: Tensors) -> tuple[Any, ...]:
        return t["x"], t["w1"], t.get("b1"), t["w2"], t.get("b2"), activation

    def settle(t: Tensors, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        return _erase_rows(grads, near_kink(t["x"], t["w1"], t.get("b1"), activation))

    probe = Probe(
        dtype=x.dtype,
        fused=lambda t: {"y": functional.ffn(*arguments(t), **dropout)},
        truth=lambda t: {"y": reference.ffn(*arguments(t), **dropout)},
        eager=lambda t: {"y": eager_ffn(*arguments(t), keep)},
        magnitudes=lambda t, g: ffn_magnitudes(*arguments(t), g["y"], keep),
        settle=settle,
        form=_dtype_of_x(x),
    )
    return run_probe(probe, _differentiable(_named(x=x, w1=w1, b1=b1, w2=w2, b2=b2)), backend, conditions)


def check_gated_ffn(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    activation: str = "silu",
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    *,
    backend: str | None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    conditions: Conditions = DEFAULT,
) -> list[ParityRow]:
    """`fastattn.gated_ffn`: y and the gradients of all seven inputs. Dropout needs an explicit dropout_seed."""
    keep = _kept_rows(x, w_gate.size(0), dropout_p, dropout_seed)
    dropout: dict[str, Any] = {"dropout_p": dropout_p, "dropout_seed": dropout_seed}

    def arguments(t: Tensors) -> tuple[Any, ...]:
        weights = t["w_gate"], t["w_up"], t["w_down"]
        return t["x"], *weights, activation, t.get("b_gate"), t.get("b_up"), t.get("b_down")

    def settle(t: Tensors, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        return _erase_rows(grads, near_kink(t["x"], t["w_gate"], t.get("b_gate"), activation))

    probe = Probe(
        dtype=x.dtype,
        fused=lambda t: {"y": functional.gated_ffn(*arguments(t), **dropout)},
        truth=lambda t: {"y": reference.gated_ffn(*arguments(t), **dropout)},
        eager=lambda t: {"y": eager_gated_ffn(*arguments(t), keep)},
        magnitudes=lambda t, g: gated_ffn_magnitudes(*arguments(t), g["y"], keep),
        settle=settle,
        form=_dtype_of_x(x),
    )
    tensors = _named(x=x, w_gate=w_gate, w_up=w_up, w_down=w_down, b_gate=b_gate, b_up=b_up, b_down=b_down)
    return run_probe(probe, _differentiable(tensors), backend, conditions)


def _kept_rows(x: Tensor, columns: int, dropout_p: float, dropout_seed: Tensor | None) -> Tensor | None:
    """The dropout multiplier (..., columns) of the rows of x (..., K) in float64, None without dropout."""
    if dropout_p == 0.0:
        return None
    assert dropout_seed is not None, "a check draws no seed of its own: pass dropout_seed"
    kept = keep_mask(dropout_seed, dropout_p, 1, math.prod(x.shape[:-1]), columns)
    return kept.view(*x.shape[:-1], columns).double() * dropout_scale(dropout_p)


def _erase_rows(grads: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    return {name: grad.masked_fill(rows.unsqueeze(-1), 0) for name, grad in grads.items()}


def _dtype_of_x(x: Tensor) -> Any:
    def form(found: Tensors) -> list[str]:
        return [f"{n} is {t.dtype}, x {x.dtype}" for n, t in found.items() if t.dtype != x.dtype]

    return form
