"""The tables of tile shapes have an answer for every call, and say what they were measured on."""

from __future__ import annotations

import pytest

from fastattn.kernels.tiles import TABLE, attention_tile, pieces


def test_pieces_cover_a_head_dim_with_little_padding() -> None:
    assert [pieces(d) for d in (1, 16, 17, 40, 64, 80, 96, 128, 192, 200, 256)] == [
        (16, 0), (16, 0), (32, 0), (32, 16), (64, 0), (64, 16), (64, 32), (128, 0), (128, 64), (256, 0), (256, 0),
    ]  # fmt: skip
    for dim in range(1, 257):
        wide, rest = pieces(dim)
        power = 1 << max(4, (dim - 1).bit_length())
        assert dim <= wide + rest <= power
        assert all(n == 0 or (n >= 16 and n & (n - 1) == 0) for n in (wide, rest))


@pytest.mark.parametrize("kernel", TABLE)
@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_call_has_a_tile(kernel: str, arch: int, itemsize: int) -> None:
    for dim in (1, 64, 65, 128, 129, 256):
        for blocks in (False, True):
            tile = attention_tile(kernel, arch, itemsize, dim, 16, blocks)
            assert tile == attention_tile(kernel, arch, itemsize, 16, dim, blocks)
            assert tile.block_k <= 64 or not blocks
            assert tile.block_k % 32 == 0  # a dropout call makes 32 columns
            assert tile.measured


def test_only_plain_calls_have_a_register_limit_and_tight_tiles() -> None:
    forward = attention_tile("forward", 90, 2, 64, 64, False)
    assert forward.options(True) == {"num_warps": 8, "num_stages": 3, "maxnreg": 128}
    assert forward.options(False) == {"num_warps": 8, "num_stages": 3}
    for kernel in ("queries", "keys"):
        plain, roomy = (attention_tile(kernel, 90, 2, 64, 64, False, plain) for plain in (True, False))
        assert plain.warps < roomy.warps
        assert attention_tile(kernel, 80, 2, 64, 64, False, False) == attention_tile(kernel, 80, 2, 64, 64, False)
