"""The operators inside what PyTorch users put around them: checkpointing, functional_call, threads, deepcopy."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn.masks import Causal


class Block(nn.Module):
    """A pre-norm transformer block of fastattn's functions."""

    def __init__(self, width: int = 16, heads: int = 2, dropout_p: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout_p, self.mask = heads, dropout_p, Causal()
        self.norm = nn.Parameter(torch.ones(width))
        self.qkv = nn.Parameter(torch.randn(3 * width, width) / 4)
        self.up = nn.Parameter(torch.randn(2 * width, width) / 4)
        self.down = nn.Parameter(torch.randn(width, 2 * width) / 4)

    def forward(self, x):
        q, k, v = (
            fastattn.linear_act(fastattn.rms_norm(x, self.norm), self.qkv)
            .unflatten(-1, (3, self.heads, -1))
            .permute(2, 0, 3, 1, 4)
        )
        mixed = fastattn.attention(q, k, v, mask=self.mask, dropout_p=self.dropout_p).transpose(1, 2).flatten(2)
        y, z = fastattn.rms_norm(mixed, self.norm, residual=x, dropout_p=self.dropout_p, return_residual=True)
        return z + fastattn.ffn(y, self.up, None, self.down, None)


def gradients(module, loss):
    return torch.autograd.grad(loss, list(module.parameters()))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_checkpointing_repeats_the_forward_dropout_included(use_reentrant, dropout_p):
    block, x = Block(dropout_p=dropout_p), torch.randn(2, 5, 16, requires_grad=True)
    torch.manual_seed(0)
    block(x).square().sum().backward()
    plain = [p.grad.clone() for p in block.parameters()]
    block.zero_grad()
    torch.manual_seed(0)
    checkpoint(block, x, use_reentrant=use_reentrant).square().sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(plain, block.parameters(), strict=True))


def test_functional_call():
    block, x = Block(), torch.randn(2, 5, 16)
    other = {name: torch.randn_like(p) / 4 for name, p in block.named_parameters()}
    result = torch.func.functional_call(block, other, (x,))
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            parameter.copy_(other[name])
    assert torch.equal(result, block(x))


def test_gradients_per_sample():
    block, x = Block(), torch.randn(4, 5, 16)
    parameters = dict(block.named_parameters())

    def loss(parameters, row):
        return torch.func.functional_call(block, parameters, (row[None],)).square().sum()

    result = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(4):
        for name, truth in zip(parameters, gradients(block, block(x[i : i + 1]).square().sum()), strict=True):
            torch.testing.assert_close(result[name][i], truth, rtol=1e-4, atol=1e-4)


def test_deepcopy():
    block, x = Block(), torch.randn(2, 5, 16)
    twin = copy.deepcopy(block)
    assert torch.equal(block(x), twin(x))
    with torch.no_grad():
        twin.norm.mul_(2.0)
    assert not torch.equal(block(x), twin(x))


def test_a_compiled_block():
    block, x = Block(), torch.randn(2, 5, 16)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    result, truth = compiled(x), block(x)
    assert torch.equal(result, truth)
    for a, b in zip(gradients(block, result.sum()), gradients(block, truth.sum()), strict=True):
        assert torch.equal(a, b)


def test_inference_from_four_threads_at_once():
    block = Block()
    inputs = [torch.randn(2, 3 + i, 16) for i in range(4)]
    with torch.inference_mode():
        expected = [block(x) for x in inputs]
    wrong: list[str] = []
    barrier = threading.Barrier(4)

    def work(i):
        try:
            barrier.wait()
            with torch.inference_mode():
                for _ in range(20):
                    if not torch.equal(block(inputs[i]), expected[i]):
                        wrong.append(f"thread {i} differs")
        except Exception as error:
            wrong.append(f"thread {i}: {error!r}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_training_from_two_threads_at_once():
    block, x = Block(), torch.randn(2, 5, 16)
    expected = gradients(block, block(x).sum())
    results: list[tuple[torch.Tensor, ...]] = []
    threads = [threading.Thread(target=lambda: results.append(gradients(block, block(x).sum()))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    for result in results:
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(result, expected, strict=True))


def test_inference_mode_tensors_and_no_grad():
    block = Block()
    with torch.inference_mode():
        x = torch.randn(1, 4, 16)
        y = block(x)
    assert y.is_inference() and not y.requires_grad
    with torch.no_grad():
        assert not block(torch.randn(1, 4, 16)).requires_grad
