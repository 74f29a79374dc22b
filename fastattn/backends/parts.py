"""Into how many parts the keys of a cache are cut on a GPU, from sizes alone: lengths are not read on the host."""

from __future__ import annotations

from fastattn.masks.lowered import LoweredMask


def keys_seen(room: int, len_q: int, mask: LoweredMask) -> int:
    """How many keys of a sequence the band leaves at most."""
    if mask.band_left is None:
        return room
    right = 0 if mask.band_right is None else min(mask.band_right, room)
    return max(1, min(room, len_q + mask.band_left + right))


def cut(entries: int, keys: int, block: int, wanted: int) -> tuple[int, int]:
    """Into how many parts the keys of each of `entries` are cut, and the keys of one, whole blocks: about `wanted`
    parts of all entries together, fewer where there are not so many blocks, and no part without a block."""
    blocks = max(1, -(-keys // block))
    per_part = -(-blocks // max(1, min(-(-wanted // entries), blocks)))
    return -(-blocks // per_part), per_part * block
