"""The tables of tile shapes have an answer for every call, and say what they were measured on."""

from __future__ import annotations

import pytest

from fastattn.kernels.tiles import TABLE, attention_tile, decode_tile, pieces


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


# The comments say what triton 3.7 takes for more, in KiB; compile_check compiles what is chosen.
@pytest.mark.parametrize(
    ("arch", "dim", "pair_bytes", "expected"),
    [
        (90, 64, 0, (128, 64, 3)),
        (86, 64, 2, (128, 64, 3)),
        (86, 64, 4, (128, 64, 2)),  # 112 of 99 with three stages
        (120, 64, 4, (128, 64, 2)),
        (86, 64, 9, (64, 64, 2)),  # 104 of 99 with two
        (86, 128, 5, (64, 64, 2)),
        (80, 128, 5, (128, 64, 2)),  # 168 of 163
        (90, 128, 5, (128, 64, 3)),
        (90, 128, 9, (128, 64, 2)),  # 264 of 227
        (90, 256, 1, (128, 64, 2)),
        (90, 256, 5, (64, 64, 2)),  # 232 of 227
    ],
)
def test_what_a_forward_loads_for_pairs_has_room(
    arch: int, dim: int, pair_bytes: int, expected: tuple[int, int, int]
) -> None:
    tile = attention_tile("forward", arch, 2, dim, dim, False, pair_bytes == 0, pair_bytes)
    assert (tile.block_q, tile.block_k, tile.stages) == expected
    assert tile.warps == (8 if tile.block_q == 128 else 4)


def test_decoding_on_small_gpus_has_two_stages_for_many_rows_or_biases() -> None:
    assert decode_tile(90, 64, 128, 2, 8).stages == decode_tile(86, 16, 128, 2, 4).stages == 3
    assert decode_tile(86, 64, 128, 2, 0).stages == decode_tile(120, 1, 128, 2, 8).stages == 2
