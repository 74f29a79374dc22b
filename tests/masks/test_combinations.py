"""Random and/or/not combinations of every mask: the lowered form is the definition, and kernels count the same keys."""

from __future__ import annotations

import pytest
import torch

from fastattn.masks import visible
from fastattn.parity.draw import Draw
from fastattn.parity.histogram import check_mask_histogram
from fastattn.parity.mask_cases import MaskDraw
from fastattn.parity.rule import failures

CPU = torch.device("cpu")
SIZES = (1, 2, 31, 63, 64, 65, 100, 127, 128, 129, 191, 193)
COMBINATIONS = 500


def drawn(index):
    """A combination of masks, two levels deep or three, and the shape of its call."""
    draw = Draw(2024, index)
    shape = (draw.integer(1, 2), draw.integer(1, 3), draw.one_of(SIZES), draw.one_of(SIZES))
    return MaskDraw(draw, *shape).combination(draw.integer(1, 3)), shape, draw


@pytest.mark.parametrize("part", range(5))
def test_the_lowered_form_is_the_definition(part):
    forms = {"intervals": 0, "blocks": 0, "key_bits": 0, "dense": 0}
    for index in range(part, COMBINATIONS, 5):
        mask, shape, _ = drawn(index)
        expected = mask.to_dense(*shape)
        lowered = mask.lower(*shape, CPU)
        seen = visible(lowered, *shape[2:], CPU)
        seen = torch.ones(shape, dtype=torch.bool) if seen is None else seen.expand(shape)
        assert torch.equal(seen, expected), f"combination {index}: {mask} at {shape}"
        for name in forms:
            forms[name] += getattr(lowered, name) is not None
    assert min(forms.values()) > 0, forms


# The kernels count all of them in `make test`; the reference, which is slow and reads the same lowered form, later.
PARTS = [("cpu", part) for part in range(5)]
PARTS += [pytest.param("reference", part, marks=pytest.mark.slow) for part in range(5)]


@pytest.mark.parametrize(("backend", "part"), PARTS, indirect=["backend"])
def test_attention_sees_exactly_these_keys(backend, part):
    for index in range(part, COMBINATIONS, 5):
        mask, (batch, heads, len_q, len_k), draw = drawn(index)
        kv = draw.one_of([n for n in range(1, heads + 1) if heads % n == 0])
        rows = check_mask_histogram(mask, batch, heads, kv, len_q, len_k, torch.float32, backend)
        assert not failures(rows), f"combination {index}: {mask}\n{failures(rows)}"


@pytest.mark.parametrize("name", MaskDraw.NAMES)
def test_every_named_mask_round_tile_borders(backend, name):
    for index, (len_q, len_k) in enumerate([(64, 64), (65, 63), (1, 129), (127, 128), (193, 65), (128, 320)]):
        draw = Draw(77, index)
        mask = getattr(MaskDraw(draw, 2, 2, len_q, len_k), name)()
        rows = check_mask_histogram(mask, 2, 2, 1, len_q, len_k, torch.float32, backend)
        assert not failures(rows), f"{mask} at {len_q} x {len_k}\n{failures(rows)}"
