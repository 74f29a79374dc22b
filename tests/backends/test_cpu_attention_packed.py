"""The CPU attention kernels over packed batches and biases by distance, against autograd in float64, one sequence after
the other. Lowered masks and biases are made by hand: `fastattn.masks` and `fastattn.biases` are not involved."""

from __future__ import annotations

import contextlib
import math
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastattn.backends import cpu
from fastattn.backends.cpu.attention import attention_backward, attention_forward
from fastattn.biases.lowered import LoweredBias
from fastattn.masks.lowered import LoweredMask
from fastattn.packed import Packed
from fastattn.parity.guards import GuardedTensors, poisoned_outputs, torch_threads
from fastattn.reference.philox import dropout_scale, keep_mask

pytestmark = pytest.mark.skipif(cpu.unavailable_reason() is not None, reason="the CPU library is not built")

ISAS = cpu.available_isas() if cpu.unavailable_reason() is None else []
GRADS = ("dq", "dk", "dv", "dbias", "dtable", "dslopes", "dsinks")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with cpu.use_isa(request.param):
        yield request.param


@dataclass
class Call:
    """One call of the kernels. q and k as the kernels take them; `lens`: the lengths of each sequence, as they are."""

    lens: list[tuple[int, int]]
    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    grad_lse: Tensor | None
    packed: Packed | None = None
    mask: LoweredMask = field(default_factory=LoweredMask)
    bias: LoweredBias = field(default_factory=LoweredBias)
    sinks: Tensor | None = None
    seed: Tensor | None = None
    softcap: float = 0.0
    dropout_p: float = 0.0

    @property
    def longest(self) -> tuple[int, int]:
        if self.packed is not None:
            return self.packed.max_len_q, self.packed.max_len_k
        return self.q.shape[2], self.k.shape[2]

    def run(self, threads: int = 2, wanted: tuple[bool, bool, bool, bool] | None = None) -> dict[str, Tensor]:
        numbers = (self.q.shape[3] ** -0.5, self.softcap, self.dropout_p)
        with poisoned_outputs(), torch_threads(threads):
            extras = (self.mask, self.bias, self.packed, self.sinks, self.seed)
            out, lse = attention_forward(self.q, self.k, self.v, *extras, *numbers)
            if wanted is None:
                bias = self.bias
                wanted = tuple(t is not None for t in (bias.dense, bias.table, bias.slopes, self.sinks))
            inputs = (self.grad_out, self.grad_lse, self.q, self.k, self.v, out, lse)
            grads = attention_backward(*inputs, *extras, *numbers, *wanted, True)
        return {"out": out, "lse": lse, **dict(zip(GRADS, grads, strict=True))}

    def truth(self) -> dict[str, Tensor]:
        """Every sequence by itself, through autograd."""
        leaves = {"dq": self.q, "dk": self.k, "dv": self.v, "dbias": self.bias.dense, "dtable": self.bias.table}
        leaves |= {"dslopes": self.bias.slopes, "dsinks": self.sinks}
        leaves = {
            name: torch.zeros(0, dtype=torch.float64).requires_grad_()
            if t is None
            else t.double().nan_to_num(0.0, 0.0, -math.inf).requires_grad_()
            for name, t in leaves.items()
        }
        shape = (*self.q.shape[:3], self.v.shape[3])
        out, lse = torch.zeros(shape, dtype=torch.float64), torch.full(shape[:3], -math.inf, dtype=torch.float64)
        loss = sum(t.sum() * 0.0 for name, t in leaves.items() if name in ("dq", "dk", "dv"))
        for b in range(len(self.lens)):
            at_q, at_k, entry = self._rows(b)
            soft, row_lse = self._scores(b, leaves, at_q, at_k, entry)
            values = leaves["dv"][entry, :, at_k].repeat_interleave(self.q.shape[1] // self.k.shape[1], 0)
            found = soft @ values
            loss = loss + (found * self.grad_out[entry, :, at_q].double()).sum()
            if self.grad_lse is not None:
                there = row_lse.masked_fill(row_lse.isneginf(), 0.0)
                loss = loss + (there * self.grad_lse[entry, :, at_q].double()).sum()
            out[entry, :, at_q], lse[entry, :, at_q] = found.detach(), row_lse.detach()
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        zeros = (torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves.values(), grads, strict=True))
        return {"out": out, "lse": lse, **dict(zip(leaves, zeros, strict=True))}

    def _rows(self, b: int) -> tuple[slice, slice, int]:
        if self.packed is None:
            return slice(None), slice(None), b
        cut_q, cut_k = (
            slice(int(cu[b]), min(int(cu[b + 1]), int(cu[b]) + longest))
            for cu, longest in zip(self.packed[:2], self.longest, strict=True)
        )
        return cut_q, cut_k, 0

    def _scores(self, b: int, leaves: dict[str, Tensor], at_q: slice, at_k: slice, entry: int) -> tuple[Tensor, Tensor]:
        """The weights of sequence b, dropout included, (Hq, Lq, Lk), and its log-sum-exp."""
        heads = self.q.shape[1]
        q = leaves["dq"][entry, :, at_q]
        k = leaves["dk"][entry, :, at_k].repeat_interleave(heads // self.k.shape[1], 0)
        len_q, len_k = q.shape[1], k.shape[1]
        scores = q @ k.transpose(1, 2) * self.q.shape[3] ** -0.5
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        i, j = torch.arange(len_q)[:, None], torch.arange(len_k)
        offset = self.lens[b][1] - self.lens[b][0]
        distance = j - i - (0 if self.bias.top_left else offset)
        full_q, full_k = self.longest
        if self.bias.dense is not None:
            dense = leaves["dbias"].expand(len(self.lens), heads, full_q, full_k)
            scores = scores + dense[b, :, :len_q, :len_k]
        if self.bias.table is not None:
            table = leaves["dtable"].expand(heads, -1)
            scores = scores + table[:, (distance - self.bias.first).clamp(0, table.shape[1] - 1)]
        if self.bias.slopes is not None:
            scores = scores - leaves["dslopes"].expand(len(self.lens), -1)[b, :, None, None] * distance.abs()
        seen = self._seen(b, i, j, offset)
        scores = scores.masked_fill(~seen, -math.inf)
        if len_k == 0:
            return scores, torch.full((heads, len_q), -math.inf, dtype=torch.float64)
        top = scores.detach().amax(-1, keepdim=True)
        top = top.masked_fill(top.isneginf(), 0.0)
        terms = torch.exp(scores - top)
        total = terms.sum(-1)
        lse = torch.where(total == 0.0, -math.inf, total.masked_fill(total == 0.0, 1.0).log() + top[..., 0])
        below = total if self.sinks is None else total + torch.exp(leaves["dsinks"][:, None] - top[..., 0])
        weights = terms / below.masked_fill(below == 0.0, 1.0)[..., None]
        if self.seed is not None:
            keep = keep_mask(self.seed, self.dropout_p, len(self.lens) * heads, len_q, len_k)
            weights = weights * keep[b * heads : (b + 1) * heads] * dropout_scale(self.dropout_p)
        return weights, lse

    def _seen(self, b: int, i: Tensor, j: Tensor, offset: int) -> Tensor:
        mask = self.mask
        seen = torch.ones(self.q.shape[1], i.shape[0], j.shape[0], dtype=torch.bool)
        position = i + mask.band_offset + (offset if self.packed is not None else 0)
        if mask.band_left is not None:
            seen &= j >= position - mask.band_left
        if mask.band_right is not None:
            seen &= j <= position + mask.band_right
        if mask.key_end is not None:
            seen &= j < mask.key_end[b]
        if mask.intervals is not None:
            full = mask.intervals.expand(-1, len(self.lens), self.q.shape[1], -1, -1)[:, b, :, : i.shape[0]]
            seen &= ((j >= full[..., :1]) & (j < full[..., 1:])).any(0)
        if mask.dense is not None:
            seen &= mask.dense[b, :, : i.shape[0], : j.shape[0]]
        return seen


def make_call(
    seed: int,
    lens: list[tuple[int, int]],
    heads: tuple[int, int] = (2, 2),
    dims: tuple[int, int] = (16, 24),
    packed: bool = True,
    dtype: torch.dtype = torch.float32,
    cut: tuple[int, int] | None = None,
    gap: int = 0,
) -> Call:
    """`gap` rows of NaN that belong to no sequence lie before the first sequence and behind the last; `cut`: the
    longest lengths, where they are not those of the longest sequence."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    if packed:
        batch, starts = 1, [gap + torch.tensor([0] + [n[x] for n in lens]).cumsum(0).int() for x in (0, 1)]
        rows_q, rows_k = (int(start[-1]) + gap for start in starts)
        longest = cut or tuple(max((n[x] for n in lens), default=0) for x in (0, 1))
        places = Packed(starts[0], starts[1], *longest)
    else:
        (batch, (rows_q, rows_k)), places = (len(lens), lens[0]), None
    q = draw(batch, rows_q, heads[0], dims[0]).transpose(1, 2)
    k, v = (draw(batch, rows_k, heads[1], dim).transpose(1, 2) for dim in dims)
    grad_out = draw(batch, heads[0], rows_q, dims[1])
    grad_lse = torch.randn(batch, heads[0], rows_q, generator=generator)
    call = Call(lens, q, k, v, grad_out, grad_lse, places)
    if places is not None:
        for index, tensors in ((0, (q, grad_out, grad_lse)), (1, (k, v))):
            owned = torch.zeros(tensors[0].shape[2], dtype=torch.bool)
            for b in range(len(lens)):
                owned[call._rows(b)[index]] = True
            for tensor in tensors:
                tensor[:, :, ~owned] = math.nan
    return call


def with_distances(call: Call, rng: random.Random, form: str, columns: int | None = None) -> Call:
    """A table ("table", "one row"), slopes ("slopes", "slopes per entry"), or a table and slopes ("both")."""
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    heads, batch = call.q.shape[1], len(call.lens)
    table = slopes = None
    columns = columns or rng.choice([1, 2, 7, 64, 300])
    if form in ("table", "one row", "both"):
        table = torch.randn(1 if form == "one row" else heads, columns, generator=generator)
    if form in ("slopes", "slopes per entry", "both"):
        slopes = torch.rand(batch if form == "slopes per entry" else 1, heads, generator=generator) / 8
    first = rng.choice([-(columns // 2), 0, -columns, 5])
    call.bias = LoweredBias(None, table, first, slopes, rng.random() < 0.5)
    return call


def check(call: Call, found: dict[str, Tensor], label: str) -> None:
    """Within a few roundings of the dtype, relative to the largest value; rows that see nothing are exactly 0."""
    roundoff = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[call.q.dtype]
    for name, want in call.truth().items():
        got = found[name].double()
        assert got.shape == want.shape, f"{label}: {name} has shape {tuple(got.shape)}, not {tuple(want.shape)}"
        if want.numel() == 0:
            continue
        if name == "lse":
            assert torch.equal(got.isneginf(), want.isneginf()), f"{label}: lse is -inf elsewhere"
            got, want = got.nan_to_num(neginf=0.0), want.nan_to_num(neginf=0.0)
        # Elements of dtable and dslopes are sums over many pairs, most of which cancel.
        floor = max(1.0, call.q.shape[2] * call.q.shape[1] / 64) if name in ("dbias", "dtable", "dslopes") else 1.0
        worst = float((got - want).abs().max() / want.abs().max().clamp(min=floor))
        assert worst <= 8 * roundoff, f"{label}: {name} off by {worst:.2g}"
        if name in ("out", "dq", "dk", "dv"):
            assert not got[want == 0.0].any(), f"{label}: {name} is not 0 where nothing is seen"


FORMS = ("table", "one row", "slopes", "slopes per entry", "both")
LENGTHS = [
    [(5, 5), (0, 0), (130, 130), (1, 1), (64, 64)],
    [(3, 70), (0, 9), (50, 0), (33, 200), (129, 12)],
    [(0, 0)],
    [(1, 1)],
    [],
]


def random_call(seed: int) -> Call:
    """Anything together with anything."""
    rng = random.Random(seed)
    packed = rng.random() < 0.7
    lens = [tuple(rng.choice([0, 1, rng.randint(1, n)]) for n in (150, 200)) for _ in range(rng.randint(1, 5))]
    if not packed:
        lens = [(rng.randint(1, 150), rng.randint(1, 150))] * rng.randint(1, 3)
    heads_kv = rng.choice([1, 2, 3])
    heads = (heads_kv * rng.choice([1, 2, 4]), heads_kv)
    dtype = rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16])
    longest = tuple(max(n[x] for n in lens) for x in (0, 1))
    cut = None if rng.random() < 0.6 else tuple(max(1, n + rng.randint(-9, 9)) for n in longest)
    dims = (rng.choice([1, 8, 24, 40]), rng.choice([1, 16, 33]))
    call = make_call(seed, lens, heads, dims, packed, dtype, cut, rng.choice([0, 3]))
    generator = torch.Generator().manual_seed(seed)
    batch, (len_q, len_k) = len(lens), call.longest
    if rng.random() < 0.8:
        with_distances(call, rng, rng.choice(FORMS))
    if rng.random() < 0.4:
        size = [rng.choice([1, n]) for n in (batch, heads[0], len_q, len_k)]
        call.bias = call.bias._replace(dense=torch.randn(size, generator=generator))
    mask: dict[str, object] = {}
    if rng.random() < 0.4:
        left, right = rng.choice([(None, 0), (40, 0), (7, 9), (100, -20), (3, None)])
        mask |= {"band_offset": rng.choice([0, -5, 3]), "band_left": left, "band_right": right}
    if rng.random() < 0.2:
        mask["key_end"] = torch.randint(0, len_k + 3, (batch,), generator=generator, dtype=torch.int32)
    if rng.random() < 0.2:
        start = torch.randint(-5, len_k + 1, (2, batch, 1, len_q, 1), generator=generator)
        extent = torch.randint(-2, len_k + 2, start.shape, generator=generator)
        mask["intervals"] = torch.cat((start, start + extent), -1).int()
    if rng.random() < 0.2:
        mask["dense"] = torch.rand(batch, heads[0], len_q, len_k, generator=generator) < 0.7
    call.mask = LoweredMask(**mask)  # type: ignore[arg-type]
    if rng.random() < 0.3:
        call.sinks = torch.randn(heads[0], generator=generator)
    if rng.random() < 0.3:
        call.seed, call.dropout_p = torch.tensor([seed]), 0.25
    if rng.random() < 0.3:
        call.softcap = 5.0
    if rng.random() < 0.3:
        call.grad_lse = None
    return call


@pytest.mark.parametrize("seed", range(40))
def test_random_calls(isa: str, seed: int) -> None:
    call = random_call(seed)
    check(call, call.run(threads=1 + seed % 3), f"{isa}, seed {seed}")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_distances(isa: str, packed: bool, form: str) -> None:
    for seed, lens in enumerate(LENGTHS if packed else [[(70, 70)] * 3, [(33, 150)], [(150, 1)] * 2, [(1, 90)]]):
        call = with_distances(make_call(seed, lens, (4, 2), packed=packed), random.Random(seed), form)
        check(call, call.run(), f"{isa}, {form}, {lens}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_longer_sequences_are_cut_off(isa: str, dtype: torch.dtype) -> None:
    """What lies beyond the longest lengths is NaN here, and aligned at the sequence's own end what lies before."""
    lens = [(90, 40), (10, 130), (65, 65), (3, 4)]
    for cut in ((64, 64), (1, 200), (33, 1), (0, 7)):
        call = make_call(3, lens, (2, 1), dtype=dtype, cut=cut, gap=2)
        with_distances(call, random.Random(1), "both")
        call.mask = LoweredMask(band_left=70, band_right=20)
        check(call, call.run(), f"{isa}, at most {cut}")


def test_cu_seqlens_past_the_end_of_the_tensors(isa: str) -> None:
    call = make_call(4, [(20, 30), (40, 50)])
    assert call.packed is not None
    ends = (call.packed.cu_seqlens_q + torch.tensor([0, 0, 7], dtype=torch.int32)), call.packed.cu_seqlens_k.clone()
    ends[1][1:] += 25  # the second sequence then begins inside what was its own and ends outside
    guards = GuardedTensors()
    call.q, call.k, call.v = (guards.embed(name, getattr(call, name)) for name in "qkv")
    call.packed = Packed(*ends, 47, 90)
    call.lens = [(20, 55), (47, 50)]
    found = call.run()
    want = call.truth()
    assert not guards.damage()
    for name in ("out", "lse", "dq", "dk", "dv"):
        torch.testing.assert_close(found[name].double(), want[name], rtol=1e-5, atol=1e-5)


def test_everything_hidden_by_the_table(isa: str) -> None:
    """-inf in the table hides a distance; a query all of whose keys are hidden gives 0 and -inf."""
    for packed in (True, False):
        call = make_call(5, [(70, 70)], packed=packed)
        table = torch.full((2, 60), -math.inf)
        table[0, 20:] = torch.randn(40)
        call.bias = LoweredBias(table=table, first=-30)
        found, want = call.run(), call.truth()
        assert found["lse"][0, 1].isneginf().all() and not found["out"][0, 1].any()
        for name in ("out", "dq", "dk", "dv", "dtable"):
            torch.testing.assert_close(found[name].double(), want[name].nan_to_num(0.0), rtol=1e-5, atol=2e-5)


def test_sums_of_the_lowest_floats_stay_finite(isa: str) -> None:
    lowest = torch.finfo(torch.float32).min
    call = make_call(6, [(40, 70)], packed=False)
    dense = torch.full((1, 1, 1, 70), lowest)
    call.bias = LoweredBias(dense, torch.full((1, 3), lowest), -1, torch.full((1, 2), 3e36))
    call.q = call.q * 0
    found = call.run()
    assert found["lse"].isfinite().all()
    mean = call.v.mean(dim=2, keepdim=True).expand_as(found["out"])
    torch.testing.assert_close(found["out"], mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_bitwise_equal_for_any_number_of_threads(isa: str, packed: bool) -> None:
    """Some heads are worked on by all threads, others by one: every sum has the same order."""
    lens = [(300, 290), (40, 41), (7, 9), (90, 33)] if packed else [(200, 200)] * 3
    for form in ("table", "one row", "both"):
        call = with_distances(make_call(8, lens, (2, 1), packed=packed), random.Random(2), form, columns=65)
        call.sinks, call.seed, call.dropout_p = torch.randn(2), torch.tensor([8]), 0.1
        call.bias = call.bias._replace(dense=torch.randn(1, 2, 1, call.longest[1]))
        first = call.run(threads=1)
        for threads in (2, 2, 3, 5):
            again = call.run(threads=threads)
            for name, tensor in first.items():
                assert torch.equal(tensor, again[name]), f"{isa}, {form}: {name} differs with {threads} threads"


def test_nothing_is_summed_unless_asked() -> None:
    call = with_distances(make_call(9, [(70, 70)]), random.Random(3), "both")
    found, some = call.run(wanted=(False,) * 4), call.run(wanted=(False, True, False, False))
    assert [found[name].numel() for name in GRADS[3:]] == [0, 0, 0, 0]
    assert [some[name].numel() for name in GRADS[3:]] == [0, call.bias.table.numel(), 0, 0]  # type: ignore[union-attr]


def seconds_of_threads() -> dict[str, int]:
    """Clock ticks that every thread of the process has run for."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that has ended meanwhile
            found[task.name] = sum(map(int, (task / "stat").read_text().rpartition(")")[2].split()[11:13]))
    return found


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="tells threads apart by /proc")
def test_one_long_sequence_keeps_every_thread_busy() -> None:
    """One head of one sequence is nearly all of the work: two threads share it, forward and backward."""
    call = make_call(10, [(3000, 3000), (5, 5), (20, 20), (1, 1)], (1, 1), (64, 64))
    call.run(threads=2)
    before = seconds_of_threads()
    for _ in range(3):
        call.run(threads=2)
    ran = sorted(ticks - before.get(name, 0) for name, ticks in seconds_of_threads().items())
    assert ran[-2] > 0.25 * ran[-1], f"clock ticks of the threads: {ran}"


def test_the_memory_of_a_table_is_linear_in_the_length() -> None:
    """Forward and backward with the gradient of T5's table: a dense bias would take 256 MiB a head here."""
    script = """
import resource, torch
from fastattn.backends.cpu.attention import attention_backward, attention_forward
from fastattn.biases.lowered import LoweredBias
from fastattn.masks.lowered import LoweredMask
torch.set_num_threads(2)
def run(q):
    extras = (LoweredMask(), LoweredBias(table=torch.randn(1, 257), first=-128), None, None, None, 0.25, 0.0, 0.0)
    out, lse = attention_forward(q, q, q, *extras)
    return attention_backward(out, None, q, q, q, out, lse, *extras, False, True, False, False, True)
q = torch.randn(1, 1, 8192, 16)
run(q[:, :, :256])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert run(q)[4].abs().sum() > 0
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 48, f"peak memory grew by {run.stdout} MiB"
