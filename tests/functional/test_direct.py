"""The short way to the CPU's kernels answers as the long way does, to the bit, or not at all."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastattn
from fastattn.backends import cpu
from fastattn.functional import direct
from fastattn.masks import Causal, KeyLengths

pytestmark = pytest.mark.skipif(
    direct._opened() is None, reason="no native CPU library, or a torch older than 2.10, whose tensors it cannot read"
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = (None, "relu", "gelu", "gelu_tanh", "silu", "quick_gelu", "relu2")
Call = Callable[[], Any]


def both_ways(call: Call, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    short = call()
    with monkeypatch.context() as patch:
        patch.setattr(direct, "calls", lambda *args: None)
        return short, call()


def agree(short: Any, long: Any) -> None:
    for a, b in zip(short, long, strict=True) if isinstance(short, tuple) else ((short, long),):
        assert a.dtype is b.dtype and a.shape == b.shape and a.stride() == b.stride()
        assert a.requires_grad == b.requires_grad and a.is_inference() == b.is_inference()
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


# ---- the same answers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", cpu.available_isas() if cpu.unavailable_reason() is None else [])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms(isa, dtype, taken, monkeypatch):
    for shape in ((7,), (3, 16), (2, 1, 5, 33), (1, 1, 64)):
        width = shape[-1]
        for other in {dtype, torch.float32}:
            x, weight, bias = randn(*shape, dtype=dtype), randn(width, dtype=other), randn(width, dtype=dtype)
            residual = randn(*shape, dtype=other)
            calls: list[Call] = [
                lambda x=x: fastattn.rms_norm(x),
                lambda x=x, w=weight: fastattn.rms_norm(x, w, 1e-6, offset=1.0),
                lambda x=x, w=weight, b=bias: fastattn.layer_norm(x, w, b),
                lambda x=x, b=bias, r=residual: fastattn.layer_norm(x, None, b, 1e-3, residual=r),
                lambda x=x, w=weight, r=residual: fastattn.rms_norm(x, w, residual=r, return_residual=True),
                lambda x=x, w=weight: fastattn.layer_norm(x, w, return_residual=True),
            ]
            with cpu.use_isa(isa):
                for call in calls:
                    agree(*both_ways(call, monkeypatch))
            assert taken == ["norm"] * len(calls)
            taken.clear()


@pytest.mark.parametrize("isa", cpu.available_isas() if cpu.unavailable_reason() is None else [])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linears(isa, dtype, taken, monkeypatch):
    w1, b1 = nn.Parameter(randn(48, 24, dtype=dtype), requires_grad=False), randn(48, dtype=dtype)
    w2, b2 = randn(48, 40, dtype=dtype).t(), randn(40, dtype=dtype)  # (40, 48), kept transposed
    for n, activation in enumerate(ACTIVATIONS):
        x = randn(*((2, 3, 24), (1, 24), (40, 24), (24,))[n % 4], dtype=dtype)
        calls: list[Call] = [
            functools.partial(fastattn.linear_act, x, w1, None if n % 2 else b1, activation),
            functools.partial(fastattn.ffn, x, w1, b1, w2, None if n % 2 else b2, activation),
            functools.partial(fastattn.gated_ffn, x, w1, w1 * 2, w2, activation, None if n % 2 else b1, b1, None),
        ]
        with cpu.use_isa(isa):
            for call in calls:
                agree(*both_ways(call, monkeypatch))
    assert taken == ["linear_act", "ffn", "gated_ffn"] * len(ACTIVATIONS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("len_q", [1, 2, 8, 9, 40])
def test_attention(dtype, len_q, taken, monkeypatch):
    k, v = randn(2, 2, 40, 16, dtype=dtype), randn(2, 40, 2, 24, dtype=dtype).transpose(1, 2)
    q = randn(2, len_q, 6, 16, dtype=dtype).transpose(1, 2)
    agree(*both_ways(lambda: fastattn.attention(q, k, v), monkeypatch))
    agree(*both_ways(lambda: fastattn.attention(q, k, k[..., :8], scale=0.3), monkeypatch))
    agree(*both_ways(lambda: fastattn.attention(q, k, v, mask=Causal()), monkeypatch))
    agree(*both_ways(lambda: fastattn.attention(q, k, v, mask=Causal("top-left")), monkeypatch))
    for shape in ((2, 6, len_q, 40), (2, 1, 1, 40), (1, 6, len_q, 1), (len_q, 40), (40,)):
        for bias_dtype in {dtype, torch.float32}:
            bias = randn(*shape, dtype=bias_dtype)
            agree(*both_ways(lambda bias=bias: fastattn.attention(q, k, v, mask=bias), monkeypatch))
            assert taken.pop() == "attention"
        bias = torch.where(randn(*shape) > 0.5, -math.inf, randn(*shape))
        agree(*both_ways(lambda bias=bias: fastattn.attention(q, k, v, mask=bias), monkeypatch))
        assert taken.pop() == "attention"
        agree(*both_ways(lambda bias=bias: fastattn.attention(q, k, v, mask=bias > 0), monkeypatch))
        assert taken.pop() == "attention"
    assert taken == ["attention"] * 4
    if len_q > 8:
        return
    start = torch.randint(0, 20, (2, 1, len_q, 1), dtype=torch.int32)
    ranges = torch.cat([start, start + torch.randint(0, 30, start.shape, dtype=torch.int32)], -1).clamp(max=40)
    for mask in (ranges, ranges[:1], ranges.expand(2, 6, len_q, 2)):
        agree(*both_ways(lambda mask=mask: fastattn.attention(q, k, v, mask=mask), monkeypatch))
    assert taken == ["attention"] * 7


@pytest.mark.parametrize("isa", cpu.available_isas() if cpu.unavailable_reason() is None else [])
@pytest.mark.parametrize("len_k", [1, 8, 50, 900])
def test_bools_over_a_cache(isa, len_k, taken, monkeypatch):
    """Few queries, whose long way makes a bias of the mask; what it hides may be NaN."""
    q, k, v = randn(2, 4, 3, 40), randn(2, 2, len_k, 40), randn(2, 2, len_k, 24)
    seen = torch.rand(2, 1, 1, len_k) > 0.4
    seen[0] = False  # nothing at all
    k, v = (torch.where(seen.transpose(2, 3), t, math.nan) for t in (k, v))
    numbers = k.nan_to_num(), v.nan_to_num()
    every_other = torch.rand(4, 3, 2 * len_k)[..., ::2] > 0.5
    with cpu.use_isa(isa):
        for queries in (q[:, :, :1], q) if len_k >= 3 else (q[:, :, :1],):
            for mask in (seen, seen & every_other[:, : queries.shape[2]], seen.expand(2, 4, queries.shape[2], len_k)):
                short, long = both_ways(lambda q=queries, m=mask: fastattn.attention(q, k, v, mask=m), monkeypatch)
                agree(short, long)
                assert short.isfinite().all() and (short[0] == 0).all() and taken.pop() == "attention"
            apart = (torch.rand(len_k, queries.shape[2]) > 0.5).t()
            agree(*both_ways(lambda q=queries, m=apart: fastattn.attention(q, *numbers, mask=m), monkeypatch))
            assert taken.pop() == "attention"


@pytest.mark.parametrize("dtype", DTYPES)
def test_sdpa(dtype, taken, monkeypatch):
    sdpa = fastattn.scaled_dot_product_attention
    q, k = randn(2, 4, 20, 16, dtype=dtype), randn(2, 4, 20, 16, dtype=dtype)
    for call in (
        lambda: sdpa(q, k, k),
        lambda: sdpa(q, k, k, is_causal=True, scale=0.5),
        lambda: sdpa(q[:, :, :12], k, k, is_causal=True),
        lambda: sdpa(q, k, k, torch.ones(20, 20, dtype=torch.bool).tril()),
        lambda: sdpa(q, k, k, randn(4, 1, 20)),
        lambda: sdpa(q, k[:, :2], k[:, :2], enable_gqa=True),
    ):
        short, long = both_ways(lambda call=call: (torch.manual_seed(0), call())[1], monkeypatch)
        agree(short, long)
        assert taken.pop() == "attention" and not taken
    agree(*both_ways(lambda: sdpa(q, k[:, :1], k[:, :1]), monkeypatch))  # broadcast, not grouped
    agree(*both_ways(lambda: sdpa(q[0], k[0], k[0]), monkeypatch))  # made one of four dimensions
    assert taken == ["attention"] * 2
    taken.clear()
    for wrong in (
        lambda: sdpa(q, k[:, :2], k[:, :2]),
        lambda: sdpa(q, k, k, torch.zeros(2, 1, 20, 2, dtype=torch.int32)),
        lambda: sdpa(q, k, k, [[True]]),
        lambda: sdpa(q, k, k, scale="0.5"),
        lambda: sdpa(q, k, k, torch.ones(20, dtype=torch.bool)),
        lambda: sdpa(q, k, k, randn(20, dtype=dtype)),
    ):
        with pytest.raises((RuntimeError, TypeError, IndexError)):
            wrong()
    assert not taken


def _layer(dtype: torch.dtype, embed: int = 24, hidden: int = 40) -> list[Tensor]:
    """The weights and biases of an encoder layer."""
    square, features = (embed, embed), (embed,)
    attention = [square, features] * 4
    shapes = [*attention, features, features, (hidden, embed), (hidden,), (embed, hidden), *[features] * 3]
    return [randn(*shape, dtype=dtype) / 4 for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES)
def test_encoder_layer(dtype, taken, monkeypatch):
    x, weights = randn(2, 7, 24, dtype=dtype), _layer(dtype)
    without = [None if t.dim() == 1 else t for t in weights]
    mixed = [t.float() if i in (8, 15) else t for i, t in enumerate(weights)]
    seen = randn(2, 1, 1, 7) > 0
    options: list[dict[str, Any]] = [
        {},
        {"norm_first": True, "activation": "relu", "eps1": 1e-3, "scale": 0.3},
        {"mask": seen},
        {"mask": (randn(2, 3, 7, 7) > 0), "norm_first": True},
    ]
    for case in (weights, without, mixed):
        for option in options:
            call = functools.partial(fastattn.encoder_layer, x, *case, heads=3, **option)
            agree(*both_ways(call, monkeypatch))
            assert taken.pop() == "encoder_layer" and not taken
    strided = [randn(2 * t.shape[0], *t.shape[1:], dtype=dtype)[::2] for t in weights]
    for case, option in ((weights, {"mask": KeyLengths([7, 3])}), (weights, {"eps1": 0}), (strided, {})):
        agree(*both_ways(functools.partial(fastattn.encoder_layer, x, *case, heads=3, **option), monkeypatch))
        assert not taken
    bounds = torch.tensor([0, 7, 14], dtype=torch.int32)
    packed = fastattn.encoder_layer(x.flatten(0, 1), *weights, heads=3, cu_seqlens=bounds)
    agree(packed.view_as(x), fastattn.encoder_layer(x, *weights, heads=3))
    assert taken == ["encoder_layer"]


def test_an_encoder_layer_that_does_not_fit():
    x, weights, module = randn(2, 7, 24), _layer(torch.float32), direct._opened()
    assert module is not None
    last = (3, "gelu", False, 1e-5, 1e-5, None, None)
    assert module.direct_encoder_layer(x, *weights, *last) is not None
    for i, weight in enumerate(weights):
        for wrong in (weight[1:], weight[None], weight.bfloat16(), weight.clone().requires_grad_(), weight.double()):
            assert module.direct_encoder_layer(x, *weights[:i], wrong, *weights[i + 1 :], *last) is None
    for i, wrong in enumerate((5, "swish", None, -1.0, math.nan, randn(7), "0.5")):
        assert module.direct_encoder_layer(x, *weights, *last[:i], wrong, *last[i + 1 :]) is None
    for bad in (x[0], x[:, :, :20], x.transpose(0, 1), x.half(), x[:0]):
        assert module.direct_encoder_layer(bad, *weights, *last) is None
    with pytest.raises(RuntimeError, match="no backward"):
        fastattn.encoder_layer(randn(2, 7, 24), *[t.requires_grad_() for t in weights], heads=3)


@pytest.mark.parametrize("norm_first", [1, None, torch.tensor(True), "no"])
def test_an_encoder_layer_whose_norm_first_is_no_bool(norm_first, taken):
    x, weights = randn(2, 7, 24), _layer(torch.float32)
    with pytest.raises(TypeError, match=r"norm_first=.* pass True or False"):
        fastattn.encoder_layer(x, *weights, heads=3, norm_first=norm_first)
    assert not taken


def test_dimensions_of_one_element_may_have_any_stride(taken, monkeypatch):
    x, weights = randn(1, 5, 24)[:, -1:], _layer(torch.float32)  # the last of several tokens
    assert x.is_contiguous() and x.stride() == (120, 24, 1)
    for call in (
        lambda: fastattn.rms_norm(x),
        lambda: fastattn.layer_norm(x, residual=x, return_residual=True),
        lambda: fastattn.ffn(x, weights[0], None, weights[2], None),
        lambda: fastattn.encoder_layer(x, *weights, heads=3),
    ):
        agree(*both_ways(call, monkeypatch))
    assert taken == ["norm", "norm", "ffn", "encoder_layer"]


def test_more_queries_than_keys_and_rows_far_apart(taken, monkeypatch):
    q, far = randn(1, 2, 300, 16), randn(1, 300, 2, 16).transpose(1, 2)
    agree(*both_ways(lambda: fastattn.attention(q[:, :, :5], far[:, :, :3], far[:, :, :3]), monkeypatch))
    assert taken == ["attention"]
    agree(*both_ways(lambda: fastattn.attention(q, q, q), monkeypatch))
    assert taken == ["attention"] * 2
    agree(*both_ways(lambda: fastattn.attention(q, far, q), monkeypatch))  # the long way makes copies
    assert taken == ["attention"] * 2


def test_inference_mode_and_parameters_without_grad_mode(taken, monkeypatch):
    norm, linear, x = nn.LayerNorm(16), nn.Linear(16, 8), randn(3, 16)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            agree(*both_ways(lambda: fastattn.layer_norm(x, norm.weight, norm.bias), monkeypatch))
            agree(*both_ways(lambda: fastattn.linear_act(x, linear.weight, linear.bias), monkeypatch))
    assert taken == ["norm", "linear_act"] * 2


def test_a_backend_may_be_named(taken):
    x = randn(2, 8)
    fastattn.rms_norm(x, backend="cpu")
    with fastattn.use_backend("cpu"):
        fastattn.rms_norm(x)
    assert taken == ["norm"] * 2
    fastattn.rms_norm(x, backend="reference")
    with fastattn.use_backend("reference"):
        fastattn.rms_norm(x)
    assert taken == ["norm"] * 2


# ---- no answer -------------------------------------------------------------------------------------------------------


class Subclass(Tensor):
    pass


class Equal:
    """Equal to a value, and no other in anything."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return self.value == other

    def __hash__(self) -> int:
        return hash(self.value)


def _freed(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


# What may not stand in the place of a plain tensor (2, 16).
SPOILED: dict[str, Callable[[Tensor], Any]] = {
    "requires grad": lambda x: x.clone().requires_grad_(),
    "float64": lambda x: x.double(),
    "integers": lambda x: x.int(),
    "complex": lambda x: x.to(torch.complex64),
    "bool": lambda x: x > 0,
    "a subclass": lambda x: x.as_subclass(Subclass),
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "compressed": lambda x: x.to_sparse_csr(),
    "nested": lambda x: torch.nested.nested_tensor([x[0], x[1]]),
    "mkldnn": lambda x: x.to_mkldnn(),
    "quantised": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "negated": lambda x: torch._neg_view(x),
    "without memory": lambda x: torch._efficientzerotensor(2, 16),
    "freed": _freed,
    "empty": lambda x: x[:0],
    "scalar": lambda x: x[0, 0],
    "expanded": lambda x: x[:1].expand(2, 16),
    "strided": lambda x: torch.cat([x, x], 1)[:, ::2],
    "a list": lambda x: x.tolist(),
    "an array": lambda x: x.numpy(),
    "None": lambda x: None,
    "a number": lambda x: 1.0,
}


@pytest.mark.filterwarnings("ignore")  # of torch, on making some of them
@pytest.mark.parametrize("name", SPOILED)
def test_only_plain_tensors_are_taken(name):
    x = randn(2, 16)
    bad, square, features, module = SPOILED[name](x), randn(16, 16), randn(16), direct._opened()
    assert module is not None
    assert module.direct_norm(bad, features, features, None, False, 1e-5, 0.0) is None
    assert module.direct_linear_act(bad, square, features, "gelu") is None
    assert module.direct_ffn(bad, square, features, square, None, "gelu") is None
    assert module.direct_gated_ffn(bad, square, None, square, None, square, None, "silu") is None
    assert module.direct_attention(bad, bad, bad, None, None, True, None) is None
    if name != "None":
        assert module.direct_norm(x, None, None, bad, False, 1e-5, 0.0) is None
        assert module.direct_norm(x, bad, None, None, False, 1e-5, 0.0) is None
        assert module.direct_linear_act(x, square, bad, "gelu") is None
    if name != "strided":
        assert module.direct_linear_act(x, bad, None, "gelu") is None or name == "expanded"


@pytest.mark.parametrize("name", ["expanded", "strided"])
def test_weights_are_taken_as_they_lie_or_not_at_all(name, monkeypatch):
    x, weight = randn(3, 16), SPOILED[name](randn(2, 16))
    agree(*both_ways(lambda: fastattn.linear_act(x, weight), monkeypatch))


def test_arguments_that_do_not_fit():
    x, square, features = randn(2, 16), randn(16, 16), randn(16)
    half, other = x.bfloat16(), randn(16, 8)
    module: Any = direct._opened()
    for args in (
        (x, other, None, None),
        (x, square[0], None, None),
        (x, square, randn(1), None),
        (x, square, features.bfloat16(), None),
        (half, square, None, None),
        (x, square.bfloat16(), None, None),
        (x, square, None, "swish"),
        (x, square, None, 4),
        (x, square, None, Equal("gelu")),
        (x, square, None),
        (x.view(2, *[1] * 7, 16), square, None, None),
    ):
        assert module.direct_linear_act(*args) is None
    for args in (
        (x, randn(8), None, None, True, 1e-5, 0.0),
        (x, None, randn(1), None, True, 1e-5, 0.0),
        (x, features.bfloat16(), None, None, True, 1e-5, 0.0),
        (half, features.half(), None, None, True, 1e-5, 0.0),
        (x, None, None, x[:1], True, 1e-5, 0.0),
        (x, None, None, x[None], True, 1e-5, 0.0),
        (x, None, None, None, True, -1e-5, 0.0),
        (x, None, None, None, True, math.nan, 0.0),
        (x, None, None, None, True, 1e39, 0.0),
        (x, None, None, None, True, 1, 0.0),
        (x, None, None, None, True, 1e-5, math.inf),
        (x, None, None, None, True, 1e-5, torch.tensor(0.0)),
    ):
        assert module.direct_norm(*args) is None
    assert module.direct_ffn(x, other.t(), None, square, None, "gelu") is None
    assert module.direct_ffn(x, square, None, other, None, "gelu") is None
    assert module.direct_gated_ffn(x, square, None, square[:8], None, square, None, "silu") is None
    q, k = randn(2, 4, 1, 16), randn(2, 2, 6, 16)
    ranges = torch.zeros(2, 1, 1, 2, dtype=torch.int32)
    for args in (
        (q[0], k, k, None),
        (q, k[:1], k[:1], None),
        (q, k, k[:, :1], None),
        (q, k, k[:, :, :5], None),
        (q, k[..., :8], k, None),
        (q[:, :3], k, k, None),
        (q, k.half(), k, None),
        (q, k, k.half(), None),
        (q, k, k, ranges.bool()),
        (q, k, k, ranges.long()),
        (q, k, k, ranges.float()),
        (q, k, k, ranges[:, 0]),
        (q, k, k, ranges[..., :1]),
        (q, k, k, ranges.expand(2, 3, 1, 2)),
        (q, k, k, ranges.expand(2, 1, 2, 2)),
        (q, k, k, Causal()),
        (q, k, k, "top-left"),
        (q, k, k, randn(3, 1, 1, 6)),
        (q, k, k, randn(1, 2, 4, 1, 6)),
        (q, k, k, randn(6).half()),
        (randn(2, 4, 9, 16), randn(2, 2, 9, 16), randn(2, 2, 9, 16), ranges.expand(2, 1, 9, 2)),
        (randn(1, 1, 1, 257), randn(1, 1, 4, 257), randn(1, 1, 4, 257), None),
    ):
        assert module.direct_attention(*args, None, True, None) is None
    for rest in ((None, True, math.nan), (None, True, 1), (None, False, None), (0, True, None)):
        assert module.direct_attention(q, k, k, None, *rest) is None
    assert module.direct_attention(q, k, k, ranges, "top-left", True, None) is None
    assert module.direct_attention(q, k, k, ranges, None, True, None) is not None


def test_a_dropout_of_zero_is_a_number(taken):
    q, square, sdpa = randn(1, 2, 9, 16), randn(16, 16), fastattn.scaled_dot_product_attention
    for wrong in (
        lambda: fastattn.layer_norm(q, dropout_p=0j),  # type: ignore[arg-type]
        lambda: fastattn.ffn(q, square, None, square, None, dropout_p=0j),  # type: ignore[arg-type]
        lambda: fastattn.gated_ffn(q, square, square, square, dropout_p=0j),  # type: ignore[arg-type]
        lambda: fastattn.attention(q, q, q, dropout_p=0j),  # type: ignore[call-overload]
        lambda: sdpa(q, q, q, dropout_p=0j),  # type: ignore[arg-type]
    ):
        with pytest.raises((TypeError, RuntimeError)):
            wrong()
    assert not taken
    fastattn.attention(q, q, q, dropout_p=0)
    assert taken == ["attention"]


def test_a_weight_that_wants_a_gradient_gets_it(taken):
    x, norm = randn(2, 16), nn.LayerNorm(16)
    y = fastattn.layer_norm(x, norm.weight, norm.bias)
    assert y.requires_grad and not taken


def test_errors_are_those_of_the_long_way(taken):
    x = randn(2, 16)
    with pytest.raises(ValueError, match=r"weight has shape \(8,\)"):
        fastattn.rms_norm(x, randn(8))
    with pytest.raises(TypeError, match="weight has dtype"):
        fastattn.linear_act(x, randn(16, 16).double())
    with pytest.raises(ValueError, match="activation='swish' is unknown"):
        fastattn.ffn(x, randn(16, 16), None, randn(16, 16), None, "swish")
    with pytest.raises(ValueError, match="backend='gpu' is unknown"):
        fastattn.rms_norm(x, backend="gpu")
    assert not taken
