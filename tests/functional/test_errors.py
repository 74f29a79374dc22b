"""Wrong arguments: each error names the argument, its value and the remedy, before any kernel runs."""

from __future__ import annotations

import pytest
import torch

import fastattn
from fastattn.masks import Causal, KeyLengths, LoweredMask, PrefixLM, Strided


def t(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


Q, K, V = t(2, 4, 3, 8), t(2, 2, 5, 8), t(2, 2, 5, 6)
META = t(2, 2, 5, 8, device="meta")
SEED = torch.tensor([1])


def attention(q=Q, k=K, v=V, **kwargs):
    return lambda: fastattn.attention(q, k, v, **kwargs)


NESTED = torch.nested.nested_tensor([t(3, 8), t(2, 8)], layout=torch.jagged)
SPARSE = t(3, 8).to_sparse()

UNPLAIN = [
    (attention(q=NESTED), TypeError, "q is nested: pass a plain tensor, packed or padded"),
    (attention(bias=SPARSE), TypeError, r"bias has layout torch.sparse_coo: pass a strided tensor"),
    (lambda: fastattn.layer_norm(NESTED), TypeError, r"x is nested: .* x.to_padded_tensor\(0.0\)"),
    (lambda: fastattn.layer_norm(t(3, 8).to_mkldnn()), TypeError, "x has layout torch._mkldnn: pass"),
    (lambda: fastattn.linear_act(SPARSE, t(4, 8)), TypeError, r"x has layout torch.sparse_coo: .* x.to_dense\(\)"),
    (lambda: fastattn.linear_act(t(3, 8), SPARSE), TypeError, "weight has layout torch.sparse_coo"),
]

ATTENTION = [
    (
        attention(q=t(4, 3, 8)),
        ValueError,
        r"q has 3 dimensions, shape \(4, 3, 8\): pass \(batch, heads, length, head_dim\)",
    ),
    (attention(v=t(2, 2, 5, 6, 1)), ValueError, r"v has 5 dimensions"),
    (attention(q=[1]), TypeError, "q is a list: pass a tensor"),
    (attention(q=Q.int()), TypeError, "q has dtype torch.int32: pass float32, bfloat16, float16 or float64"),
    (attention(k=K.long()), TypeError, r"k has dtype torch.int64: .* for example k.to\(torch.float32\)"),
    (
        attention(k=K.half()),
        TypeError,
        r"k has dtype torch.float16 but q torch.float32: cast them to one dtype, k.to\(",
    ),
    (attention(v=V.bfloat16()), TypeError, "v has dtype torch.bfloat16 but q torch.float32"),
    (attention(k=META), ValueError, r"k lies on meta but q on cpu: move it with .to\('cpu'\)"),
    (attention(v=META), ValueError, "v lies on meta but q on cpu"),
    (attention(k=t(1, 2, 5, 8)), ValueError, "k has a batch of 1 but q of 2: expand k to q's batch"),
    (attention(v=t(3, 2, 5, 6)), ValueError, "v has a batch of 3 but q of 2"),
    (attention(k=t(2, 2, 5, 9)), ValueError, r"k has head dim 9 but q 8: pass k of shape \(B, Hkv, Skv, 8\)"),
    (
        attention(v=t(2, 2, 4, 6)),
        ValueError,
        r"v has 2 heads and length 4 but k 2 and 5: pass v of shape \(2, 2, 5, Dv\)",
    ),
    (attention(v=t(2, 1, 5, 6)), ValueError, "v has 1 heads and length 5 but k 2 and 5"),
    (
        attention(k=t(2, 3, 5, 8), v=t(2, 3, 5, 6)),
        ValueError,
        "q has 4 heads, which is no multiple of the 3 heads of k",
    ),
    (attention(k=t(2, 0, 5, 8), v=t(2, 0, 5, 6)), ValueError, "q has 4 heads, which is no multiple of the 0 heads"),
    (attention(q=t(2, 4, 3, 264), k=t(2, 2, 5, 264)), ValueError, "q has head dim 264: pass 1 to 256"),
    (attention(q=t(2, 4, 3, 0), k=t(2, 2, 5, 0)), ValueError, "q has head dim 0: pass 1 to 256"),
    (attention(v=t(2, 2, 5, 300)), ValueError, "v has head dim 300: pass 1 to 256"),
    (attention(scale="big"), TypeError, "scale='big' is a str: pass a Python number"),
    (attention(scale=float("nan")), ValueError, "scale=nan is not finite"),
    (attention(softcap=float("inf")), ValueError, "softcap=inf is not finite"),
    (attention(softcap=1e-50), ValueError, "softcap=1e-50 is not positive"),
    (attention(scale=1e39), ValueError, r"scale=1e\+39 is not finite in float32"),
    (attention(mask=LoweredMask(key_end=torch.tensor([5, 3]))), TypeError, "mask.key_end has dtype torch.int64"),
    (lambda: fastattn.reference.attention(Q, K, V, dropout_p=0.5), ValueError, "dropout_seed is None beside"),
    (attention(scale=t(1)), TypeError, r"scale is a tensor of shape \(1,\): pass a Python number"),
    (
        attention(softcap=0.0),
        ValueError,
        "softcap=0.0 is not positive: pass a bound of the scores such as 30.0, or None",
    ),
    (attention(softcap=-1.0), ValueError, "softcap=-1.0 is not positive"),
    (attention(sinks=t(3)), ValueError, r"sinks has shape \(3,\): pass \(4,\), one logit per query head"),
    (attention(sinks=t(4).int()), TypeError, "sinks has dtype torch.int32"),
    (attention(sinks=t(4, device="meta")), ValueError, "sinks lies on meta but q on cpu"),
    (attention(dropout_p=1.0), ValueError, r"dropout_p=1.0 lies outside \[0, 1\): pass the share of elements to drop"),
    (attention(dropout_p=-0.1), ValueError, r"dropout_p=-0.1 lies outside \[0, 1\)"),
    (attention(dropout_p=float("nan")), ValueError, r"dropout_p=nan lies outside"),
    (attention(dropout_p=True), TypeError, "dropout_p=True is a bool: pass a Python number"),
    (
        attention(dropout_p=0.1, dropout_seed=3),
        TypeError,
        "dropout_seed is of int: pass an int64 tensor of one element",
    ),
    (attention(dropout_p=0.1, dropout_seed=t(1)), TypeError, "dropout_seed is of torch.float32: pass an int64 tensor"),
    (attention(dropout_p=0.1, dropout_seed=t(2).long()), ValueError, r"dropout_seed has shape \(2,\): pass an int64"),
    (attention(dropout_p=0.1, dropout_seed=SEED.to("meta")), ValueError, "dropout_seed lies on meta but q on cpu"),
    (
        attention(backend="gpu"),
        ValueError,
        "backend='gpu' is unknown: pass one of 'cuda', 'cpu', 'triton', 'reference'",
    ),
    (
        attention(mask=Strided(2).lower(2, 4, 3, 70, Q.device)),
        ValueError,
        r"mask was lowered for \(Sq, Skv\) = \(3, 70\), but this call has \(3, 5\): lower it for these lengths",
    ),
    (
        attention(mask=Causal().lower(2, 4, 5, 5, Q.device)),
        ValueError,
        r"mask was lowered for \(Sq, Skv\) = \(5, 5\), but this call has \(3, 5\)",
    ),
    (
        attention(mask=Strided(2).lower(2, 4, 3, 70, Q.device)._replace(lengths=None)),
        ValueError,
        r"mask.blocks.col_ptr has shape \(1, 1, 3\), which is not that of a call with .* = \(2, 4, 3, 5\): lower the",
    ),
    (
        attention(mask=PrefixLM([1]).lower(1, 4, 3, 5, META.device)),
        ValueError,
        r"mask.intervals lies on meta but q on cpu: lower the mask for q's device",
    ),
    (
        attention(mask=KeyLengths([1]).lower(1, 4, 3, 5, Q.device)),
        ValueError,
        r"mask.key_end has shape \(1,\), which is not that of a call with",
    ),
    (
        attention(mask="causal"),
        TypeError,
        "mask is a str: pass an object of fastattn.masks, a bool, int32 or float tensor",
    ),
    (
        attention(mask=t(3, 5).long()),
        TypeError,
        r"mask has dtype torch.int64: pass bool .* mask.bool\(\) makes a bool mask",
    ),
    (
        attention(mask=t(3, 4).bool()),
        ValueError,
        r"mask has shape \(3, 4\), which does not broadcast to \(B, Hq, Sq, Skv\)",
    ),
    (attention(mask=t(3, 4)), ValueError, r"mask has shape \(3, 4\), which does not broadcast to .* = \(2, 4, 3, 5\)"),
    (
        attention(mask=t(3, 5).half()),
        TypeError,
        "mask has dtype torch.float16 beside q of torch.float32: pass torch.float32",
    ),
    (
        attention(mask=t(3, 2).int()),
        ValueError,
        r"mask of int32 key ranges has shape \(3, 2\): pass \(1 or 2, 1 or 4, 3, 2\)",
    ),
    (attention(mask=t(1, 1, 3, 5).int()), ValueError, r"mask of int32 key ranges has shape \(1, 1, 3, 5\)"),
    (attention(mask=t(3, 5, device="meta").bool()), ValueError, "mask lies on meta but q on cpu"),
    (
        attention(bias=t(3, 5).bool()),
        TypeError,
        r"bias has dtype torch.bool: pass a float tensor \(bool masks go to mask=\)",
    ),
    (attention(bias=t(3, 5, dtype=torch.float64)), TypeError, "bias has dtype torch.float64 beside q of torch.float32"),
    (attention(bias=t(2, 2, 3, 5)), ValueError, r"bias has shape \(2, 2, 3, 5\), which does not broadcast"),
    (attention(bias=t(1, 2, 4, 3, 5)), ValueError, "bias has shape .* does not broadcast"),
    (attention(bias=3.0), TypeError, "bias is a float: pass a float tensor or an object of fastattn.biases"),
    (attention(bias=t(3, 5, device="meta")), ValueError, "bias lies on meta but q on cpu"),
]

X, W, B = t(3, 8), t(6, 8), t(6)


def layer_norm(x=X, *args, **kwargs):
    return lambda: fastattn.layer_norm(x, *args, **kwargs)


NORM = [
    (layer_norm(3.0), TypeError, "x is a float: pass a tensor"),
    (layer_norm(X.int()), TypeError, "x has dtype torch.int32: pass float32"),
    (layer_norm(t()), ValueError, r"x has no dimensions: pass \(..., N\)"),
    (layer_norm(eps=-1e-5), ValueError, "eps=-1e-05 is negative: pass 0 or a small positive number such as 1e-5"),
    (layer_norm(eps=float("nan")), ValueError, "eps=nan is not finite"),
    (layer_norm(eps=None), TypeError, "eps=None is a NoneType: pass a Python number"),
    (lambda: fastattn.rms_norm(X, None, -1.0), ValueError, "eps=-1.0 is negative"),
    (lambda: fastattn.rms_norm(X, None, offset="1"), TypeError, "offset='1' is a str: pass a Python number"),
    (
        lambda: fastattn.rms_norm(X, t(7)),
        ValueError,
        r"weight has shape \(7,\): pass \(8,\), one element per feature of x",
    ),
    (layer_norm(X, t(3, 8)), ValueError, r"weight has shape \(3, 8\): pass \(8,\)"),
    (
        layer_norm(X, t(8).half()),
        TypeError,
        r"weight has dtype torch.float16 beside x of torch.float32: pass torch.float32",
    ),
    (
        layer_norm(X.half(), t(8).bfloat16()),
        TypeError,
        "weight has dtype torch.bfloat16 .* torch.float16 or torch.float32",
    ),
    (layer_norm(X, t(8, device="meta")), ValueError, "weight lies on meta but x on cpu"),
    (layer_norm(X, None, t(9)), ValueError, r"bias has shape \(9,\): pass \(8,\)"),
    (layer_norm(X, None, t(8).long()), TypeError, "bias has dtype torch.int64"),
    (layer_norm(residual=t(1, 8)), ValueError, r"residual has shape \(1, 8\): pass \(3, 8\), the shape of x"),
    (layer_norm(residual=X.bfloat16()), TypeError, "residual has dtype torch.bfloat16 beside x of torch.float32"),
    (layer_norm(dropout_p=1.5), ValueError, r"dropout_p=1.5 lies outside \[0, 1\)"),
    (layer_norm(dropout_p=0.5, dropout_seed=7), TypeError, "dropout_seed is of int: pass an int64 tensor"),
    (layer_norm(backend="fast"), ValueError, "backend='fast' is unknown"),
]


def linear(x=X, weight=W, bias=None, activation=None, **kwargs):
    return lambda: fastattn.linear_act(x, weight, bias, activation, **kwargs)


FFN = [
    (
        linear(activation="swish"),
        ValueError,
        "activation='swish' is unknown: pass one of relu, gelu, gelu_tanh, silu, quick",
    ),
    (linear(x=X.int()), TypeError, "x has dtype torch.int32"),
    (linear(x=t()), ValueError, r"x has no dimensions: pass \(..., K\)"),
    (linear(weight=t(6, 7)), ValueError, r"weight has shape \(6, 7\): pass \(N, 8\), out features by in features"),
    (linear(weight=None), TypeError, "weight is a NoneType: pass a tensor"),
    (linear(weight=t(8)), ValueError, r"weight has shape \(8,\): pass \(N, 8\)"),
    (
        linear(weight=W.bfloat16()),
        TypeError,
        "weight has dtype torch.bfloat16 beside x of torch.float32: pass torch.float32,",
    ),
    (
        linear(x=X.half()),
        TypeError,
        r"weight has dtype torch.float32 beside x of torch.float16: .*weight.to\(torch.float16\)",
    ),
    (linear(weight=t(6, 8, device="meta")), ValueError, "weight lies on meta but x on cpu"),
    (linear(bias=t(5)), ValueError, r"bias has shape \(5,\): pass \(6,\), one element per row of weight"),
    (linear(bias=B.int()), TypeError, "bias has dtype torch.int32"),
    (linear(backend="none"), ValueError, "backend='none' is unknown"),
    (lambda: fastattn.ffn(X, W, B, t(4, 5), None), ValueError, r"w2 has shape \(4, 5\): pass \(N, 6\)"),
    (lambda: fastattn.ffn(X, t(6, 9), B, t(4, 6), None), ValueError, r"w1 has shape \(6, 9\): pass \(N, 8\)"),
    (linear(weight=t(6, 7)), ValueError, r"or pass x with 7 features instead of 8"),
    (
        lambda: fastattn.ffn(X, W, t(7), t(4, 6), None),
        ValueError,
        r"b1 has shape \(7,\): pass \(6,\), one .* row of w1",
    ),
    (lambda: fastattn.ffn(X, W, B, t(4, 6), t(6)), ValueError, r"b2 has shape \(6,\): pass \(4,\), one .* row of w2"),
    (lambda: fastattn.ffn(X, W, B, t(4, 6), None, "tanh"), ValueError, "activation='tanh' is unknown"),
    (lambda: fastattn.ffn(X, W, B, t(4, 6), None, ["relu"]), ValueError, r"activation=\['relu'\] is unknown"),
    (
        lambda: fastattn.ffn(X, W, None, t(4, 6), None, dropout_p=1.5),
        ValueError,
        r"dropout_p=1.5 lies outside \[0, 1\)",
    ),
    (lambda: fastattn.gated_ffn(X, W, W, t(4, 6), dropout_p=0.1, dropout_seed=3), TypeError, "dropout_seed is of int"),
    (lambda: fastattn.gated_ffn(X, W, t(5, 8), t(4, 6)), ValueError, r"w_up has shape \(5, 8\): pass \(6, 8\)"),
    (lambda: fastattn.gated_ffn(X, W, W, t(4, 5)), ValueError, r"w_down has shape \(4, 5\): pass \(N, 6\)"),
    (lambda: fastattn.gated_ffn(X, t(6, 7), W, t(4, 6)), ValueError, r"w_gate has shape \(6, 7\)"),
    (lambda: fastattn.gated_ffn(X, W, W, t(4, 6), b_up=t(3)), ValueError, r"b_up has shape \(3,\): pass \(6,\)"),
    (lambda: fastattn.gated_ffn(X, W, W, t(4, 6), b_gate=B.half()), TypeError, "b_gate has dtype torch.float16"),
    (lambda: fastattn.gated_ffn(X, W, W, t(4, 6), b_down=t(3)), ValueError, r"b_down has shape \(3,\): pass \(4,\)"),
]


LAYER_WEIGHTS = {
    **{f"w{n}": t(8, 8) for n in "qkvo"},
    **{f"b{n}": t(8) for n in "qkvo"},
    **{f"norm{n}_{name}": t(8) for n in (1, 2) for name in ("weight", "bias")},
    "w1": t(6, 8),
    "b1": t(6),
    "w2": t(8, 6),
    "b2": t(8),
}


def layer(x=None, **changes):
    arguments = {"heads": 2, **LAYER_WEIGHTS, **changes}
    return lambda: fastattn.encoder_layer(t(2, 3, 8) if x is None else x, **arguments)


def bounds(*values):
    return torch.tensor(values, dtype=torch.int32)


LAYER = [
    (layer(x=t(3, 8)), ValueError, r"x has 2 dimensions, shape \(3, 8\): pass \(batch, length, features\), or packed"),
    (layer(cu_seqlens=bounds(0, 3)), ValueError, "x has 3 dimensions"),
    (layer(x=[1]), TypeError, "x is a list: pass a tensor"),
    (layer(heads=3), ValueError, "heads=3 does not cut x's 8 features into heads: pass a divisor of 8"),
    (layer(heads=0), ValueError, "heads=0 does not cut"),
    (layer(heads=2.0), TypeError, r"heads=2.0 is a float"),
    (layer(wq=t(8, 6)), ValueError, r"wq has shape \(8, 6\): pass \(8, 8\)"),
    (layer(wv=None), TypeError, "wv is a NoneType: pass a tensor"),
    (layer(wo=t(8, 8).half()), TypeError, "wo has dtype torch.float16 beside x of torch.float32"),
    (layer(wk=t(8, 8, device="meta")), ValueError, "wk lies on meta but x on cpu"),
    (layer(bk=t(6)), ValueError, r"bk has shape \(6,\): pass \(8,\)"),
    (layer(w1=t(6, 7)), ValueError, r"w1 has shape \(6, 7\): pass \(6, 8\)"),
    (layer(w1=t(6)), ValueError, r"w1 has shape \(6,\): pass \(F, 8\)"),
    (layer(w2=t(8, 5)), ValueError, r"w2 has shape \(8, 5\): pass \(8, 6\)"),
    (layer(b1=t(8)), ValueError, r"b1 has shape \(8,\): pass \(6,\), one element per row of w1"),
    (layer(norm1_bias=t(3)), ValueError, r"norm1_bias has shape \(3,\): pass \(8,\)"),
    (layer(norm2_weight=t(8).half()), TypeError, "norm2_weight has dtype torch.float16 beside x of torch.float32"),
    (layer(eps1=-1.0), ValueError, "eps1=-1.0 is negative"),
    (layer(eps2="small"), TypeError, "eps2='small' is a str"),
    (layer(activation="tanh"), ValueError, "activation='tanh' is unknown"),
    (layer(backend="gpu"), ValueError, "backend='gpu' is unknown"),
    (layer(backend="triton"), fastattn.NotSupported, "triton"),
    (layer(mask=t(2, 1, 1, 3)), TypeError, "mask has dtype torch.float32: pass a bool tensor, True where visible"),
    (layer(mask=t(2, 1, 1, 4).bool()), ValueError, r"mask has shape \(2, 1, 1, 4\), which does not broadcast"),
    (layer(mask=3), TypeError, "mask is a int"),
    (layer(x=t(3, 8), cu_seqlens=[0, 3]), TypeError, "cu_seqlens is of list: pass an int32 tensor"),
    (layer(x=t(3, 8), cu_seqlens=bounds(0, 3).long()), TypeError, "cu_seqlens is of torch.int64: pass an int32"),
    (layer(x=t(3, 8), cu_seqlens=bounds(0, 3)[None]), ValueError, r"cu_seqlens has shape \(1, 2\)"),
    (layer(x=t(3, 8), cu_seqlens=bounds(0, 4)), ValueError, r"cu_seqlens=\[0, 4\] does not cut x's 3 rows"),
    (layer(x=t(3, 8), cu_seqlens=bounds(1, 3)), ValueError, r"cu_seqlens=\[1, 3\] does not cut"),
    (layer(x=t(3, 8), cu_seqlens=bounds(0, 2, 1, 3)), ValueError, r"\[0, 2, 1, 3\] does not cut .* never decreasing"),
    (layer(x=t(3, 8), cu_seqlens=bounds(0, 3), mask=t(3).bool()), ValueError, "mask is given beside cu_seqlens"),
]


@pytest.mark.parametrize(("call", "error", "text"), [*UNPLAIN, *ATTENTION, *NORM, *FFN, *LAYER])
def test_error(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_explain_checks_as_attention_does():
    with pytest.raises(ValueError, match="k has head dim 9 but q 8"):
        fastattn.explain(Q, t(2, 2, 5, 9), V)


def test_a_dense_bias_must_be_float():
    with pytest.raises(TypeError, match=r"Dense: tensor has dtype torch.bool: pass a float tensor \(bool masks"):
        fastattn.biases.Dense(t(2).bool())
