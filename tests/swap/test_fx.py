"""torch.fx over swapped models: what its tracer calls as it is stays one call, and runs the kernels."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn

import fastattn

WIDTH = 32


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.rms = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 4, 64, batch_first=True), 2)
        self.decoder = nn.TransformerDecoderLayer(WIDTH, 4, 64, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.rms(self.decoder(self.encoder(x), x)) + self.mlp(x)


def test_modules_of_torch_stay_one_call_that_runs_the_kernels() -> None:
    model = Model().eval()
    swapped = copy.deepcopy(model)
    report = fastattn.swap(swapped)
    before, after = fx.symbolic_trace(model), fx.symbolic_trace(swapped)
    assert [node.target for node in after.graph.nodes] == [node.target for node in before.graph.nodes]
    x = torch.randn(2, 7, WIDTH)
    with report.counting():
        result = after(x)
    torch.testing.assert_close(result, model(x))
    rows = {row.path: row for row in report.rows}
    for name in ("norm", "rms", "attention", "encoder", "decoder"):
        assert rows[name].calls == 1 and not rows[name].fallbacks, name


def test_nothing_of_it_stays_once_the_swap_is_undone() -> None:
    model = Model().eval()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    report = fastattn.swap(model)
    assert model.norm.__module__ != type(model.norm).__module__
    report.undo()
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
