"""Checks of whole operations under the parity rule; what the tests of every backend call.

Each `check_*` takes the arguments of the public function of that name, runs it through `backend` and returns a
`ParityRow` per quantity (see `fastattn.parity.bound` for the rule and `fastattn.parity.probe` for what is run).
Raises fastattn.NotSupported where the backend refuses the call.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastattn import functional, reference
from fastattn.masks import Mask
from fastattn.parity.attention import check_attention
from fastattn.parity.bound import ParityRow, parity, unit_roundoff
from fastattn.parity.eager import (
    eager_encoder_layer,
    eager_ffn,
    eager_gated_ffn,
    eager_linear_act,
    eager_norm,
)
from fastattn.parity.histogram import check_mask_histogram
from fastattn.parity.magnitude import (
    encoder_layer_magnitudes,
    ffn_magnitudes,
    gated_ffn_magnitudes,
    linear_act_magnitudes,
    near_kink,
    norm_magnitudes,
)
from fastattn.parity.probe import Conditions, Probe, Tensors, differentiable, named, run_probe
from fastattn.reference.attention import dense_mask
from fastattn.reference.philox import dropout_scale, keep_mask

__all__ = [
    "Conditions",
    "ParityRow",
    "check_attention",
    "check_encoder_layer",
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
    inputs = differentiable(named(x=x, weight=weight, bias=bias, residual=residual))
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
    return run_probe(probe, differentiable(named(x=x, weight=weight, bias=bias)), backend, conditions)


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
    return run_probe(probe, differentiable(named(x=x, w1=w1, b1=b1, w2=w2, b2=b2)), backend, conditions)


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
    tensors = named(x=x, w_gate=w_gate, w_up=w_up, w_down=w_down, b_gate=b_gate, b_up=b_up, b_down=b_down)
    return run_probe(probe, differentiable(tensors), backend, conditions)


def _kept_rows(x: Tensor, columns: int, dropout_p: float, dropout_seed: Tensor | None) -> Tensor | None:
    """The dropout multiplier (..., columns) of the rows of x (..., K) in float64, None without dropout."""
    if dropout_p == 0.0:
        return None
    assert dropout_seed is not None, "a check draws no seed of its own: pass dropout_seed"
    kept = keep_mask(dropout_seed, dropout_p, 1, math.prod(x.shape[:-1]), columns)
    return kept.view(*x.shape[:-1], columns).double() * dropout_scale(dropout_p)


def check_encoder_layer(
    tensors: dict[str, Tensor],
    *,
    backend: str | None,
    heads: int,
    activation: str | None = "gelu",
    norm_first: bool = False,
    eps1: float = 1e-5,
    eps2: float = 1e-5,
    mask: Mask | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    conditions: Conditions = DEFAULT,
) -> list[ParityRow]:
    """`fastattn.encoder_layer`: y; it has no gradients. tensors: x and the weights and biases there are, by name."""
    x = tensors["x"]
    numbers: dict[str, Any] = {
        "heads": heads,
        "activation": activation,
        "norm_first": norm_first,
        "eps1": eps1,
        "eps2": eps2,
        "scale": scale,
    }
    if cu_seqlens is None:
        visible = dense_mask(mask, (x.size(0), heads, x.size(1), x.size(1)), x.device)
    else:  # one sample, in which a token sees those of its own sequence
        owner = torch.bucketize(torch.arange(x.size(0), device=x.device), cu_seqlens[1:].to(x.device), right=True)
        visible = (owner[:, None] == owner).expand(1, heads, -1, -1)
    extras = {"mask": mask} if isinstance(mask, Tensor) else {}
    if cu_seqlens is not None:
        extras["cu_seqlens"] = cu_seqlens

    def batched(t: Tensors) -> dict[str, Tensor]:
        return {**t, "x": t["x"] if cu_seqlens is None else t["x"][None]}

    def flat(y: Tensor) -> dict[str, Tensor]:
        return {"y": y if cu_seqlens is None else y[0]}

    def arguments(t: Tensors) -> dict[str, Any]:
        missing = dict.fromkeys(_LAYER_OPTIONAL - t.keys())
        return {**missing, **t, "mask": t.get("mask", mask), **numbers}

    probe = Probe(
        dtype=x.dtype,
        fused=lambda t: {"y": functional.encoder_layer(**arguments(t))},
        truth=lambda t: {"y": reference.encoder_layer(**arguments(t))},
        eager=lambda t: flat(eager_encoder_layer(batched(t), visible=visible, **numbers)),
        magnitudes=lambda t, _: flat(encoder_layer_magnitudes(batched(t), visible=visible, **numbers)),
        form=_dtype_of_x(x),
    )
    return run_probe(probe, {**tensors, **extras}, backend, replace(conditions, grad=False))


_LAYER_OPTIONAL = frozenset(
    [f"b{n}" for n in ("q", "k", "v", "o", "1", "2")]
    + [f"norm{n}_{name}" for n in (1, 2) for name in ("weight", "bias")]
)


def _erase_rows(grads: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    return {name: grad.masked_fill(rows.unsqueeze(-1), 0) for name, grad in grads.items()}


def _dtype_of_x(x: Tensor) -> Any:
    def form(found: Tensors) -> list[str]:
        return [f"{n} is {t.dtype}, x {x.dtype}" for n, t in found.items() if t.dtype != x.dtype]

    return form
