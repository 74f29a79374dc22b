"""What is at work around the short way: threads, signals, finalisers, modes and transforms."""

from __future__ import annotations

import gc
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

import fastattn
from fastattn.functional import direct
from fastattn.masks import Causal, KeyLengths
from fastattn.modes import Transparent, has_function_mode

pytestmark = pytest.mark.skipif(
    direct._opened() is None, reason="no native CPU library, or a torch older than 2.10, whose tensors it cannot read"
)

Call = Callable[[], Any]


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


class Mode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_several_threads(taken):
    x, weight = randn(64, 64), randn(64, 64)
    expected = fastattn.ffn(x, weight, None, weight, None)
    wrong: list[int] = []

    def work(thread: int) -> None:
        for _ in range(50):
            if not torch.equal(fastattn.ffn(x, weight, None, weight, None), expected):
                wrong.append(thread)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(taken) == 201


def test_nothing_is_leaked():
    x, weight, bias = randn(2, 16), randn(16, 16), randn(16)
    q, ranges = randn(1, 2, 1, 16), torch.tensor([[[[0, 1]]]], dtype=torch.int32)
    module: Any = direct._opened()
    calls: list[Call] = [
        lambda: module.direct_norm(x, bias, bias, x, False, 1e-5, 0.0),
        lambda: module.direct_norm(x, weight, bias, x, False, 1e-5, 0.0),
        lambda: module.direct_linear_act(x, weight, bias, "gelu"),
        lambda: module.direct_linear_act(x, weight, bias, []),
        lambda: module.direct_gated_ffn(x, weight, bias, weight, None, weight, None, "silu"),
        lambda: module.direct_attention(q, q, q, ranges, None, True, 0.5),
        lambda: module.direct_attention(q, q, q, ranges, None, True, "0.5"),
    ]
    objects = (x, weight, bias, q, ranges, None, True, False)
    for call in calls:
        call()
        counts, blocks = [sys.getrefcount(each) for each in objects], sys.getallocatedblocks()
        for _ in range(200):
            call()
        assert all(abs(sys.getrefcount(each) - n) < 100 for each, n in zip(objects, counts, strict=True))
        assert abs(sys.getallocatedblocks() - blocks) < 100


class AnAlarm(Exception):
    pass


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers")
@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals reach the main thread")
def test_what_a_handler_of_signals_raises_is_not_lost():
    x, rung = randn(1, 16), False

    def ring(*_: Any) -> None:
        nonlocal rung
        rung = True
        raise AnAlarm

    def call_until_it_rings() -> None:  # a frame of its own: Python 3.13 leaves a loop's jump back out of a with block
        while not rung:
            fastattn.layer_norm(x)

    fastattn.layer_norm(x)
    before = signal.signal(signal.SIGALRM, ring)
    try:
        for _ in range(100):
            rung = False
            with pytest.raises(AnAlarm):
                signal.setitimer(signal.ITIMER_REAL, 1e-4)
                call_until_it_rings()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_tensor_may_be_resized_while_the_result_is_made():
    x, weight, module = randn(2, 16), torch.eye(16), direct._opened()
    values, larger, ran = x.clone(), randn(64, 256), []
    assert module is not None

    def resize(phase: str, _: Any) -> None:
        if phase == "start" and not ran:
            ran.append(x.untyped_storage())  # which the kernel may go on to read
            x.set_(larger)  # type: ignore[call-overload]

    thresholds = gc.get_threshold()
    gc.callbacks.append(resize)
    gc.set_threshold(1)
    try:
        y = module.direct_linear_act(x, weight, None, None)
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(resize)
    if y is not None:  # it was read before, if it was resized at all
        assert torch.equal(y, values)


def test_nobody_may_watch(taken):
    x, weight = randn(2, 16), randn(16)

    def runs() -> bool:
        taken.clear()
        fastattn.layer_norm(x, weight)
        return bool(taken)

    assert runs()
    with Mode():
        assert not runs()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert not runs()
    with torch.autocast("cpu", torch.bfloat16):
        assert not runs()
    with forward_ad.dual_level():
        assert not runs()
    torch.jit.trace(lambda x: fastattn.layer_norm(x), (x,), check_trace=False)
    torch.vmap(lambda x: fastattn.layer_norm(x))(x)
    torch.func.grad(lambda x: fastattn.layer_norm(x).sum())(x)
    torch.vmap(lambda _: fastattn.layer_norm(x))(x)  # of none of its tensors
    assert not taken and runs()


def test_an_exchange_of_another_kind_leaves_the_long_way(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "__dlpack_c_exchange_api__", object())
        direct._opened.cache_clear()
        assert direct._opened() is None
    direct._opened.cache_clear()
    assert direct._opened() is not None


def test_a_default_device_has_no_part_in_the_long_way():
    q = randn(1, 2, 12, 8).requires_grad_()
    weight = randn(16, 8).requires_grad_()

    def gradients() -> tuple[Tensor, ...]:
        y = fastattn.linear_act(fastattn.attention(q, q, q, mask=Causal() & KeyLengths([7])), weight, None, "gelu")
        return torch.autograd.grad(fastattn.rms_norm(y).square().sum(), (q, weight))

    expected = gradients()
    with torch.device("meta"):
        found = gradients()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


class OurMode(Transparent):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_a_mode_of_our_own_is_lifted(taken):
    x, weight = randn(2, 16), randn(16)
    with OurMode() as mode:
        fastattn.layer_norm(x, weight)
        assert taken == ["norm"] and not mode.seen
        torch.add(x, x)
        fastattn.layer_norm(x, weight)
        assert mode.seen == [torch.add] and taken == ["norm"] * 2
        with Mode():  # another one above it
            fastattn.layer_norm(x, weight)
        with pytest.raises(ValueError, match="weight has shape"):
            fastattn.layer_norm(x, randn(8))
        assert taken == ["norm"] * 2
        mode.seen.clear()
        torch.mul(x, x)
        assert mode.seen == [torch.mul]
    with Mode(), OurMode():  # and one below
        fastattn.layer_norm(x, weight)
    assert taken == ["norm"] * 2


def test_a_default_device_is_lifted(taken):
    x, weight = randn(2, 16), randn(16)
    expected = fastattn.layer_norm(x, weight)
    with torch.device("meta"):
        assert torch.equal(fastattn.layer_norm(x, weight), expected)
        with OurMode() as mode:
            assert torch.equal(fastattn.layer_norm(x, weight), expected) and taken == ["norm"] * 3
            with torch.device("cpu"):  # of three none is lifted
                assert torch.equal(fastattn.layer_norm(x, weight), expected) and taken == ["norm"] * 3
            assert torch.zeros(1).is_meta and torch.equal in mode.seen
    assert not has_function_mode() and not torch.zeros(1).is_meta
