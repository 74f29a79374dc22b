"""attention_decode beside attention over the same keys, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import dispatch, masks
from fastattn.biases import ALiBi
from fastattn.problems import DecodeProblem


def cache(lengths: list[int], room: int, heads: int = 2, dim: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values (NaN behind the lengths) and the lengths."""
    generator = torch.Generator().manual_seed(sum(lengths))
    keys, values = (torch.randn(len(lengths), heads, room, dim, generator=generator) for _ in range(2))
    for b, length in enumerate(lengths):
        keys[b, :, length:] = values[b, :, length:] = math.nan
    return keys, values, torch.tensor(lengths, dtype=torch.int32)


def paged(contiguous: Tensor, page: int) -> tuple[Tensor, Tensor]:
    """The same cache in shuffled pages, with their table."""
    batch, heads, room, dim = contiguous.shape
    count = room // page
    table = torch.randperm(batch * count, generator=torch.Generator().manual_seed(0)).view(batch, count).to(torch.int32)
    pages = torch.empty(batch * count, page, heads, dim)
    pages[table.flatten().long()] = contiguous.view(batch, heads, count, page, dim).permute(0, 2, 3, 1, 4).flatten(0, 1)
    return pages, table


@pytest.mark.parametrize("len_q", (1, 3))
@pytest.mark.parametrize("mask", (None, masks.Causal(), masks.SlidingWindow(40, 0), masks.Causal("top-left")), ids=repr)
def test_equals_attention_over_the_keys_in_use(mask: masks.Mask | None, len_q: int) -> None:
    keys, values, lengths = cache([300, 7, 512], 512)
    q = torch.randn(3, 6, len_q, 16, generator=torch.Generator().manual_seed(1))
    out, lse = fastattn.attention_decode(q, keys, values, lengths, mask=mask, return_lse=True)
    for b, length in enumerate(lengths.tolist()):
        used = (slice(b, b + 1), slice(None), slice(length))
        expected, expected_lse = fastattn.attention(q[b : b + 1], keys[used], values[used], mask=mask, return_lse=True)
        torch.testing.assert_close(out[b : b + 1], expected, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(lse[b : b + 1], expected_lse, atol=2e-6, rtol=1e-5)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("len_q", (1, 9))
def test_random_blocks_are_drawn_for_the_keys_in_use(len_q: int) -> None:
    """Beside a tensor, too, for which the mask is looked at over the whole cache."""
    keys, values, lengths = cache([64, 56, 40, 3], 64)
    q = torch.randn(4, 4, len_q, 16, generator=torch.Generator().manual_seed(1))
    mask = masks.PerHead([masks.BigBird(4, 1, 0, 2, seed) for seed in range(4)])
    expected = fastattn.attention_decode(q, keys, values, lengths, mask=mask)
    found = fastattn.attention_decode(
        q, keys, values, lengths, mask=mask & masks.KeyLengths(torch.tensor([64, 99, 64, 64]))
    )
    torch.testing.assert_close(found, expected)


def test_what_is_not_differentiated_is_decoded_under_torch_func() -> None:
    keys, values, lengths = cache([5, 8], 8)
    q = torch.randn(2, 2, 1, 16)

    def loss(weight: Tensor) -> Tensor:
        with torch.no_grad():
            out = fastattn.attention_decode(q, keys, values, lengths)
        return (weight * out).sum()

    expected = fastattn.attention_decode(q, keys, values, lengths).sum(dim=(0, 1, 2))
    torch.testing.assert_close(torch.func.grad(loss)(torch.ones(16)), expected)


@pytest.mark.parametrize("page", (16, 64))
def test_pages_are_bitwise_the_contiguous_cache(page: int) -> None:
    keys, values, lengths = cache([200, 0, 255], 256)
    q = torch.randn(3, 4, 2, 16, generator=torch.Generator().manual_seed(1))
    (k_pages, table), (v_pages, _) = paged(keys, page), paged(values, page)
    for b, length in enumerate(lengths.tolist()):
        table[b, math.ceil(length / page) :] = 1 << 20  # never read
    options: dict[str, Any] = {"mask": masks.Causal(), "softcap": 20.0, "sinks": torch.ones(4)}
    expected = fastattn.attention_decode(q, keys, values, lengths, **options)
    found = fastattn.attention_decode(q, k_pages, v_pages, lengths, block_table=table, **options)
    assert torch.equal(found, expected)
    assert not found.isnan().any()


def test_an_empty_cache_gives_zero_and_minus_infinity() -> None:
    keys, values, lengths = cache([0, 0], 8)
    out, lse = fastattn.attention_decode(torch.ones(2, 2, 1, 16), keys, values, lengths, return_lse=True)
    assert not out.any()
    assert (lse == -math.inf).all()


@pytest.mark.parametrize("mask", (None, masks.Causal(), masks.Strided(2), torch.ones(3, 1, 0, 8).bool()), ids=str)
def test_no_new_tokens_give_nothing(mask: masks.Mask | Tensor | None, backend: str) -> None:
    keys, values, lengths = cache([8, 0, 5], 8)
    q = torch.randn(3, 4, 0, 16)
    options: dict[str, Any] = {"mask": mask, "bias": ALiBi(torch.ones(4)), "backend": backend}
    out, lse = fastattn.attention_decode(q, keys, values, lengths, return_lse=True, **options)
    assert out.shape == (3, 4, 0, 16) and lse.shape == (3, 4, 0)


def test_bool_mask_and_bias_index_places_in_the_cache() -> None:
    keys, values, lengths = cache([20, 11], 24)
    q = torch.randn(2, 2, 1, 16, generator=torch.Generator().manual_seed(1))
    keep = torch.rand(2, 1, 1, 24, generator=torch.Generator().manual_seed(2)) > 0.4
    bias = torch.randn(2, 1, 24, generator=torch.Generator().manual_seed(3))
    out = fastattn.attention_decode(q, keys, values, lengths, mask=keep, bias=bias)
    for b, length in enumerate(lengths.tolist()):
        used = (slice(b, b + 1), slice(None), slice(length))
        expected = fastattn.attention(
            q[b : b + 1], keys[used], values[used], mask=keep[b : b + 1, ..., :length], bias=bias[..., :length]
        )
        torch.testing.assert_close(out[b : b + 1], expected, atol=2e-6, rtol=1e-5)


PER_SEQUENCE = {
    "ranges": masks.KeyRange([3, 0, 100], [290, 5, 400]),
    "ranges and window": masks.KeyRange([3, 0, 100], [290, 5, 400]) & masks.SlidingWindow(250, 0),
    "keys and causal": masks.KeyMask(torch.arange(3 * 512).view(3, 512) % 5 > 1) & masks.Causal(),
    "several ranges": masks.KeyRange([3, 0, 100], [290, 5, 400]) & (masks.SlidingWindow(90, 0) | masks.GlobalTokens(2)),
    "blocks": masks.KeyRange([3, 0, 100], [290, 5, 400]) & masks.Dilated(20, 3),
}


@pytest.mark.parametrize("page", (0, 8))
def test_dispatch_knows_the_sizes_of_a_call(page: int) -> None:
    keys, values, lengths = cache([24, 3], 24)
    table = None
    if page:
        (keys, table), (values, _) = paged(keys, page), paged(values, page)
    q, keys, values = torch.randn(2, 6, 3, 16).double(), keys.double(), values[..., :5].double()
    with pytest.raises(fastattn.NotSupported) as error:
        fastattn.attention_decode(q, keys, values, lengths, block_table=table, backend="triton")
    sizes = {"batch": 2, "heads_q": 6, "heads_kv": 2, "len_q": 3, "len_k": 24, "dim_qk": 16, "dim_v": 5}
    assert error.value.problem == DecodeProblem("cpu", torch.float64, **sizes, paged=bool(page))


@pytest.mark.skipif(dispatch.backends()["cpu"] is not None, reason="the CPU backend is unavailable")
def test_the_cpu_takes_caches_of_more_keys_than_gpus_do() -> None:
    q, (key, value) = torch.randn(1, 4, 3, 8), torch.randn(2, 1, 2, 1, 8)
    found = []
    for room in (100, 2**31 - 1):
        k, v = key.expand(-1, -1, room, -1), value.expand(-1, -1, room, -1)
        options: dict[str, Any] = {"mask": masks.SlidingWindow(3, 0), "bias": ALiBi(torch.ones(4)), "return_lse": True}
        length = torch.tensor([room - 5], dtype=torch.int32)
        found.append(fastattn.attention_decode(q, k, v, length, backend="cpu", **options))
    for near, far in zip(*found, strict=True):
        assert torch.equal(near, far)


def test_pages_without_room_hold_no_keys() -> None:
    cache, table = torch.zeros(3, 0, 2, 16), torch.tensor([[7, 9]], dtype=torch.int32)
    q, lengths = torch.randn(1, 2, 1, 16), torch.zeros(1, dtype=torch.int32)
    out, lse = fastattn.attention_decode(q, cache, cache, lengths, block_table=table, return_lse=True)
    assert torch.equal(out, torch.zeros_like(q)) and torch.isneginf(lse).all()


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize("len_q", (1, 3))
@pytest.mark.parametrize("name", PER_SEQUENCE)
def test_masks_with_tensors_for_each_sequence(name: str, len_q: int, backend: str) -> None:
    """Beside the dense mask of each sequence; keys that nobody sees hold NaN."""
    mask = PER_SEQUENCE[name]
    keys, values, lengths = cache([300, 7, 512], 512)
    q = torch.randn(3, 6, len_q, 16, generator=torch.Generator().manual_seed(1))
    whole = mask & masks.Causal()
    seen = torch.zeros(3, 6, len_q, 512, dtype=torch.bool)
    for b, length in enumerate(lengths.tolist()):
        # by places in the cache for what has tensors, by positions about the last key for the rest
        for i in range(len_q):
            position = length - len_q + i
            seen[b, :, i, :length] = whole.to_dense(3, 6, 512, 512)[b, :, position, :length]
    hidden = ~seen.any(dim=2).any(dim=1)[:, None, :, None]
    spoiled = (tensor.masked_fill(hidden, math.nan) for tensor in (keys, values))
    out = fastattn.attention_decode(q, *spoiled, lengths, mask=mask & masks.Causal(), backend=backend)
    clean = (tensor.nan_to_num() for tensor in (keys, values))
    torch.testing.assert_close(out, fastattn.attention(q, *clean, mask=seen), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize("kind", ("mask", "bias", "float mask", "ranges"))
def test_hidden_keys_may_hold_anything(kind: str, backend: str) -> None:
    keys, values, lengths = cache([60, 33], 64)
    seen = (torch.arange(64) < 7) | (torch.arange(64) > 30)
    keys[:, :, ~seen] = values[:, :, ~seen] = math.nan
    hidden = torch.zeros(64).masked_fill(~seen, -math.inf)
    given: dict[str, Any] = {
        "mask": {"mask": seen},
        "bias": {"bias": hidden},
        "float mask": {"mask": hidden},
        "ranges": {"mask": torch.tensor([31, 64], dtype=torch.int32).expand(2, 1, 2, 2)},
    }[kind]
    out = fastattn.attention_decode(torch.ones(2, 2, 2, 16), keys, values, lengths, **given, backend=backend)
    assert out.isfinite().all()


@pytest.mark.parametrize("len_q", (1, 8, 9))
@pytest.mark.parametrize("spoiled", ("q", "k", "one k"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_nan_that_is_seen_comes_out(len_q: int, spoiled: str, dtype: torch.dtype) -> None:
    """In the kernel for few queries as in the other; a NaN must not be taken for a query that sees nothing."""
    q, k, v = torch.ones(1, 2, len_q, 16), torch.ones(1, 2, 900, 16), torch.ones(1, 2, 900, 16)
    if spoiled == "q":
        q[0, 1, 0, 3] = math.nan
    else:
        k[0, 1, slice(None) if spoiled == "k" else 700, 3] = math.nan
    out, lse = fastattn.attention(*(x.to(dtype) for x in (q, k, v)), return_lse=True)
    assert out[0, 1, 0].isnan().all()
    assert lse[0, 1, 0].isnan()
    assert out[0, 0].isfinite().all()


@pytest.mark.parametrize("threads", (1, 2, 3))
def test_the_thread_count_changes_no_bit(threads: int) -> None:
    keys, values, lengths = cache([2000, 700], 2048, heads=1)
    q = torch.randn(2, 8, 1, 16, generator=torch.Generator().manual_seed(1))
    before = torch.get_num_threads()
    expected = fastattn.attention_decode(q, keys, values, lengths)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(fastattn.attention_decode(q, keys, values, lengths), expected)
    finally:
        torch.set_num_threads(before)


def test_compiles_whole() -> None:
    torch._dynamo.reset()
    keys, values, lengths = cache([20, 11], 24)
    q = torch.randn(2, 2, 1, 16, generator=torch.Generator().manual_seed(1))

    def step(q: Tensor) -> Tensor:
        return fastattn.attention_decode(q, keys, values, lengths, mask=masks.SlidingWindow(5, 0))

    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(q), step(q))


ARGUMENTS = {
    "q": torch.zeros(2, 4, 1, 16),
    "k_cache": torch.zeros(2, 2, 8, 16),
    "v_cache": torch.zeros(2, 2, 8, 16),
    "cache_lengths": torch.zeros(2, dtype=torch.int32),
}
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rank of q": ({"q": torch.zeros(2, 4, 16)}, ValueError, r"q has 3 dimensions.*\(batch, heads"),
    "integer q": ({"q": torch.zeros(2, 4, 1, 16).int()}, TypeError, "q has dtype torch.int32"),
    "dtypes": ({"k_cache": torch.zeros(2, 2, 8, 16).bfloat16()}, TypeError, "k_cache has dtype torch.bfloat16 but q"),
    "batch": ({"k_cache": torch.zeros(3, 2, 8, 16)}, ValueError, "v_cache has shape .* beside k_cache"),
    "head dim": ({"q": torch.zeros(2, 4, 1, 8)}, ValueError, "k_cache has head dim 16 but q 8"),
    "heads": ({"q": torch.zeros(2, 3, 1, 16)}, ValueError, "no multiple of the 2 heads"),
    "lengths int64": ({"cache_lengths": torch.zeros(2).long()}, TypeError, "cache_lengths is of torch.int64"),
    "lengths shape": ({"cache_lengths": torch.zeros(3, dtype=torch.int32)}, ValueError, "cache_lengths has shape"),
    "lengths a list": ({"cache_lengths": [1, 2]}, TypeError, "cache_lengths is of list"),
    "table": ({"block_table": torch.zeros(3, 1, dtype=torch.int32)}, ValueError, r"block_table has shape \(3, 1\)"),
    "mask dtype": ({"mask": torch.zeros(8).long()}, TypeError, "mask has dtype torch.int64: pass bool"),
    "lengths beyond the cache": ({"cache_lengths": torch.tensor([8, 9]).int()}, ValueError, "holds 9, but .* 8 keys"),
    "negative lengths": ({"cache_lengths": torch.tensor([8, -1]).int()}, ValueError, "holds -1, but .* 8 keys"),
    "lengths beyond the cache, read for a mask": (
        {"cache_lengths": torch.tensor([8, 9]).int(), "mask": masks.Dilated(2, 2)},
        ValueError,
        "holds 9, but .* 8 keys",
    ),
    "pages": (
        {
            "k_cache": torch.zeros(2, 8, 2, 16),
            "v_cache": torch.zeros(2, 8, 2, 16),
            "block_table": torch.tensor([[0, 5], [9, 2]]).int(),
            "cache_lengths": torch.tensor([2, 3]).int(),
        },
        ValueError,
        r"block_table\[1\] names page 9, but the cache has 2",
    ),
    "lowered mask": (
        {"mask": masks.Causal("top-left").lower(2, 4, 1, 8, torch.device("cpu"))},
        ValueError,
        "a band that is not about the last key",
    ),
    "mask kind": ({"mask": "causal"}, TypeError, "mask is a str"),
    "softcap": ({"softcap": -1.0}, ValueError, "softcap=-1.0 is not positive"),
    "lengths missing": ({"cache_lengths": None}, TypeError, "cache_lengths is of NoneType"),
    "gradient of a mask": ({"mask": torch.zeros(8, requires_grad=True)}, ValueError, "has no gradient, and one of"),
    "gradient": ({"q": torch.zeros(2, 4, 1, 16, requires_grad=True)}, ValueError, "attention_decode has no gradient"),
    "backend": ({"backend": "gpu"}, ValueError, "backend='gpu' is unknown"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_named(case: str) -> None:
    change, error, text = WRONG[case]
    with pytest.raises(error, match=text):
        fastattn.attention_decode(**{**ARGUMENTS, **change})


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize("len_q", (1, 9))
def test_what_is_hidden_does_not_matter_whatever_hides_it(len_q: int, backend: str) -> None:
    """A key of one head alone, and the bias of a distance that the mask hides."""
    q, k, v = torch.ones(1, 2, len_q, 8), torch.ones(1, 2, 20, 8), torch.ones(1, 2, 20, 8)
    v[0, 0, 2] = math.nan
    mask = torch.ones(1, 2, len_q, 20, dtype=torch.bool)
    mask[0, 0, :, 2] = False
    table = torch.zeros(1, 2 * 20 + 1)
    table[0, 20 - 3] = math.nan  # three places before the query
    position = torch.arange(len_q) + 20 - len_q
    mask[..., torch.arange(len_q), position - 3] = False
    bias = fastattn.biases.RelativeBias(table)
    assert fastattn.attention(q, k, v, mask=mask, bias=bias, backend=backend).isfinite().all()


TOP_LEFT = (
    masks.Causal("top-left"),
    masks.Causal() & masks.Causal("top-left"),
    masks.SlidingWindow(3, None) & masks.Causal("top-left"),
    masks.SinkTokens(1) | masks.Causal("top-left"),
)
WITH_TENSORS = (
    masks.KeyMask(torch.arange(24)[None] % 3 > 0) | masks.Causal(),
    (masks.SlidingWindow(5, 0) | masks.SinkTokens(1)) & masks.KeyMask(torch.arange(24)[None] != 2),
    ~masks.KeyMask(torch.arange(24)[None] % 3 > 0) & (masks.SlidingWindow(9, 0) | masks.SinkTokens(3)),
)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize("mask", TOP_LEFT + WITH_TENSORS, ids=repr)
def test_positions_count_by_each_length_and_tensors_by_places(mask: masks.Mask, backend: str) -> None:
    keys, values, lengths = cache([20, 4, 24], 24)
    q = torch.randn(3, 2, 4, 16, generator=torch.Generator().manual_seed(1))
    out = fastattn.attention_decode(q, keys, values, lengths, mask=mask, backend=backend)
    for b, length in enumerate(lengths.tolist()):
        if mask in WITH_TENSORS:  # of a square, whose last queries are the new ones: there all lengths agree
            seen = mask.to_dense(1, 1, 24, 24)[:, :, length - 4 : length, :length]
        else:
            seen = mask.to_dense(1, 1, 4, length)
        used = (slice(b, b + 1), slice(None), slice(length))
        expected = fastattn.attention(q[b : b + 1], keys[used], values[used], mask=seen)
        torch.testing.assert_close(out[b : b + 1], expected, atol=2e-6, rtol=1e-5)
