"""The native CPU backend: parity under every instruction set, threads, memory, and what it says when it cannot run."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import biases, masks
from fastattn.backends import cpu
from fastattn.backends.cpu import attention as cpu_attention
from fastattn.backends.cpu import library as cpu_library
from fastattn.biases.lowered import NO_BIAS
from fastattn.masks.lowered import LoweredMask
from fastattn.parity.bound import unit_roundoff
from fastattn.parity.rule import check_linear_act, failures
from fastattn.parity.run import verify
from fastattn.problems import AttentionProblem, LinearProblem

pytestmark = pytest.mark.skipif(cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason()))
ISAS = [] if cpu.unavailable_reason() else cpu.available_isas()
CASES = {
    "attention": 60,
    "attention_decode": 40,
    "norm": 40,
    "linear_act": 40,
    "ffn": 25,
    "gated_ffn": 25,
    "encoder_layer": 25,
}


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("op", CASES)
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_keeps_the_parity_rule(isa: str, op: str) -> None:
    report = verify(op, "cpu", cases=CASES[op], seed=7, isa=isa)
    assert not report.failures, "\n".join(map(str, report.failures))


@pytest.mark.slow
@pytest.mark.parametrize("op", CASES)
def test_many_cases_keep_the_parity_rule(op: str) -> None:
    report = verify(op, "cpu", cases=20 * CASES[op], seed=11)
    assert not report.failures, "\n".join(map(str, report.failures))


def test_the_instruction_set_is_chosen_and_restored() -> None:
    best = cpu.isa()
    with cpu.use_isa("baseline" if "baseline" in ISAS else ISAS[-1]):
        assert cpu.isa() == ISAS[-1]
    assert cpu.isa() == best
    with pytest.raises(ValueError, match=r"isa='sse9' is not available here: pass one of"), cpu.use_isa("sse9"):
        pass


@pytest.mark.parametrize("name", [*ISAS[-1:], "sse9"])
def test_the_environment_overrides_the_instruction_set(fresh_process, name: str) -> None:
    script = (
        "from fastattn.backends import cpu\n"
        "reason = cpu.unavailable_reason()\n"
        "print(reason if reason else 'runs ' + cpu.isa())"
    )
    run = fresh_process(script, FASTATTN_CPU_ISA=name)
    expected = f"runs {name}" if name in ISAS else "FASTATTN_CPU_ISA='sse9' is not one of the available"
    assert run.stdout.startswith(expected), run.stdout


def gradients(heads: int, threads: int) -> list[Tensor]:
    """Attention and norm gradients of one fixed problem on so many threads."""
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(2, heads, 130, 40, generator=generator, requires_grad=True) for _ in range(3))
    weight = torch.randn(40, generator=generator, requires_grad=True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = fastattn.rms_norm(fastattn.attention(q, k, v, mask=fastattn.masks.Causal(), backend="cpu"), weight)
        return list(torch.autograd.grad(out.square().sum(), [q, k, v, weight]))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("heads", [1, 6])
def test_threads_repeat_bitwise_and_agree(heads: int) -> None:
    """One head on five threads shares the queries out; sums over shares still have a fixed order."""
    first, again, alone = gradients(heads, 5), gradients(heads, 5), gradients(heads, 1)
    for a, b, c in zip(first, again, alone, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-5)


def test_a_new_thread_uses_the_same_kernels(two_threads: None) -> None:
    x, weight = torch.randn(64, 96), torch.randn(80, 96)
    expected = fastattn.linear_act(x, weight, backend="cpu")
    found: list[Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(fastattn.linear_act(x, weight))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(found) == 4
    assert all(torch.equal(y, expected) for y in found)


def _in_a_child(queue: multiprocessing.Queue[float]) -> None:
    torch.set_num_threads(1)  # what a DataLoader worker does
    queue.put(fastattn.linear_act(torch.ones(8, 16), torch.ones(4, 16)).sum().item())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform does not fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_worker_does_not_hang(two_threads: None) -> None:
    fastattn.linear_act(torch.ones(64, 64), torch.ones(64, 64))  # the parent has used its threads
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    worker = context.Process(target=_in_a_child, args=(queue,))
    worker.start()
    try:
        assert queue.get(timeout=60) == 8 * 4 * 16
    finally:
        worker.join(timeout=10)
        worker.kill()


def test_memory_is_linear_in_the_length() -> None:
    """A Sq x Skv float32 temporary would take 256 MiB at 8192; the scratch of forward and backward stays far below."""
    script = """
import resource, torch, fastattn
torch.set_num_threads(2)
q, k, v = (torch.randn(1, 1, 8192, 16, requires_grad=True) for _ in range(3))
short = [t.detach()[:, :, :256].requires_grad_() for t in (q, k, v)]
fastattn.attention(*short, backend="cpu").sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fastattn.attention(q, k, v, backend="cpu").sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 48, f"peak memory grew by {run.stdout} MiB"


@pytest.mark.parametrize("mask", [None, masks.Causal(), masks.SlidingWindow(left=300, right=0)])
def test_rows_apart_give_what_rows_side_by_side_do(monkeypatch: pytest.MonkeyPatch, mask: masks.Mask | None) -> None:
    """Keys and values that are read often are copied first: the same bits come out, gradients as the inputs lie."""
    copied: list[tuple[int, ...]] = []
    contiguous = Tensor.contiguous

    def counted(tensor: Tensor) -> Tensor:
        copied.append(tuple(tensor.shape))
        return contiguous(tensor)

    monkeypatch.setattr(Tensor, "contiguous", counted)
    draw = torch.Generator().manual_seed(5)
    apart = [torch.randn(1, 310, heads, 24, generator=draw).transpose(1, 2) for heads in (4, 2, 2)]
    grad_out = torch.randn(1, 4, 310, 24, generator=draw)
    found = []
    for layout in (apart, [contiguous(t) for t in apart]):
        inputs = [t.detach().requires_grad_() for t in layout]
        out = fastattn.attention(*inputs, mask=mask, backend="cpu")
        grads = torch.autograd.grad(out, inputs, grad_out)
        assert [g.stride() for g in grads] == [t.stride() for t in inputs]
        found.append((out, *grads))
    assert copied == 4 * [(1, 2, 310, 24)], "keys and values, forward and backward, of the scattered inputs only"
    for name, one, other in zip(("out", "dq", "dk", "dv"), *found, strict=True):
        assert torch.equal(one, other), name


def test_rows_read_seldom_and_expanded_heads_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "contiguous", lambda tensor: pytest.fail(f"a copy of {tuple(tensor.shape)}"))
    kv = torch.randn(1, 300, 2, 16).transpose(1, 2)
    fastattn.attention(torch.randn(1, 2, 100, 16), kv, kv, backend="cpu")
    window = masks.SlidingWindow(left=99, right=99)
    fastattn.attention(torch.randn(1, 2, 300, 16), kv, kv, mask=window, backend="cpu")
    expanded = torch.randn(1, 300, 1, 16).transpose(1, 2).expand(1, 4, 300, 16)
    fastattn.attention(torch.randn(1, 4, 300, 16), expanded, expanded, backend="cpu")


def test_copied_rows_of_128_lie_a_cache_line_apart(monkeypatch: pytest.MonkeyPatch, long_way: None) -> None:
    calls: list[tuple[int, ...]] = []
    arguments = cpu_attention._call_arguments

    def seen(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[object, ...]:
        calls.append((k.stride(2), v.stride(2)))
        return arguments(q, k, v, *rest)

    monkeypatch.setattr(cpu_attention, "_call_arguments", seen)
    apart = [torch.randn(1, 260, 2, 128).transpose(1, 2) for _ in range(3)]
    scattered = fastattn.attention(*apart, backend="cpu")
    assert torch.equal(scattered, fastattn.attention(*(t.contiguous() for t in apart), backend="cpu"))
    assert calls == [(144, 144), (128, 128)]


_RANGES = torch.tensor([[[[0, 40], [3, 20], [50, 50]]]], dtype=torch.int32)
_NEW, _CACHED = 3, 40


@pytest.mark.parametrize(
    ("kind", "few"),
    [
        ({}, True),
        ({"mask": masks.Causal()}, True),
        ({"mask": masks.SlidingWindow(5, 0), "softcap": 3.0}, True),
        ({"mask": _RANGES, "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])}, True),
        ({"bias": biases.ALiBi(torch.tensor([0.5, 0.25, 0.125, 1.0])), "mask": masks.Causal()}, True),
        ({"bias": torch.linspace(-1, 1, _CACHED).view(1, 1, 1, -1)}, True),
        ({"mask": masks.Causal("top-left")}, False),
        ({"mask": masks.KeyLengths([30])}, True),
        ({"mask": masks.KeyMask(torch.arange(_CACHED)[None] % 3 > 0) & masks.Causal()}, True),
        ({"mask": torch.arange(_NEW * _CACHED).view(_NEW, _CACHED) % 7 < 3, "bias": torch.ones(_CACHED)}, True),
        ({"mask": masks.Dilated(3, 2)}, False),
        ({"dropout_p": 0.5, "dropout_seed": torch.tensor([7])}, False),
    ],
    ids=lambda value: (
        "+".join(f"{k}={type(v).__name__}" for k, v in value.items()) if isinstance(value, dict) else None
    ),
)
def test_few_queries_go_to_the_kernel_for_decoding(monkeypatch: pytest.MonkeyPatch, kind: dict, few: bool) -> None:
    """Where it knows the form of the mask; either kernel gives what the reference gives, gradients included."""
    went: list[bool] = []
    decode = cpu_attention.attention_decode
    monkeypatch.setattr(cpu_attention, "attention_decode", lambda *args: went.append(True) or decode(*args))
    draw = torch.Generator().manual_seed(3)
    shapes = (4, _NEW, 24), (2, _CACHED, 24), (2, _CACHED, 16)
    results = []
    for backend in ("cpu", "reference"):
        inputs = [
            torch.randn(1, *shape, generator=draw.manual_seed(i)).requires_grad_() for i, shape in enumerate(shapes)
        ]
        out, lse = fastattn.attention(*inputs, **kind, return_lse=True, backend=backend)
        results.append((out, lse, *torch.autograd.grad(out.square().sum(), inputs)))
    assert bool(went) == few
    for name, found, expected in zip(("out", "lse", "dq", "dk", "dv"), *results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_many_queries_and_packed_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "attention_decode", lambda *args: pytest.fail("went to the kernel for decoding"))
    kv = torch.randn(1, 2, 30, 16)
    fastattn.attention(torch.randn(1, 2, 9, 16), kv, kv, backend="cpu")
    fastattn.attention(torch.randn(1, 2, 0, 16), kv, kv, backend="cpu")
    packed = torch.randn(5, 2, 16)
    cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32)
    fastattn.attention_varlen(packed, packed, packed, cu_seqlens, cu_seqlens, backend="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_intervals_of_keys_are_a_union(dtype: torch.dtype) -> None:
    """Masks of this version lower to at most one interval; the kernels take the union of up to four."""
    q, k, v = (
        torch.randn(2, 2, 70, 16).to(dtype),
        torch.randn(2, 2, 150, 16).to(dtype),
        torch.randn(2, 2, 150, 16).to(dtype),
    )
    start = torch.randint(-5, 150, (4, 2, 1, 70, 1))
    intervals = torch.cat([start, start + torch.randint(-10, 30, start.shape)], -1).to(torch.int32)
    j = torch.arange(150)
    visible = ((j >= intervals[..., :1]) & (j < intervals[..., 1:])).any(0).expand(2, 2, 70, 150)
    tail = (NO_BIAS, None, None, None, 0.25, 0.0, 0.0)
    by_intervals = cpu.attention_forward(q, k, v, LoweredMask(intervals=intervals), *tail)
    by_bools = cpu.attention_forward(q, k, v, LoweredMask(dense=visible), *tail)
    # Either may round its probabilities to bfloat16, against another running maximum.
    rounding = 0.0 if dtype is torch.float32 else unit_roundoff(dtype) * float(v.abs().max())
    for a, b in zip(by_intervals, by_bools, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5 if dtype is torch.float32 else 1e-2, atol=1e-6 + rounding)


def test_pairs_that_are_no_whole_words_are_copied() -> None:
    """bfloat16 at odd addresses and with odd strides gives what contiguous tensors give."""
    q, k, v = (torch.randn(2, 2, 71, 24).bfloat16() for _ in range(3))
    expected = fastattn.attention(q, k, v, backend="cpu")
    wide = torch.full((3, 2, 2, 71, 27), torch.nan, dtype=torch.bfloat16)
    wide[..., 1:25] = torch.stack((q, k, v))
    odd_q, odd_k, odd_v = wide[..., 1:25]
    assert odd_k.stride(2) % 2 == 1 and odd_k.data_ptr() % 4 == 2
    assert torch.equal(fastattn.attention(odd_q, odd_k, odd_v, backend="cpu"), expected)


@pytest.mark.parametrize("shape", [(450, 96, 100), (1000, 520, 49), (401, 1, 7)])
@pytest.mark.parametrize("isa", ISAS)
def test_large_products_keep_the_parity_rule(isa: str, shape: tuple[int, int, int]) -> None:
    """From 400 rows on AMX multiplies float32 in three parts; every transpose of it is in the gradients."""
    rows, inner, columns = shape
    x, weight, bias = torch.randn(rows, inner), torch.randn(columns, inner) * inner**-0.5, torch.randn(columns)
    with cpu.use_isa(isa):
        checked = check_linear_act(x, weight, bias, "gelu", backend="cpu")
    assert not failures(checked), failures(checked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lies", ["by rows", "by columns"])
@pytest.mark.parametrize("isa", ISAS)
def test_blocks_of_features_keep_the_parity_rule(isa: str, lies: str, dtype: torch.dtype, two_threads: None) -> None:
    """Up to 384 rows weights are packed by blocks of 512 features: several, a last one of few, and blocks of rows."""
    for rows, inner, columns in ((52, 1536, 200), (97, 514, 333), (384, 1031, 300)):
        x = torch.randn(rows, inner).to(dtype)
        weight = (torch.randn(columns, inner) * inner**-0.5).to(dtype)
        if lies == "by columns":
            weight = weight.t().contiguous().t()
        with cpu.use_isa(isa):
            checked = check_linear_act(x, weight, None, None, backend="cpu")
        assert not failures(checked), (rows, inner, columns, failures(checked))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lies", ["by rows", "by columns"])
@pytest.mark.parametrize("isa", ISAS)
def test_few_rows_keep_the_parity_rule(isa: str, lies: str, dtype: torch.dtype, two_threads: None) -> None:
    """Up to 32 rows, or 48, the weight is read where it lies: beyond a panel of columns, beyond a block of the sums,
    and ends that fill no vector."""
    inner = 521
    for rows, columns in (
        (1, 2300),
        (2, 49),
        (3, 2100),
        (5, 17),
        (7, 30),
        (8, 25),
        (9, 100),
        (24, 33),
        (32, 47),
        (33, 24),
        (47, 30),
        (49, 24),
    ):
        x, bias = torch.randn(rows, inner).to(dtype), torch.randn(columns).to(dtype)
        weight = (torch.randn(columns, inner) * inner**-0.5).to(dtype)
        if lies == "by columns":
            weight = weight.t().contiguous().t()
        with cpu.use_isa(isa):
            checked = check_linear_act(x, weight, bias, "silu", backend="cpu")
        assert not failures(checked), (rows, columns, failures(checked))


@pytest.mark.parametrize("isa", ISAS)
def test_subnormal_sums_stay_what_they_are(isa: str) -> None:
    """The instruction that rounds to bfloat16 makes them 0; of words only a bias is left subnormal."""
    bias = (torch.arange(1, 101) * 2.0**-133).bfloat16()
    for rows, columns in ((4, 100), (64, 100), (64, 96), (100, 16)):
        with cpu.use_isa(isa):
            out = fastattn.linear_act(
                torch.zeros(rows, 64).bfloat16(),
                torch.randn(columns, 64).bfloat16(),
                bias[:columns],
                activation=None,
                backend="cpu",
            )
        assert torch.equal(out, bias[:columns].expand(rows, columns)), (rows, columns)


def test_no_graph_hangs_on_what_calls_share() -> None:
    x, w = torch.randn(3, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    for result in (
        fastattn.rms_norm(x),
        fastattn.layer_norm(x, residual=x),
        fastattn.linear_act(x, w),
        fastattn.ffn(x, w, None, w, None),
        fastattn.gated_ffn(x, w, w, w),
    ):
        result.sum().backward()
    results = [cpu_library.nothing(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    assert not any(nothing.requires_grad or nothing.grad_fn for nothing in results)


def test_transposed_weights_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "contiguous", lambda tensor: pytest.fail(f"a copy of {tuple(tensor.shape)}"))
    x = torch.randn(5, 12, requires_grad=True)
    weights = [torch.randn(12, 20, requires_grad=True), torch.randn(20, 12, requires_grad=True)]
    w1, w2 = (weight.t() for weight in weights)
    fastattn.linear_act(x, w1, None, "relu", backend="cpu").backward(torch.ones(5, 20))
    fastattn.ffn(x, w1, None, w2, None, backend="cpu").backward(torch.ones(5, 12))
    fastattn.gated_ffn(x, w1, w1, w2, backend="cpu").backward(torch.ones(5, 12))
    assert all(weight.grad is not None and weight.grad.stride() == weight.stride() for weight in weights)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 3.4e38])
@pytest.mark.parametrize("where", ["x", "weight"])
@pytest.mark.parametrize("isa", ISAS)
def test_values_that_do_not_split_into_bfloat16(isa: str, where: str, value: float) -> None:
    """AMX multiplies float32 as three bfloat16 parts, which infinity, NaN and the largest numbers do not have."""
    x, weight = torch.rand(450, 90) + 0.5, torch.rand(100, 90) + 0.5
    (x if where == "x" else weight)[33, 44] = value
    with cpu.use_isa(isa):
        y, _ = cpu.linear_act_forward(x, weight, None, "none", False)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight), equal_nan=True, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("isa", ISAS)
def test_amx_counts_as_avx512(isa: str) -> None:
    """What was measured with AVX-512 holds there, too: a LayerNorm of many elements runs on the kernel."""
    with cpu.use_isa(isa):
        assert cpu.has_avx512() == (isa in ("avx512", "avx512bf16", "amx"))


def test_refusals_name_what_is_not_supported() -> None:
    attention = AttentionProblem("cpu", torch.float64, 1, 1, 1, 4, 4, 8, 8, bias=torch.float32, bias_requires_grad=True)
    assert cpu.not_supported_reasons(attention) == ["dtype torch.float64 is not float32, bfloat16 or float16"]
    linear = LinearProblem("ffn", "cuda", torch.bfloat16, torch.float32, "gelu", 4, 8, 16, 8)
    assert cpu.not_supported_reasons(linear) == [
        "tensors are on 'cuda', not on the CPU",
        "weights are torch.float32 and inputs torch.bfloat16, not one dtype",
    ]
