"""scaled_dot_product_attention against torch's: every combination of arguments torch accepts, and every error."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastattn
from fastattn import dispatch


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def qkv(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...] | None = None, dtype: torch.dtype = torch.float32):
    return draw(*q, dtype=dtype), draw(*k, dtype=dtype, seed=1), draw(*(v or k), dtype=dtype, seed=2)


SHAPES = {
    "plain": ((2, 3, 5, 8), (2, 3, 7, 8), None),
    "value dim": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 12)),
    "no batch": ((3, 5, 8), (3, 7, 8), None),
    "matrices": ((5, 8), (7, 8), None),
    "five dims": ((2, 2, 3, 5, 8), (2, 2, 3, 7, 8), None),
    "six dims": ((2, 1, 2, 3, 5, 8), (2, 1, 2, 3, 7, 8), None),
    "batch broadcasts": ((2, 3, 5, 8), (1, 3, 7, 8), None),
    "query broadcasts": ((1, 1, 5, 8), (2, 3, 7, 8), None),
    "heads broadcast": ((2, 4, 5, 8), (2, 1, 7, 8), None),
    "value broadcasts": ((2, 3, 5, 8), (2, 3, 7, 8), (1, 1, 7, 8)),
    "ranks differ": ((3, 5, 8), (2, 3, 7, 8), None),
    "square": ((2, 3, 6, 8), (2, 3, 6, 8), None),
    "one query": ((2, 3, 1, 8), (2, 3, 9, 8), None),
    "more queries": ((2, 3, 9, 8), (2, 3, 4, 8), None),
    "no keys": ((2, 3, 4, 8), (2, 3, 0, 8), None),
    "no queries": ((2, 3, 0, 8), (2, 3, 4, 8), None),
    "empty batch": ((0, 3, 4, 8), (0, 3, 4, 8), None),
    "odd dim": ((1, 2, 5, 7), (1, 2, 6, 7), (1, 2, 6, 3)),
}
MASKS = ("none", "causal", "bool", "bool row", "bool full", "float", "float full", "hidden rows")


def mask_of(kind: str, q: Tensor, k: Tensor, seed: int = 3) -> dict[str, Any]:
    lengths = (q.shape[-2], k.shape[-2])
    full = (*torch.broadcast_shapes(q.shape[:-2], k.shape[:-2]), *lengths)
    shape = {"bool": lengths, "bool row": (1, lengths[1])}.get(kind, full if kind.endswith("full") else lengths)
    values = draw(*shape, seed=seed)
    if kind == "none":
        return {}
    if kind == "causal":
        return {"is_causal": True}
    if kind.startswith("bool"):
        return {"attn_mask": values > -0.3}
    if kind == "hidden rows":
        keep = torch.ones(lengths, dtype=torch.bool)
        keep[: (lengths[0] + 1) // 2] = False
        return {"attn_mask": keep}
    return {"attn_mask": values.to(q.dtype)}


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Within a few roundings of the dtype, of values of order one."""
    assert found.dtype == dtype and found.shape == expected.shape
    atol = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(found.double(), expected.double(), atol=atol, rtol=0.0)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shapes", SHAPES)
def test_equals_torch_forward_and_backward(shapes: str, mask: str) -> None:
    results = []
    for function, wide in ((fastattn.scaled_dot_product_attention, False), (F.scaled_dot_product_attention, True)):
        q, k, v = (t.double() if wide else t for t in qkv(*SHAPES[shapes]))
        options = mask_of(mask, q, k)
        if "attn_mask" in options and options["attn_mask"].is_floating_point():
            options["attn_mask"] = options["attn_mask"].to(q.dtype).requires_grad_()
        inputs = [t.requires_grad_() for t in (q, k, v)]
        out = function(q, k, v, scale=0.4, **options)
        out.backward(draw(*out.shape, seed=5).to(out.dtype))
        inputs += [t for t in options.values() if isinstance(t, Tensor) and t.requires_grad]
        # An empty problem may leave a gradient out: that is a gradient of zeros.
        results.append([out.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad for t in inputs)])
    for found, expected in zip(*results, strict=True):
        close(found, expected, torch.float32)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64), ids=str)
def test_other_dtypes(dtype: torch.dtype, mask: str) -> None:
    q, k, v = qkv((2, 3, 6, 8), (2, 3, 9, 8), dtype=dtype)
    options = mask_of(mask, q, k)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dispatch.BackendWarning)  # float64 is the reference's
        out = fastattn.scaled_dot_product_attention(q, k, v, **options)
    wide = {name: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for name, t in options.items()}
    close(out, F.scaled_dot_product_attention(q.double(), k.double(), v.double(), **wide), dtype)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_float32_mask_beside_half_tensors(dtype: torch.dtype) -> None:
    q, k, v = qkv((2, 3, 6, 8), (2, 3, 9, 8), dtype=dtype)
    mask = draw(6, 9)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask.double())
    close(fastattn.scaled_dot_product_attention(q, k, v, mask), expected, dtype)


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 4, 5, 8), (2, 2, 7, 8)),
        ((2, 4, 5, 8), (2, 4, 7, 8)),
        ((4, 5, 8), (1, 7, 8)),
        ((2, 6, 5, 8), (1, 3, 7, 8)),
        ((2, 3, 4, 5, 8), (2, 3, 2, 7, 8)),
    ],
    ids=str,
)
@pytest.mark.parametrize("mask", MASKS[:4])
def test_grouped_heads(shapes: tuple[tuple[int, ...], ...], mask: str) -> None:
    q, k, v = qkv(*shapes)
    options = mask_of(mask, q, q[..., :1, :].expand(*q.shape[:-2], k.shape[-2], q.shape[-1]))
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True, **options)
    before = sum(dispatch.fallbacks.values())
    close(fastattn.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options), expected, torch.float32)
    assert sum(dispatch.fallbacks.values()) == before


def outcome(function: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
    try:
        out = function(*args, **options)
    except Exception as error:
        return type(error), str(error)
    return out.dtype, tuple(out.shape)


ONES = torch.ones
WRONG: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "vectors": ((ONES(4), ONES(4), ONES(4)), {}),
    "not a tensor": ((ONES(2, 2, 3, 4), None, ONES(2, 2, 3, 4)), {}),
    "dtypes differ": ((ONES(2, 2, 3, 4), ONES(2, 2, 3, 4).double(), ONES(2, 2, 3, 4)), {}),
    "integers": ((ONES(2, 2, 3, 4).int(),) * 3, {}),
    "complex": ((ONES(2, 2, 3, 4) + 0j,) * 3, {}),
    "head dims differ": ((ONES(2, 2, 3, 4), ONES(2, 2, 5, 6), ONES(2, 2, 5, 4)), {}),
    "batches do not broadcast": ((ONES(2, 2, 3, 4), ONES(3, 2, 5, 4), ONES(3, 2, 5, 4)), {}),
    "grouped heads without enable_gqa": ((ONES(2, 4, 3, 4), ONES(2, 2, 5, 4), ONES(2, 2, 5, 4)), {}),
    "heads that do not divide": ((ONES(2, 4, 3, 4), ONES(2, 3, 5, 4), ONES(2, 3, 5, 4)), {"enable_gqa": True}),
    "mask beside causal": ((*(ONES(2, 2, 3, 4),) * 3, ONES(3, 3).bool()), {"is_causal": True}),
    "integer mask": ((*(ONES(2, 2, 3, 4),) * 3, ONES(3, 3).int()), {}),
    "double mask": ((*(ONES(2, 2, 3, 4),) * 3, ONES(3, 3).double()), {}),
    "half mask": ((*(ONES(2, 2, 3, 4),) * 3, ONES(3, 3).bfloat16()), {}),
    "mask of another length": ((*(ONES(2, 2, 3, 4),) * 3, ONES(3, 4)), {}),
    "mask of a larger batch": ((*(ONES(1, 2, 3, 4),) * 3, ONES(2, 1, 3, 3)), {}),
    "mask of more dimensions": ((*(ONES(2, 2, 3, 4),) * 3, ONES(1, 2, 1, 3, 3)), {}),
    "mask of one dimension": ((*(ONES(2, 2, 3, 4),) * 3, ONES(3).bool()), {}),
    "negative dropout": ((ONES(2, 2, 3, 4),) * 3, {"dropout_p": -0.1}),
    "dropout above one": ((ONES(2, 2, 3, 4),) * 3, {"dropout_p": 1.5}),
    "dropout of one": ((ONES(2, 2, 3, 4),) * 3, {"dropout_p": 1.0}),
    "scale of text": ((ONES(2, 2, 3, 4),) * 3, {"scale": "half"}),
    "no head dim": ((ONES(2, 2, 3, 0),) * 3, {}),
    "large head dim": ((ONES(1, 1, 3, 300),) * 3, {}),
    "no heads beside a key without": ((ONES(3, 0, 8, 1), ONES(7, 1), ONES(3, 0, 7, 1)), {}),
    "meta": ((torch.ones(2, 2, 3, 4, device="meta"),) * 3, {}),
    "key heads without value heads": ((ONES(2, 4, 3, 4), ONES(2, 2, 5, 4), ONES(2, 1, 5, 4)), {"enable_gqa": True}),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.filterwarnings("ignore::fastattn.dispatch.BackendWarning")
def test_what_torch_refuses_or_computes_alone(case: str) -> None:
    """The same exception with the same text; or, where torch computes it, the same kind of result."""
    args, options = WRONG[case]
    expected = outcome(F.scaled_dot_product_attention, args, options)
    assert outcome(fastattn.scaled_dot_product_attention, args, options) == expected


@pytest.mark.parametrize("keys", [(2, 1, 7, 8), (1, 7, 8), (7, 8)], ids=str)
def test_gradients_of_one_key_head_for_all_are_rounded_once(keys: tuple[int, ...]) -> None:
    q, k, v = (t.requires_grad_() for t in qkv((2, 6, 5, 8), keys, dtype=torch.bfloat16))
    out = fastattn.scaled_dot_product_attention(q, k, v)
    dk, dv = torch.autograd.grad(out, (k, v), draw(2, 6, 5, 8, dtype=torch.bfloat16))
    grouped = [t.detach().expand(2, 1, 7, 8).requires_grad_() for t in (k, v)]
    out = fastattn.scaled_dot_product_attention(q, *grouped, enable_gqa=True)
    for found, expected in zip(
        (dk, dv), torch.autograd.grad(out, grouped, draw(2, 6, 5, 8, dtype=torch.bfloat16)), strict=True
    ):
        assert torch.equal(found, expected.sum_to_size(keys))


def test_falling_back_is_counted_and_warned_about() -> None:
    args = draw(1, 1, 3, 300), draw(1, 1, 3, 300), draw(1, 1, 3, 300)
    reason = "query has head dim 300; the kernels take 1 to 256"
    dispatch._warned.discard(("scaled_dot_product_attention", "fastattn", reason))
    before = dispatch.fallbacks[("scaled_dot_product_attention", "fastattn", reason)]
    with pytest.warns(dispatch.BackendWarning, match="head dim 300"):
        out = fastattn.scaled_dot_product_attention(*args)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(*args))
    assert dispatch.fallbacks[("scaled_dot_product_attention", "fastattn", reason)] == before + 1


def test_a_refusal_counts_no_fallback() -> None:
    before = sum(dispatch.fallbacks.values())
    with pytest.raises(RuntimeError):
        fastattn.scaled_dot_product_attention(ONES(4), ONES(4), ONES(4))
    assert sum(dispatch.fallbacks.values()) == before


def test_torch_function_subclasses_reach_torch() -> None:
    """CausalBias is a tensor subclass with a __torch_function__ of its own."""
    from torch.nn.attention.bias import causal_lower_right

    q, k, v = qkv((2, 3, 4, 8), (2, 3, 7, 8))
    bias = causal_lower_right(4, 7)
    torch.testing.assert_close(
        fastattn.scaled_dot_product_attention(q, k, v, bias), F.scaled_dot_product_attention(q, k, v, bias)
    )


def test_dropout_keeps_the_expectation_and_needs_no_training_flag() -> None:
    torch.manual_seed(0)
    q, k = draw(64, 2, 32, 8), draw(64, 2, 32, 8, seed=1)
    out = fastattn.scaled_dot_product_attention(q, k, torch.ones(64, 2, 32, 1), dropout_p=0.25)
    assert out.std() > 0.02
    assert abs(float(out.mean()) - 1.0) < 0.02


def test_compiles_whole() -> None:
    torch._dynamo.reset()
    q, k, v = qkv((2, 4, 5, 8), (2, 2, 7, 8))
    compiled = torch.compile(fastattn.scaled_dot_product_attention, fullgraph=True, backend="aot_eager")
    mask = draw(5, 7) > -0.3
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask, enable_gqa=True)
    close(compiled(q, k, v, mask, enable_gqa=True), expected, torch.float32)


def test_autocast_casts_as_torch_does() -> None:
    q, k, v = qkv((2, 3, 4, 8), (2, 3, 7, 8))
    with torch.autocast("cpu", torch.bfloat16):
        found = fastattn.scaled_dot_product_attention(q, k, v)
        expected = F.scaled_dot_product_attention(q, k, v)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


def test_a_mode_of_torch_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.device as a context, and torch.export, watch every call by a mode; ours must not become torch's for it."""
    q = ONES(2, 3, 8)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **options: pytest.fail("torch's ran"))
    with torch.device("cpu"):
        fastattn.scaled_dot_product_attention(q, q, q)


def test_a_dtensor_is_torchs() -> None:
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        q = torch.randn(2, 4, 9, 8)
        whole = distribute_tensor(q, init_device_mesh("cpu", (1,)), [Shard(1)])
        with pytest.warns(dispatch.BackendWarning, match="DTensor"):
            found = fastattn.scaled_dot_product_attention(whole, whole, whole)
        torch.testing.assert_close(found.to_local(), F.scaled_dot_product_attention(q, q, q))
    finally:
        torch.distributed.destroy_process_group()
