"""attention_decode beside attention over the same keys, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import masks


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
    "mask dtype": ({"mask": torch.zeros(8)}, TypeError, "mask has dtype torch.float32: pass bool"),
    "mask kind": ({"mask": "causal"}, TypeError, "mask is a str"),
    "softcap": ({"softcap": -1.0}, ValueError, "softcap=-1.0 is not positive"),
    "gradient": ({"q": torch.zeros(2, 4, 1, 16, requires_grad=True)}, ValueError, "attention_decode has no gradient"),
    "backend": ({"backend": "gpu"}, ValueError, "backend='gpu' is unknown"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_named(case: str) -> None:
    change, error, text = WRONG[case]
    with pytest.raises(error, match=text):
        fastattn.attention_decode(**{**ARGUMENTS, **change})
