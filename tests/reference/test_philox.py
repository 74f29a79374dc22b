"""Philox4x32-10 against Random123's known answers, and the dropout rule against a loop over it."""

from __future__ import annotations

import pytest
import torch

from fastattn.reference.philox import dropout_scale, dropout_threshold, keep_mask, philox4x32

ONES = 0xFFFFFFFF
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def words(values):
    return tuple(torch.tensor(value, dtype=torch.int64) for value in values)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    assert tuple(int(w) for w in philox4x32(words(counter), words(key))) == expected


@pytest.mark.parametrize("seed", [0, 1, 2**40 + 12345, 2**63 - 1, -5])
def test_keep_mask_follows_the_rule_element_by_element(seed):
    entries, rows, columns, p = 2, 3, 71, 0.3
    mask = keep_mask(torch.tensor([seed]), p, entries, rows, columns)
    assert mask.shape == (entries, rows, columns)
    key = (seed & ONES, (seed >> 32) & ONES)
    for entry in range(entries):
        for i in range(rows):
            for j in range(columns):
                counter = (i, 4 * (j >> 5) + ((j & 7) >> 1), entry, 0)
                output = [int(w) for w in philox4x32(words(counter), words(key))]
                n = 2 * ((j & 31) >> 3) + (j & 1)
                lane = (output[n >> 1] >> (16 * (n & 1))) & 0xFFFF
                assert bool(mask[entry, i, j]) == (lane >= round(65536 * p)), (entry, i, j)


def test_a_longer_sequence_draws_the_same_mask_in_front():
    seed = torch.tensor([99])
    assert torch.equal(keep_mask(seed, 0.5, 2, 4, 40), keep_mask(seed, 0.5, 3, 9, 100)[:2, :4, :40])


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9])
def test_rate_and_scale(p):
    kept = keep_mask(torch.tensor([7]), p, 1, 400, 1000).double().mean().item()
    t = dropout_threshold(p)
    share = (65536 - t) / 65536
    assert abs(kept - share) < 5 * (share * (1 - share) / 400_000) ** 0.5 + 1e-12
    assert dropout_scale(p) * share == pytest.approx(1.0)
