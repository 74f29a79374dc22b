"""`encoder_layer`: a whole transformer encoder layer as one call, for inference."""

from __future__ import annotations

import math
from typing import NoReturn

import torch
from torch import Tensor

from fastattn.functional import direct
from fastattn.functional.attention import MAX_HEAD_DIM, lower_mask_and_bias
from fastattn.functional.checks import (
    check_activation,
    check_beside,
    check_cu_seqlens,
    check_eps,
    check_flag,
    check_number,
    check_shape,
    check_tensor,
    resolve_backend,
)
from fastattn.masks import LoweredMask, Mask
from fastattn.masks.arguments import whole
from fastattn.masks.lowered import NOTHING_HIDDEN, Size, flatten
from fastattn.ops.encoder_layer import encoder_layer_forward
from fastattn.ops.library import invoke, would_be_differentiated


def encoder_layer(
    x: Tensor,
    wq: Tensor,
    bq: Tensor | None,
    wk: Tensor,
    bk: Tensor | None,
    wv: Tensor,
    bv: Tensor | None,
    wo: Tensor,
    bo: Tensor | None,
    norm1_weight: Tensor | None,
    norm1_bias: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    norm2_weight: Tensor | None,
    norm2_bias: Tensor | None,
    *,
    heads: int,
    activation: str | None = "gelu",
    norm_first: bool = False,
    eps1: float = 1e-5,
    eps2: float = 1e-5,
    mask: Mask | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """A transformer encoder layer (Vaswani et al. 2017) in inference, without its intermediate tensors in memory.

        norm last    h = norm1(x + attend(x) wo^T + bo)           y = norm2(h + act(h w1^T + b1) w2^T + b2)
        norm first   h = x + attend(norm1(x)) wo^T + bo           y = h + act(norm2(h) w1^T + b1) w2^T + b2

    attend(z) is softmax attention over `heads` heads with q = z wq^T + bq, k = z wk^T + bk and v = z wv^T + bv.

    Args:
        x: (B, S, E), or packed (T, E) with cu_seqlens; float32, bfloat16, float16 (float64 on the reference backend),
            any strides.
        wq, wk, wv, wo, bq, bk, bv, bo: (E, E) and (E,) in x's dtype; E % heads == 0. Rows of one in_proj_weight will
            do. Every bias may be None.
        norm1_weight, norm1_bias, norm2_weight, norm2_bias: (E,) in x's dtype or float32, or None.
        w1, b1, w2, b2: (F, E), (F,), (E, F) and (E,) in x's dtype.
        activation: relu, gelu (by erf), gelu_tanh, silu, quick_gelu, relu2, or None.
        norm_first: where the norms stand, as in nn.TransformerEncoderLayer.
        eps1, eps2: added to the variances, not negative.
        mask: as in `attention` for q, k (B, heads, S, ...), but for float tensors: which keys a query sees.
        cu_seqlens: int32 (N + 1) on x's device: row bounds of N sequences that follow each other in x, 0 first, T last.
            Every query sees all keys of its own sequence; there is no mask beside it.
        scale: factor of the scores, 1 / sqrt(E / heads) by default.
        backend: the backend's name; None takes that of `use_backend`, or the first that supports the call.

    Returns:
        y of x's shape and dtype, contiguous. A query that sees no key gets 0 from the attention.

    Raises:
        TypeError, ValueError: a wrong argument; the text names it, its value and the remedy.
        RuntimeError: a gradient would be needed, or the call is under a transform of torch.func.
        NotSupported: the backend asked for does not run this call.

    There is no backward and no dropout: for training call the parts (`linear_act`, `attention`, `layer_norm`, `ffn`).
    Under autocast it runs in x's own dtype.
    """
    weights = (wq, bq, wk, bk, wv, bv, wo, bo, norm1_weight, norm1_bias, w1, b1, w2, b2, norm2_weight, norm2_bias)
    calls = direct.calls(backend) if cu_seqlens is None else None
    if calls is not None:
        y = calls.direct_encoder_layer(x, *weights, heads, activation, norm_first, eps1, eps2, mask, scale)
        if y is not None:
            return y
    name = check_activation(activation)
    features = _check_x(x, packed=cu_seqlens is not None)
    heads = _check_heads(heads, features)
    _check_projections(x, (wq, wk, wv, wo), (bq, bk, bv, bo))
    _check_ffn(x, w1, b1, w2, b2)
    _check_norms(x, norm1_weight, norm1_bias, norm2_weight, norm2_bias)
    check_flag("norm_first", norm_first)
    eps1, eps2 = check_eps("eps1", eps1), check_eps("eps2", eps2)
    scale = 1.0 / math.sqrt(features // heads) if scale is None else check_number("scale", scale)
    lowered = NOTHING_HIDDEN
    if cu_seqlens is not None:
        if mask is not None:
            raise ValueError(
                "mask is given beside cu_seqlens: pass padded (B, S, E) with a mask, or packed rows without"
            )
        check_cu_seqlens("cu_seqlens", cu_seqlens, "x", x)
    elif mask is not None:
        lowered = _lower(mask, x, heads)
    if would_be_differentiated(x, *weights):
        _refuse_gradients()
    return invoke(
        encoder_layer_forward,
        x,
        *weights,
        cu_seqlens,
        *flatten(lowered),
        heads,
        scale,
        name,
        norm_first,
        eps1,
        eps2,
        resolve_backend(backend),
    )


def _check_heads(heads: int, features: int) -> int:
    number = whole(heads)
    if number is None:
        raise TypeError(f"heads={heads!r} is a {type(heads).__name__}: pass the number of attention heads")
    if number < 1 or features % number != 0 or not 1 <= features // number <= MAX_HEAD_DIM:
        raise ValueError(
            f"heads={heads} does not cut x's {features} features into heads: pass a divisor of {features} with "
            f"at most {MAX_HEAD_DIM} features to a head"
        )
    return number


def _check_x(x: Tensor, packed: bool) -> int:
    """The number of features."""
    check_tensor("x", x)
    if x.dim() != (2 if packed else 3):
        raise ValueError(
            f"x has {x.dim()} dimensions, shape {tuple(x.shape)}: pass (batch, length, features), or packed rows "
            "(T, features) together with cu_seqlens"
        )
    return x.shape[-1]


def _check_projections(x: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...]) -> None:
    features = x.shape[-1]
    for letter, weight, bias in zip("qkvo", weights, biases, strict=True):
        _check_weight(x, "w" + letter, weight, (features, features))
        _check_bias(x, "b" + letter, bias)


def _check_ffn(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> None:
    features = x.shape[-1]
    check_tensor("w1", w1)
    if w1.dim() != 2:
        raise ValueError(f"w1 has shape {tuple(w1.shape)}: pass (F, {features})")
    hidden = w1.shape[0]
    _check_weight(x, "w1", w1, (hidden, features))
    _check_weight(x, "w2", w2, (features, hidden))
    if b1 is not None:
        check_beside("b1", b1, "x", x, float32_too=False)
        check_shape("b1", b1, (hidden,), "one element per row of w1")
    _check_bias(x, "b2", b2)


def _check_weight(x: Tensor, name: str, weight: Tensor, shape: tuple[int, int]) -> None:
    check_beside(name, weight, "x", x, float32_too=False)
    check_shape(name, weight, shape, "out features by in features as nn.Linear stores it")


def _check_bias(x: Tensor, name: str, bias: Tensor | None) -> None:
    if bias is not None:
        check_beside(name, bias, "x", x, float32_too=False)
        check_shape(name, bias, x.shape[-1:], "one element per feature of x")


def _check_norms(x: Tensor, *values: Tensor | None) -> None:
    for name, value in zip(("norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias"), values, strict=True):
        if value is not None:
            check_beside(name, value, "x", x)
            check_shape(name, value, x.shape[-1:], "one element per feature of x")


def _lower(mask: Mask | Tensor, x: Tensor, heads: int) -> LoweredMask:
    if isinstance(mask, Tensor) and mask.dtype not in (torch.bool, torch.int32):
        remedy = (
            "mask == 0 for one of 0 and -inf; attention(mask=...) takes a float mask to add"
            if mask.is_floating_point()
            else "mask.bool() makes one of zeros and ones"
        )
        raise TypeError(f"mask has dtype {mask.dtype}: pass a bool tensor, True where visible ({remedy})")
    return lower_mask_and_bias(mask, None, Size(x.shape[0], heads, x.shape[1], x.shape[1]), x)[0]


def _refuse_gradients() -> NoReturn:
    raise RuntimeError(
        "encoder_layer has no backward, and here a gradient would be needed (or a transform of torch.func is active): "
        "call it under torch.no_grad() or torch.inference_mode(), or call linear_act, attention, layer_norm and ffn"
    )
