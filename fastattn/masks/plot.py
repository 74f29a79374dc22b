"""Pictures of masks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fastattn.masks.intervals import BLOCK
from fastattn.masks.tiles import EMPTY, FULL, UNKNOWN

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fastattn.masks.base import Mask

_KINDS = ((EMPTY, "empty", "#f1f2f5"), (UNKNOWN, "partial", "#e3a857"), (FULL, "full", "#2f6690"))
_INK = "#2b3140"
_LINE = 70  # characters of a title


def plot(mask: Mask, len_q: int, len_k: int, ax: Axes | None, entry: int, head: int) -> Axes:
    """See `Mask.plot`. Raises IndexError where the mask has no such batch entry or head."""
    try:
        import matplotlib.pyplot as plt
        from matplotlib.colors import ListedColormap
        from matplotlib.patches import Patch
    except ImportError:
        raise ImportError("Mask.plot needs matplotlib, which is not installed: pip install 'fastattn[plot]'") from None

    grid = mask.tiles(len_q, len_k)
    batches, heads = grid.shape[:2]
    for name, value, count in (("entry", entry, batches), ("head", head, heads)):
        if count > 1 and not 0 <= value < count:
            raise IndexError(f"{name}={value} is not one of the {count} that the mask has: pass 0 to {count - 1}")
    tiles = grid[min(entry, batches - 1), min(head, heads - 1)].cpu()
    if ax is None:
        _, ax = plt.subplots(figsize=(6.2, 6.2 * min(max(len_q / max(len_k, 1), 0.4), 1.6) + 0.9), layout="constrained")
    colours = ListedColormap([colour for _, _, colour in _KINDS])
    # Whole tiles lie beyond the last query and key: the limits below cut them off at the lengths.
    extent = (0, BLOCK * max(tiles.shape[1], 1), BLOCK * max(tiles.shape[0], 1), 0)
    shown = tiles if tiles.numel() else torch.zeros(1, 1)
    ax.imshow(
        shown.numpy(), cmap=colours, vmin=EMPTY, vmax=FULL, extent=extent, interpolation="nearest", aspect="equal"
    )
    ax.set_xlim(0, max(len_k, 1))
    ax.set_ylim(max(len_q, 1), 0)
    if max(tiles.shape, default=0) <= 40:
        for edge in range(0, extent[1], BLOCK):
            ax.axvline(edge, color="white", linewidth=0.6)
        for edge in range(0, extent[2], BLOCK):
            ax.axhline(edge, color="white", linewidth=0.6)
    ax.set_xlabel("key", color=_INK)
    ax.set_ylabel("query", color=_INK)
    ax.xaxis.set_label_position("top")
    ax.xaxis.tick_top()
    ax.tick_params(colors=_INK, length=3, labelsize=8)
    ax.spines[:].set_color("#9aa3b2")
    ax.set_title(_title(mask, batches, heads, entry, head), color=_INK, fontsize=10, pad=10)
    legend = []
    for state, name, colour in _KINDS:
        share = float((tiles == state).float().mean()) if tiles.numel() else 0.0
        legend.append(Patch(facecolor=colour, edgecolor="#9aa3b2", linewidth=0.6, label=f"{name} {_percent(share)}"))
    ax.legend(
        handles=legend,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.02),
        ncols=3,
        frameon=False,
        fontsize=9,
        labelcolor=_INK,
        title="tiles of 64 x 64",
        title_fontsize=8,
    )
    return ax


def _percent(share: float) -> str:
    """Three digits at most, and a small share never shown as none."""
    if 0.0 < share < 0.001:
        return "<0.1 %"
    return f"{100 * share:.0f} %" if share in (0.0, 1.0) else f"{100 * share:.1f} %"


def _title(mask: Mask, batches: int, heads: int, entry: int, head: int) -> str:
    words, lines = repr(mask).split(" "), [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word) >= _LINE:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    which = [
        f"{name} {value}"
        for name, value, count in (("batch entry", entry, batches), ("head", head, heads))
        if count > 1
    ]
    return "\n".join(lines + ([f"({', '.join(which)})"] if which else []))
