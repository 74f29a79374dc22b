"""torch.library.opcheck of every operator: schema, fake tensors against real ones, autograd registration, AOT
dispatch."""

from __future__ import annotations

import pytest
import torch

from fastattn import ops
from fastattn.masks import BigBird, Causal, Dilated, GlobalTokens, PerHead, SlidingWindow, Strided
from fastattn.masks.lowered import LoweredMask, flatten


def r(*shape, dtype=torch.float32, grad=True):
    return torch.randn(shape).to(dtype).requires_grad_(grad)


def attention_arguments(dtype, **changes):
    arguments = {
        "q": r(2, 5, 4, 8, dtype=dtype, grad=False).transpose(1, 2).requires_grad_(),
        "k": r(2, 2, 7, 8, dtype=dtype),
        "v": r(2, 2, 7, 6, dtype=dtype),
        "key_start": None,
        "key_end": None,
        "band_offset": 0,
        "band_left": None,
        "band_right": None,
        "intervals": None,
        "dense_mask": None,
        **dict.fromkeys(("key_bits", "bounds", "row_ptr", "col", "block_id", "bitmaps", "col_ptr", "row", "row_id")),
        "bias": None,
        "table": None,
        "table_first": 0,
        "slopes": None,
        "top_left": False,
        "cu_seqlens_q": None,
        "cu_seqlens_k": None,
        "max_len_q": 0,
        "max_len_k": 0,
        "sinks": None,
        "dropout_seed": None,
        "scale": 0.3,
        "softcap": 0.0,
        "dropout_p": 0.0,
        "requires_grad": True,
        "bias_requires_grad": False,
        "table_requires_grad": False,
        "slopes_requires_grad": False,
        "deterministic": False,
        "backend": "",
    }
    assert not changes.keys() - arguments.keys()
    return {**arguments, **changes}


def lowered(mask):
    """The arguments of a mask's lowered form."""
    flat = flatten(mask.lower(2, 4, 5, 7, torch.device("cpu")))
    return dict(zip(list(attention_arguments(torch.float32))[3 : 3 + len(flat)], flat, strict=True))


VARIANTS = {
    "plain": {},
    "keys and band": {
        "key_start": torch.tensor([0, 2], dtype=torch.int32),
        "key_end": torch.tensor([4, 9], dtype=torch.int32),
        "band_offset": 2,
        "band_left": 3,
        "band_right": 0,
    },
    "intervals": {"intervals": torch.tensor([[0, 3], [1, 7]] * 2 + [[5, 5]], dtype=torch.int32).view(1, 1, 1, 5, 2)},
    "dense": {"dense_mask": torch.ones(2, 1, 1, 7, dtype=torch.bool)},
    "key bits": {"key_bits": torch.tensor([[0b1011011], [0b0111111]])},
    "intervals and bounds": lowered(SlidingWindow(1, 1) | GlobalTokens(1)),
    "blocks": lowered(PerHead([Strided(3), Dilated(2, 2), BigBird(2, 1, 1, 3), Causal()])),
    "bias and sinks": {"bias": r(1, 4, 1, 7), "bias_requires_grad": True, "sinks": r(4), "softcap": 3.0},
    "table": {"table": r(4, 5), "table_first": -2, "table_requires_grad": True},
    "slopes": {"slopes": r(1, 4), "slopes_requires_grad": True, "top_left": True},
    "packed": {
        "q": r(1, 9, 4, 8, grad=False).transpose(1, 2).requires_grad_(),
        "k": r(1, 2, 11, 8),
        "v": r(1, 2, 11, 6),
        "cu_seqlens_q": torch.tensor([0, 4, 9], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 7, 11], dtype=torch.int32),
        "max_len_q": 5,
        "max_len_k": 7,
        "band_right": 0,
    },
    "dropout": {"dropout_seed": torch.tensor([3]), "dropout_p": 0.25},
}


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow), torch.float64])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_attention(backend, variant, dtype):
    if backend == "cpu" and (dtype == torch.float64 or {"table", "slopes", "cu_seqlens_q"} & variant.keys()):
        if variant and dtype != torch.float32:
            pytest.skip("the reference backend runs it, as in the other half of these tests")
        backend = ""  # what the native backend refuses falls back
    forward = attention_arguments(dtype, **variant, backend=backend)
    forward |= {name: forward[name].detach().to(dtype).requires_grad_() for name in "qkv"}
    if dtype == torch.float64:
        wide = {name: forward[name] for name in ("table", "slopes") if forward[name] is not None}
        forward |= {name: t.detach().double().requires_grad_() for name, t in wide.items()}
    torch.library.opcheck(ops.attention_forward, tuple(forward.values()))
    out, lse = ops.attention_forward(**forward)
    shared = {name: forward[name] for name in list(forward)[3:33]}
    backward = {
        "grad_out": torch.randn_like(out).requires_grad_(),
        "grad_lse": torch.randn_like(lse),
        **{name: forward[name] for name in "qkv"},
        "out": out,
        "lse": lse,
        **shared,
        **{name: forward[name] for name in ("bias_requires_grad", "table_requires_grad", "slopes_requires_grad")},
        "sinks_requires_grad": forward["sinks"] is not None,
        "deterministic": False,
        "backend": backend,
    }
    torch.library.opcheck(ops.attention_backward, tuple(backward.values()))
    if dtype == torch.float32:
        torch.library.opcheck(ops.attention_backward, tuple({**backward, "grad_lse": None}.values()))


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("residual", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_norm(backend, kind, residual, dropout_p):
    x = r(2, 3, 8, dtype=torch.bfloat16)
    weight, bias = r(8), r(8) if kind == "layer" else None
    stream = None if residual is None else r(2, 3, 8, dtype=residual)
    seed = torch.tensor([9]) if dropout_p else None
    forward = (x, weight, bias, stream, seed, kind, 1e-5, 0.5, dropout_p, True, backend)
    torch.library.opcheck(ops.norm_forward, forward)
    y, z, mean, rstd = ops.norm_forward(*forward)
    z = z if z.numel() else x
    for grad_z in (None, torch.randn_like(z)):
        for dtypes in ((torch.bfloat16, None if bias is None else torch.float32), (None, None)):
            grad_y = torch.randn_like(y).requires_grad_()
            backward = (grad_y, grad_z, z, weight, mean, rstd, seed, kind, 0.5, dropout_p, x.dtype, *dtypes, backend)
            torch.library.opcheck(ops.norm_backward, backward)


@pytest.mark.parametrize(("activation", "with_biases"), [("none", False), ("gelu", True)])
def test_linear_operators(backend, activation, with_biases):
    x, w1, w2, w3 = r(2, 3, 12), r(20, 12), r(20, 10).detach().t().requires_grad_(), r(20, 12)
    b1, b2, b3 = (r(n) if with_biases else None for n in (20, 10, 20))
    grad = r(2, 3, 10)
    tail = (activation, True, backend)

    torch.library.opcheck(ops.linear_act_forward, (x, w1, b1, *tail))
    torch.library.opcheck(ops.linear_act_forward, (x, w1, b1, activation, False, backend))
    _, pre = ops.linear_act_forward(x, w1, b1, *tail)
    for flags in ((True, True, with_biases), (True, False, False), (False, True, False)):
        torch.library.opcheck(ops.linear_act_backward, (r(2, 3, 20), x, w1, pre, activation, *flags, backend))

    for options in ((None, activation, 0.0), (torch.tensor([3]), activation, 0.25)):
        tail = (*options, True, backend)
        torch.library.opcheck(ops.ffn_forward, (x, w1, b1, w2, b2, *tail))
        _, pre = ops.ffn_forward(x, w1, b1, w2, b2, *tail)
        for flags in ((True, True, with_biases, True, with_biases), (True, False, False, False, False)):
            torch.library.opcheck(ops.ffn_backward, (grad, x, w1, w2, pre, *options, *flags, backend))

        gated = (x, w1, b1, w3, b3, w2, b2)
        torch.library.opcheck(ops.gated_ffn_forward, (*gated, *tail))
        _, gate, up = ops.gated_ffn_forward(*gated, *tail)
        for flags in ((True, *(True, with_biases) * 3), (False, True, *(False,) * 5)):
            torch.library.opcheck(ops.gated_ffn_backward, (grad, x, w1, w3, w2, gate, up, *options, *flags, backend))


@pytest.mark.parametrize("tracked", [True, False])
def test_what_stands_for_them_in_exported_graphs(backend, tracked):
    x, w1, w2, b1, b2 = r(2, 3, 12), r(20, 12), r(12, 20), r(20), r(12)
    tail = (None, "gelu", 0.0, tracked, backend)
    attention = attention_arguments(torch.float32, requires_grad=tracked, backend=backend)
    torch.library.opcheck(torch.ops.fastattn.attention.default, tuple(attention.values()))
    norm = (x, r(12), b2, r(2, 3, 12), None, "layer", 1e-5, 0.0, 0.0, tracked, backend)
    torch.library.opcheck(torch.ops.fastattn.norm.default, norm)
    torch.library.opcheck(torch.ops.fastattn.linear_act.default, (x, w1, b1, "gelu", tracked, backend))
    torch.library.opcheck(torch.ops.fastattn.ffn.default, (x, w1, b1, w2, b2, *tail))
    torch.library.opcheck(torch.ops.fastattn.gated_ffn.default, (x, w1, b1, w1, b1, w2, b2, *tail))


@pytest.mark.parametrize("paged", [False, True])
def test_attention_decode(paged):
    shape = (3, 4, 2, 8) if paged else (2, 2, 8, 8)
    caches = [r(*shape, grad=False), r(*shape, grad=False)]
    table = torch.tensor([[0, 2], [1, 0]], dtype=torch.int32) if paged else None
    lengths = torch.tensor([3, 7], dtype=torch.int32)
    biases = (r(1, 4, 1, 8, grad=False), r(4, 5, grad=False), -2, r(1, 4, grad=False))
    numbers = (2, 0, None, *biases, r(4, grad=False), 0.3, 5.0, "")
    torch.library.opcheck(ops.attention_decode_forward, (r(2, 4, 1, 8, grad=False), *caches, lengths, table, *numbers))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("with_biases", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_encoder_layer(backend, dtype, with_biases, packed):
    if dtype is torch.float64 and backend == "cpu":
        pytest.skip("the CPU kernels take no float64")

    def linear(out, features):
        return r(out, features, dtype=dtype), r(out, dtype=dtype) if with_biases else None

    projections = [t for _ in range(4) for t in linear(8, 8)]
    norms = [r(8, dtype=dtype), r(8, dtype=dtype) if with_biases else None]
    tensors = [*projections, *norms, *linear(12, 8), *linear(8, 12), *norms]
    bounds = torch.tensor([0, 4, 4, 10], dtype=torch.int32) if packed else None
    end = None if packed else torch.tensor([4, 9], dtype=torch.int32)
    keys = None if packed else torch.ones(2, 1, 1, 5, dtype=torch.bool)
    x = r(10, 8, dtype=dtype) if packed else r(5, 2, 8, dtype=dtype, grad=False).transpose(0, 1).requires_grad_()
    mask = flatten(LoweredMask(key_end=end, band_right=None if packed else 0, dense=keys))
    numbers = (2, 0.3, "gelu", packed, 1e-5, 1e-6, backend)
    torch.library.opcheck(ops.encoder_layer_forward, (x, *tensors, bounds, *mask, *numbers))
