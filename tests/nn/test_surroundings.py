"""Swapped models of nn.Transformer inside what PyTorch users put around them."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastattn import swap

WIDTH, SOURCE, TARGET = 16, 6, 5


def transformer(**options: Any) -> nn.Transformer:
    torch.manual_seed(0)
    settings = {"dropout": 0.0, "batch_first": True, "activation": "gelu", **options}
    return nn.Transformer(WIDTH, 2, 2, 1, 32, **settings)


def batch() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    padding = torch.zeros(4, SOURCE, dtype=torch.bool)
    padding[1, 4:] = True
    return {
        "src": torch.randn(4, SOURCE, WIDTH, generator=generator),
        "tgt": torch.randn(4, TARGET, WIDTH, generator=generator),
        "tgt_mask": torch.ones(TARGET, TARGET, dtype=torch.bool).triu(1),
        "tgt_is_causal": True,
        "src_key_padding_mask": padding,
        "memory_key_padding_mask": padding,
    }


def gradients(of: nn.Module | list[Tensor], out: Tensor) -> list[Tensor]:
    """Of a weighted sum: that of the squares of a LayerNorm's output would hardly change at all."""
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    return list(torch.autograd.grad((out * weights).sum(), list(of.parameters()) if isinstance(of, nn.Module) else of))


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    """Both in float32, to the rounding of the largest of the values: what is small here is what is left of large terms
    that cancel, as the gradient of a key's bias is."""
    largest = max(float(b.abs().max()) for b in expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2**-20 * largest, rtol=1e-4)


@pytest.mark.parametrize(
    ("training", "norm_first"),
    [
        (True, True),
        (False, False),
        pytest.param(True, False, marks=pytest.mark.slow),
        pytest.param(False, True, marks=pytest.mark.slow),
    ],
)
def test_compiles_whole(training: bool, norm_first: bool) -> None:
    model = transformer(norm_first=norm_first).train(training)
    expected = model(**batch())
    expected_gradients = gradients(model, expected)
    swap(model, strict=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    if training:
        out = compiled(**batch())
        assert_close([out, *gradients(model, out)], [expected, *expected_gradients])
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch()), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm_first", [True, False])
def test_autocast(norm_first: bool) -> None:
    """No further from float64 than twice torch under the same autocast, plus one rounding."""
    model = transformer(norm_first=norm_first)
    wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch().items()}
    double = copy.deepcopy(model).double()
    truth = double(**wide)
    truths = [truth, *gradients(double, truth)]
    runs = []
    for swapped in (False, True):
        if swapped:
            swap(model, strict=True)
        with torch.autocast("cpu", torch.bfloat16):
            out = model(**batch())
        runs.append([out, *gradients(model, out)])
    assert runs[1][0].dtype == runs[0][0].dtype
    for name, torchs, ours, true in zip(["out", *dict(model.named_parameters())], *runs, truths, strict=True):
        bound = 2 * (torchs - true).abs().max() + 2.0**-8 * true.abs().max()
        assert (ours - true).abs().max() <= bound, name


def test_activation_checkpointing_redraws_the_same_dropout() -> None:
    model = transformer(dropout=0.3).encoder
    swap(model, strict=True)
    x = batch()["src"]

    def run(checkpointed: bool) -> list[Tensor]:
        torch.manual_seed(5)
        out = x
        for layer in model.layers:
            out = checkpoint(layer, out, use_reentrant=False) if checkpointed else layer(out)
        return [out, *torch.autograd.grad(out.square().sum(), list(model.layers.parameters()))]

    for a, b in zip(run(True), run(False), strict=True):
        assert torch.equal(a, b)


def test_copies_are_independent_and_swapped() -> None:
    model = transformer()
    expected = model(**batch())
    swap(model, strict=True)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert type(twin.encoder.layers[0]) is type(model.encoder.layers[0]) is not nn.TransformerEncoderLayer
    torch.testing.assert_close(twin(**batch()), expected, atol=1e-5, rtol=1e-5)


def test_functional_call() -> None:
    model, other = transformer(), transformer()
    for parameter in other.parameters():
        nn.init.normal_(parameter, std=0.2)
    expected = other(**batch())
    swap(model)
    weights = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    out = torch.func.functional_call(model, weights, kwargs=batch())
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert_close(gradients(list(weights.values()), out), gradients(list(other.parameters()), expected))


LOAD = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
arguments, expected = torch.load(sys.argv[2])
assert type(model.encoder).__module__ == "fastattn.swap.recipes.torch_nn", type(model.encoder)
with torch.no_grad():
    assert torch.equal(model(**arguments), expected)
print("equal")
"""


def test_saved_whole_and_loaded_in_a_fresh_process(fresh_process, tmp_path: Path) -> None:
    model = transformer().eval()
    swap(model, strict=True)
    with torch.no_grad():
        expected = model(**batch())
    torch.save(model, tmp_path / "model.pt")
    torch.save((batch(), expected), tmp_path / "batch.pt")
    run = fresh_process(LOAD, str(tmp_path / "model.pt"), str(tmp_path / "batch.pt"))
    assert run.stdout == "equal\n", run.stderr[-3000:]
    plain = transformer()
    plain.load_state_dict(model.state_dict())  # the keys are torch's
    torch.testing.assert_close(plain(**batch()), expected, atol=1e-5, rtol=1e-5)


DISTRIBUTED = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from fastattn import swap

kind, rank, rendezvous = sys.argv[1], int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + rendezvous, rank=rank, world_size=2)


def build():
    torch.manual_seed(0)
    return nn.Transformer(16, 2, 2, 1, 32, dropout=0.0, batch_first=True)


def loss(model, rows):
    return model(src[rows], tgt[rows], src_key_padding_mask=padding[rows]).square().mean()


torch.manual_seed(1)
src, tgt = torch.randn(4, 6, 16), torch.randn(4, 5, 16)
padding = torch.zeros(4, 6, dtype=torch.bool)
padding[1, 4:] = True
single = build()
optimizer = torch.optim.SGD(single.parameters(), lr=0.1)
for _ in range(2):
    optimizer.zero_grad()
    loss(single, slice(None)).backward()
    optimizer.step()

model = build()
report = swap(model, strict=True)
if kind == "ddp":
    model = nn.parallel.DistributedDataParallel(model)
else:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for layer in (*model.encoder.layers, *model.decoder.layers):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with report.counting():
    for _ in range(2):
        optimizer.zero_grad()
        loss(model, slice(2 * rank, 2 * rank + 2)).backward()
        optimizer.step()
assert all(row.calls for row in report.rows if row.action == "swapped"), report
assert not any(row.fallbacks for row in report.rows), report
for name, parameter in model.named_parameters():
    if kind != "ddp":
        parameter = parameter.full_tensor()
    expected = single.get_parameter(name.removeprefix("module."))
    torch.testing.assert_close(parameter, expected, atol=1e-5, rtol=1e-4, msg=name)
dist.barrier()
dist.destroy_process_group()
print("equal")
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes(kind: str, tmp_path: Path) -> None:
    """Two steps of SGD on halves of the batch end where one process with the whole batch ends."""
    if kind == "fsdp2":
        pytest.importorskip("torch.distributed.fsdp", reason="this torch has no FSDP2")
        if not hasattr(torch.distributed.fsdp, "fully_shard"):
            pytest.skip("this torch has no fully_shard")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-W", "ignore", "-c", DISTRIBUTED, kind]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "rendezvous")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        out, errors = process.communicate(timeout=120)
        assert out == "equal\n", errors[-3000:]
