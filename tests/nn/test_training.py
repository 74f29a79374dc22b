"""Training with and without the swap, from the same seed and without dropout: the loss curves.

Two correct implementations differ by rounding, and training carries that on. How far is measured: by torch itself in
the tested precision, against torch in float64 from the same weights, on the batch as it is and with its rows in another
order. At every step the swapped model may lie no further from float64 than twice what torch did up to that step, plus
the rounding of the loss itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import swap

VOCABULARY, LENGTH, BATCH, WIDTH = 12, 7, 16, 32


class Translator(nn.Module):
    """Reads a sequence, writes it backwards: nn.Transformer between embeddings and a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH + 1, WIDTH)
        self.transformer = nn.Transformer(WIDTH, 4, 2, 2, 64, dropout=0.0, batch_first=True)
        self.project = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, source: Tensor, padding: Tensor) -> Tensor:
        lengths = (~padding).sum(dim=1, keepdim=True)
        place = (lengths - 1 - torch.arange(LENGTH)).clamp(min=0)
        target = source.gather(1, place).masked_fill(padding, 0)
        before = F.pad(target, (1, 0))[:, :-1]
        causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        hidden = self.transformer(
            self._embed(source),
            self._embed(before),
            tgt_mask=causal,
            src_key_padding_mask=padding,
            tgt_key_padding_mask=padding,
            memory_key_padding_mask=padding,
        )
        return F.cross_entropy(self.project(hidden)[~padding].double(), target[~padding])

    def _embed(self, tokens: Tensor) -> Tensor:
        return self.tokens(tokens) + self.places(torch.arange(tokens.shape[1]))


class Classifier(nn.Module):
    """Tells which token a sequence begins with, by the mean over an nn.TransformerEncoder's output."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, dropout=0.0, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(WIDTH))
        self.project = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, source: Tensor, padding: Tensor) -> Tensor:
        x = self.tokens(source) + self.places(torch.arange(LENGTH))
        hidden = self.encoder(x, src_key_padding_mask=padding).masked_fill(padding[..., None], 0.0)
        return F.cross_entropy(self.project(hidden.mean(dim=1)).double(), source[:, 0])


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Tokens (B, S) without 0, and which of them are padding."""
    generator = torch.Generator().manual_seed(step)
    source = torch.randint(1, VOCABULARY, (BATCH, LENGTH), generator=generator)
    lengths = torch.randint(2, LENGTH + 1, (BATCH, 1), generator=generator)
    return source, torch.arange(LENGTH) >= lengths


def losses(model: nn.Module, steps: int, autocast: bool, order: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """The loss of every step of Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    curve = []
    for step in range(steps):
        source, padding = map(order, batch(step))
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(source, padding)
        loss.backward()
        optimizer.step()
        curve.append(loss.detach().double())
    return torch.stack(curve)


@pytest.mark.parametrize("steps", [pytest.param(40, id="short"), pytest.param(300, id="long", marks=pytest.mark.slow)])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16 autocast"])
@pytest.mark.parametrize("model_class", [Translator, Classifier])
def test_loss_curves(model_class: type[nn.Module], autocast: bool, steps: int) -> None:
    torch.manual_seed(0)
    model = model_class()
    truth = losses(copy.deepcopy(model).double(), steps, autocast=False)
    gaps = [
        (losses(copy.deepcopy(model), steps, autocast, order) - truth).abs()
        for order in (lambda x: x, lambda x: x.flip(0), lambda x: x.roll(5, 0))
    ]
    report = swap(model, strict=True)
    with report.counting():
        found = losses(model, steps, autocast)
    assert report.all_called
    roundoff = 2.0**-8 if autocast else 2.0**-24
    allowed = 2 * torch.stack(gaps).amax(dim=0).cummax(dim=0).values + 2 * roundoff * truth
    worst = ((found - truth).abs() / allowed).max()
    assert worst <= 1.0, f"{worst:.3g} times what rounding explains"
    assert truth[-5:].mean() < 0.9 * truth[:5].mean()
