"""What `encoder_layer` promises, on every backend that runs here."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

import fastattn
from fastattn import reference
from fastattn.masks import Causal, KeyLengths
from fastattn.masks.lowered import LoweredMask, flatten
from fastattn.ops import encoder_layer_forward

FEATURES, HIDDEN, HEADS = 48, 72, 2


def draw(dtype=torch.float32, features=FEATURES, hidden=HIDDEN):
    """The sixteen weights and biases in the order of the arguments."""
    shapes = [(features, features), (features,)] * 4 + [(features,)] * 2
    shapes += [(hidden, features), (hidden,), (features, hidden), (features,)] + [(features,)] * 2
    return [(torch.randn(s) / s[-1] ** (0.5 if len(s) == 2 else 0.0)).to(dtype) for s in shapes]


def truth(x, weights, **options):
    return reference.encoder_layer(x.double(), *(None if w is None else w.double() for w in weights), **options)


def close(y, expected, dtype=torch.float32):
    scale = float(expected.abs().max())
    tolerance = 32 * torch.finfo(dtype).eps * scale if dtype is not torch.float32 else 1e-5 * scale
    assert y.dtype == dtype and y.shape == expected.shape and y.is_contiguous()
    assert float((y.double() - expected).abs().max()) <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("length", [1, 9, 70])
def test_against_the_reference(backend, dtype, norm_first, length):
    x, weights = torch.randn(3, length, FEATURES).to(dtype), draw(dtype)
    keep = torch.rand(3, 1, 1, length) < 0.7
    keep[0], keep[1] = True, False  # whole, wholly padded
    options = {"heads": HEADS, "norm_first": norm_first, "mask": keep, "eps1": 1e-6, "eps2": 1e-3}
    y = fastattn.encoder_layer(x, *weights, backend=backend, **options)
    close(y, truth(x, weights, **options), dtype)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_equals_torchs_layer(backend, norm_first, activation):
    layer = nn.TransformerEncoderLayer(
        FEATURES, HEADS, HIDDEN, 0.0, activation, 1e-4, batch_first=True, norm_first=norm_first
    ).eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.2)
    x = torch.randn(2, 40, FEATURES)
    attention = layer.self_attn
    projections = zip(attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True)
    with torch.no_grad():
        y = fastattn.encoder_layer(
            x,
            *(tensor for pair in projections for tensor in pair),
            attention.out_proj.weight,
            attention.out_proj.bias,
            layer.norm1.weight,
            layer.norm1.bias,
            layer.linear1.weight,
            layer.linear1.bias,
            layer.linear2.weight,
            layer.linear2.bias,
            layer.norm2.weight,
            layer.norm2.bias,
            heads=HEADS,
            activation=activation,
            norm_first=norm_first,
            eps1=1e-4,
            eps2=1e-4,
            backend=backend,
        )
        torch.testing.assert_close(y, layer(x), rtol=1e-4, atol=1e-4)


def test_masks(backend):
    x, weights = torch.randn(2, 40, FEATURES), draw()
    ends = torch.randint(0, 41, (2, 1, 40, 2), dtype=torch.int32).sort(dim=-1).values
    for mask in (
        Causal(),
        KeyLengths(torch.tensor([7, 40])),
        Causal() & KeyLengths([40, 0]),
        torch.rand(2, HEADS, 40, 40) < 0.5,
        ends,
    ):
        y = fastattn.encoder_layer(x, *weights, heads=HEADS, mask=mask, backend=backend)
        close(y, truth(x, weights, heads=HEADS, mask=mask))


@pytest.mark.parametrize("norm_first", [False, True])
def test_packed_rows_equal_the_sequences_alone(backend, norm_first):
    weights, bounds = draw(), [0, 0, 5, 50, 50, 83]
    x = torch.randn(83, FEATURES)
    options = {"heads": HEADS, "norm_first": norm_first, "scale": 0.3}
    y = fastattn.encoder_layer(x, *weights, cu_seqlens=torch.tensor(bounds).int(), backend=backend, **options)
    alone = [truth(x[None, a:b], weights, **options)[0] for a, b in pairwise(bounds) if b > a]
    close(y, torch.cat(alone))


def test_without_biases_and_norm_weights(backend):
    weights = [w if w.dim() == 2 else None for w in draw()]
    x = torch.randn(2, 40, FEATURES)
    close(fastattn.encoder_layer(x, *weights, heads=HEADS, backend=backend), truth(x, weights, heads=HEADS))


def test_float32_norms_beside_half_inputs(backend):
    weights = draw(torch.bfloat16)
    for i in (8, 9, 14, 15):
        weights[i] = torch.randn(FEATURES)
    x = torch.randn(2, 40, FEATURES).bfloat16()
    y = fastattn.encoder_layer(x, *weights, heads=HEADS, backend=backend)
    close(y, truth(x, weights, heads=HEADS), torch.bfloat16)


def test_strided_inputs_and_weights(backend):
    weights = [w.t().contiguous().t() if w.dim() == 2 else w.repeat_interleave(2)[::2] for w in draw()]
    x = torch.randn(FEATURES, 40, 2).permute(2, 1, 0)
    close(fastattn.encoder_layer(x, *weights, heads=HEADS, backend=backend), truth(x, weights, heads=HEADS))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_no_rows(backend, shape):
    x, weights = torch.randn(*shape, FEATURES), draw()
    assert fastattn.encoder_layer(x, *weights, heads=HEADS, backend=backend).shape == x.shape
    none = fastattn.encoder_layer(
        x.view(0, FEATURES), *weights, heads=HEADS, cu_seqlens=torch.tensor([0]).int(), backend=backend
    )
    assert none.shape == (0, FEATURES)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rows", [(4, 5), (4, 40)])
def test_what_is_not_finite_stays_in_its_sample(backend, value, rows):
    x, weights = torch.randn(*rows, FEATURES), draw()
    clean = truth(x, weights, heads=HEADS)
    x[1, 2, 3] = value
    y = fastattn.encoder_layer(x, *weights, heads=HEADS, backend=backend)
    assert torch.equal(y.isnan(), truth(x, weights, heads=HEADS).isnan()) and y[1].isnan().any()
    others = [0, 2, 3]
    close(y[others], clean[others])


def test_values_that_overflow_on_the_way(backend):
    """Finite inputs whose hidden features are not: infinity makes of the rest what it makes of it in plain float32."""
    x, weights = torch.randn(2, 40, FEATURES), draw()
    weights[10] = weights[10] * 3e38
    y = fastattn.encoder_layer(x, *weights, heads=HEADS, activation="relu", backend=backend)
    expected = reference.encoder_layer(x, *weights, heads=HEADS, activation="relu")
    assert torch.equal(y.isnan(), expected.isnan()) and y.isnan().any()


def test_a_result_does_not_depend_on_the_threads():
    x, weights = torch.randn(3, 130, FEATURES), draw()
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(fastattn.encoder_layer(x, *weights, heads=HEADS))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_a_gradient_is_refused():
    x, weights = torch.randn(1, 3, FEATURES), draw()
    weights[0].requires_grad_()
    with pytest.raises(RuntimeError, match=r"encoder_layer has no backward, .*: call it under torch.no_grad\(\)"):
        fastattn.encoder_layer(x, *weights, heads=HEADS)
    with torch.no_grad():
        assert not fastattn.encoder_layer(x, *weights, heads=HEADS).requires_grad
    with pytest.raises(RuntimeError, match="encoder_layer has no backward"):
        torch.func.vmap(lambda x: fastattn.encoder_layer(x, *weights, heads=HEADS))(x[None])
    with pytest.raises(RuntimeError, match="encoder_layer has no backward"):
        torch.func.grad(lambda x: fastattn.encoder_layer(x, *map(torch.detach, weights), heads=HEADS).sum())(x)


@pytest.mark.parametrize("mask", [None, Causal(), KeyLengths([2, 6])], ids=repr)
def test_vmap_stacks_the_calls(backend, mask):
    x, weights = torch.randn(3, 2, 6, FEATURES), draw()

    def call(x):
        return fastattn.encoder_layer(x, *weights, heads=HEADS, mask=mask, backend=backend)

    torch.testing.assert_close(torch.func.vmap(call)(x), torch.stack([call(entry) for entry in x]))


def test_the_operator_under_vmap():
    x, weights = torch.randn(3, 2, 6, FEATURES), draw()
    lengths = torch.tensor([[2, 6], [0, 3], [6, 6]], dtype=torch.int32)

    def call(x, lengths, weights):
        tail = (None, *flatten(LoweredMask(key_end=lengths)), HEADS, 0.2, "gelu", False, 1e-5, 1e-5, "")
        return encoder_layer_forward(x, *weights, *tail)

    expected = torch.stack([call(x[i], lengths[i], weights) for i in range(3)])
    torch.testing.assert_close(torch.func.vmap(lambda x, n: call(x, n, weights))(x, lengths), expected)
    mapped = [torch.stack([weights[0], weights[0] * 2, -weights[0]]), *weights[1:]]
    dims = (0, 0, [0] + [None] * 15)
    expected = torch.stack([call(x[i], lengths[i], [mapped[0][i], *weights[1:]]) for i in range(3)])
    torch.testing.assert_close(torch.func.vmap(call, in_dims=dims)(x, lengths, mapped), expected)
