"""Classes that write attention out in torch operations."""

from __future__ import annotations

import copy
import inspect
import math
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn
from fastattn import swap
from fastattn.swap.deferred import products
from fastattn.swap.deferred.tensor import Deferred
from fastattn.swap.recipes import written_out

WIDTH, HEADS, BATCH, LENGTH = 32, 4, 2, 24


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written_out, "SMALLEST", {False: 0, True: 0})


def draw(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Attention(nn.Module):
    """Subclasses write attend(q, k, v), (B, H, S, D) each."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.drop, self.softmax = nn.Dropout(dropout), nn.Softmax(dim=-1)
        self.scale, self.dropout = (WIDTH // HEADS) ** -0.5, dropout
        self.bias = nn.Parameter(draw(HEADS, LENGTH, LENGTH, seed=2))
        self.temperature = nn.Parameter(draw(HEADS, 1, 1, seed=3))
        self.register_buffer("causal", torch.ones(LENGTH, LENGTH).tril().view(1, 1, LENGTH, LENGTH))
        self.register_buffer("padding", torch.arange(LENGTH) >= torch.tensor([[LENGTH], [LENGTH - 5]]))
        self.register_buffer("lonely", torch.arange(LENGTH) >= torch.tensor([[LENGTH], [0]]))
        self.kept: object = None

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.proj(self.attend(q, k, v).transpose(1, 2).contiguous().view(x.shape))


FUSED: list[type[Attention]] = []
NOT_FUSED: list[tuple[type[Attention], str]] = []


def fused(attend) -> type[Attention]:
    kind = type(attend.__name__, (Attention,), {"attend": attend, "__module__": __name__})
    FUSED.append(kind)
    return kind


def left(reason: str):
    def enter(attend) -> type[Attention]:
        kind = type(attend.__name__, (Attention,), {"attend": attend, "__module__": __name__})
        NOT_FUSED.append((kind, reason))
        return kind

    return enter


# ---- spellings that are taken over -----------------------------------------------------------------------------------


@fused
def Operators(self, q, k, v):
    return torch.softmax(q @ k.transpose(-2, -1) * self.scale, dim=-1) @ v


@fused
def ScaledQueries(self, q, k, v):
    return ((q * self.scale) @ k.mT).softmax(-1).matmul(v)


@fused
def Divided(self, q, k, v):
    dots = torch.matmul(q, k.permute(0, 1, 3, 2)) / math.sqrt(q.size(-1))
    attn = F.softmax(dots, dim=3)
    return torch.matmul(self.drop(attn), v)


@fused
def DividedByTensor(self, q, k, v):
    return self.softmax(torch.matmul(q, k.transpose(2, 3)) / torch.sqrt(torch.tensor(8.0))) @ v


@fused
def NumberFirst(self, q, k, v):
    return self.softmax(self.scale * (q @ k.mT)) @ v


@fused
def MinGPT(self, q, k, v):
    size = q.size(2)
    att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
    att = att.masked_fill(self.causal[:, :, :size, :size] == 0, float("-inf"))
    att = F.softmax(att, dim=-1)
    return self.drop(att) @ v


@fused
def Annotated(self, q, k, v):
    return annotated(q, k, v, self.causal, self.drop)


def annotated(query, key, value, mask, dropout):
    scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(query.size(-1))
    scores = scores.masked_fill(mask == 0, -1e9)
    p_attn = dropout(scores.softmax(dim=-1))
    return torch.matmul(p_attn, value)


@fused
def Einsum(self, q, k, v):
    sim = torch.einsum("b h i d, b h j d -> b h i j", q, k) * self.scale
    attn = sim.softmax(dim=-1, dtype=torch.float32).to(v.dtype)
    return torch.einsum("b h i j, b h j d -> b h i d", attn, v)


@fused
def EinsumOfOtherLayouts(self, q, k, v):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    attn = torch.einsum("bqhd,bkhd->bhqk", [q, k]).div(2.5).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", attn, v).transpose(1, 2)


@fused
def EinsumWithDots(self, q, k, v):
    return torch.einsum("...ij,...jd->...id", torch.einsum("...id,...jd->...ij", q, k).softmax(-1), v)


@fused
def OneHeadOfKeys(self, q, k, v):
    k, v = k[:, 0], v[:, 0]
    sim = torch.einsum("bhid,bjd->bhij", q, k) * self.scale
    return torch.einsum("bhij,bjd->bhid", sim.softmax(-1), v)


@fused
def OneHeadOfKeysBroadcast(self, q, k, v):
    return (q @ k[:, :1].mT * self.scale).softmax(-1) @ v[:, :1]


@fused
def GroupedHeads(self, q, k, v):
    k, v = (t[:, :2].repeat_interleave(2, dim=1) for t in (k, v))
    return (q @ k.mT * self.scale).softmax(-1) @ v


@fused
def Bmm(self, q, k, v):
    size = q.shape[2]
    q, k, v = (t.reshape(-1, size, t.shape[-1]) for t in (q, k, v))
    scores = torch.bmm(q * self.scale, k.transpose(1, 2))
    scores += self.causal.new_zeros(size, size).masked_fill(self.causal[0, 0, :size, :size] == 0, -math.inf).unsqueeze(0)
    scores = scores.view(-1, HEADS, size, size)
    scores = scores.masked_fill(self.padding[:, None, None, :size], float("-inf"))
    scores = scores.view(-1, size, size)
    weights = F.softmax(scores.float(), dim=-1).type_as(scores)
    weights = F.dropout(weights, p=self.dropout, training=self.training)
    return torch.bmm(weights, v).view(-1, HEADS, size, v.shape[-1])


@fused
def Baddbmm(self, q, k, v):
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    bias = self.bias.repeat(q.shape[0] // HEADS, 1, 1)
    weights = torch.baddbmm(bias, q, k.transpose(-1, -2), beta=0.5, alpha=self.scale).softmax(dim=-1)
    return torch.bmm(weights, v).unflatten(0, (-1, HEADS))


@fused
def Bias(self, q, k, v):
    attn = q @ k.mT
    attn = attn * self.scale + self.bias.unsqueeze(0)
    return self.softmax(attn) @ v


@fused
def BiasBeforeScale(self, q, k, v):
    return ((q @ k.mT + self.bias) * self.scale).softmax(-1) @ v


@fused
def BiasSubtracted(self, q, k, v):
    return self.softmax(torch.sub(q @ k.mT, self.bias, alpha=0.5)) @ v


@fused
def BiasAndAdditiveMask(self, q, k, v):
    mask = self.padding[:, None, None].float() * -10000.0
    return (self.bias + q @ k.mT * self.scale + mask).softmax(-1) @ v


@fused
def TwoProducts(self, q, k, v):
    position = torch.matmul(q.sin(), k.cos().mT)
    return self.softmax((q @ k.mT + position) * self.scale) @ v


@fused
def Windows(self, q, k, v):
    """As Swin has them: windows of a batch, with a mask for each."""
    batch, size = q.shape[0], q.shape[2]
    attn = q.matmul(k.transpose(-2, -1)) + self.bias.unsqueeze(0)
    attn = attn.view(batch // 2, 2, HEADS, size, size)
    mask = torch.zeros(2, size, size).masked_fill(self.causal[0, 0] == 0, -100.0)
    attn = attn + mask.unsqueeze(1).unsqueeze(0)
    attn = F.softmax(attn.view(-1, HEADS, size, size), dim=-1)
    return F.dropout(attn, p=self.dropout, training=self.training).matmul(v)


@fused
def Where(self, q, k, v):
    dots = q @ k.mT
    dots = torch.where(self.causal.bool(), dots, torch.finfo(dots.dtype).min)
    return self.softmax(dots) @ v


@fused
def WhereOfTensor(self, q, k, v):
    dots = torch.where(self.causal == 0, torch.tensor(-1e4), q @ k.mT)
    return self.softmax(dots) @ v


@fused
def FilledInPlace(self, q, k, v):
    dots = q @ k.mT
    dots.mul_(self.scale)
    dots.masked_fill_(~self.causal.bool(), -torch.finfo(dots.dtype).max)
    dots.masked_fill_(self.padding[:, None, None], -torch.finfo(dots.dtype).max)
    return self.softmax(dots) @ v


@fused
def SeesNothing(self, q, k, v):
    dots = (q @ k.mT).masked_fill(self.lonely[:, None, None], -1e9)
    return self.softmax(dots) @ v


@fused
def SeesNothingNotSoLow(self, q, k, v):
    dots = (q @ k.mT * self.scale).masked_fill(mask=self.lonely[:, None, None], value=-1e4)
    return self.softmax(dots) @ v


@fused
def SeesNothingInSomeRows(self, q, k, v):
    hidden = (torch.arange(LENGTH) % 3 == 0)[:, None].expand(LENGTH, LENGTH) | (self.causal[0, 0] == 0)
    return self.softmax((q @ k.mT).masked_fill(hidden, -3.4e38)) @ v


@fused
def ZeroedAfterwards(self, q, k, v):
    """ESPnet's."""
    hidden = self.lonely[:, None, None]
    dots = (q @ k.mT).masked_fill(hidden, torch.finfo(q.dtype).min)
    return torch.softmax(dots, dim=-1).masked_fill(hidden, 0.0) @ v


@fused
def Temperature(self, q, k, v):
    return (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * self.temperature.exp()).softmax(-1) @ v


@fused
def Whispers(self, q, k, v):
    qk = (q * self.scale**0.5) @ (k * self.scale**0.5).transpose(-1, -2)
    qk = (qk + torch.full((LENGTH, LENGTH), -math.inf).triu_(1)).float()
    return F.softmax(qk, dim=-1).to(q.dtype) @ v


@fused
def TwiceWeighted(self, q, k, v):
    attn = (q @ k.mT).softmax(-1)
    return attn @ v + attn @ v.flip(2)


@fused
def AsksForShapes(self, q, k, v):
    dots = q @ k.mT
    assert isinstance(dots, Tensor) and dots.dim() == dots.ndim == 4 and dots.numel() == dots.shape.numel()
    mask = dots.new_full((dots.size(-2), dots.shape[-1]), -math.inf, dtype=dots.dtype, device=dots.device).triu_(1)
    assert dots.is_floating_point() and not dots.is_cuda and dots.requires_grad == q.requires_grad
    return (dots + mask).softmax(-1) @ v


@fused
def OtherThingsAreWritten(self, q, k, v):
    dots = q @ k.mT
    counts = torch.zeros(3)
    counts[1] = 2
    counts += 1
    return dots.softmax(-1) @ v * counts.sum().div_(5)


# ---- and that compute what they did, by themselves --------------------------------------------------------------------


@left("its attention scores are used by softmax")
def OtherDimension(self, q, k, v):
    return (q @ k.mT).softmax(-2) @ v


@left("its attention scores are used by max")
def Shifted(self, q, k, v):
    dots = q @ k.mT * self.scale
    dots = dots - dots.max(dim=-1, keepdim=True)[0]
    return dots.softmax(-1) @ v


@left("its attention scores are used by softmax")
def SoftmaxTwice(self, q, k, v):
    return (q @ k.mT).softmax(-1).softmax(-1) @ v


@left("its attention scores are used by matmul")
def NoSoftmax(self, q, k, v):
    return (q @ k.mT * self.scale) @ v


@left("its attention scores are used by __getitem__")
def Indexed(self, q, k, v):
    return (q @ k.mT)[:, :, :, 1:].softmax(-1) @ v[:, :, 1:]


@left("its attention scores are used by __setitem__")
def Assigned(self, q, k, v):
    dots = q @ k.mT
    dots[:, :, :, 0] = 1.0
    return dots.softmax(-1) @ v


@left("its attention scores are used by transpose")
def TalkingHeads(self, q, k, v):
    return F.linear((q @ k.mT).transpose(1, 3), self.temperature[:, :, 0].repeat(1, 4)).transpose(1, 3).softmax(-1) @ v


@left("its attention scores are used by softmax")
def ReLU2(self, q, k, v):
    dots = q @ k.mT
    return (dots.softmax(1) + dots.relu().square()) @ v


@left("queries, keys or masks are written to in place after their product")
def QueriesWrittenTo(self, q, k, v):
    q = q.contiguous()
    dots = q @ k.mT
    if not torch.is_grad_enabled():
        q.mul_(2.0)
    return dots.softmax(-1) @ v + q


@left("its attention scores are used by mul_")
def WrittenThroughAView(self, q, k, v):
    dots = q @ k.mT
    weights = (dots * 2).softmax(-1)
    dots.view(-1, LENGTH, LENGTH).mul_(0.5)
    return weights @ v + dots.softmax(-1) @ v


@left("its attention scores are used by relu_")
def WrittenAfterItWasUsed(self, q, k, v):
    dots = q @ k.mT
    other = dots + 0.5 * self.bias
    dots.relu_()
    return other.softmax(-1) @ v + dots.softmax(-1) @ v


@left("its attention scores are used by round")
def OwnGradient(self, q, k, v):
    return (Straight.apply(q @ k.mT * self.scale)).softmax(-1) @ v


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 3


@left("its forward computed no attention that is known")
def WithoutGradient(self, q, k, v):
    with torch.no_grad():
        weights = (q @ k.mT).softmax(-1)
    return weights @ v


@left("its attention scores are used by softmax")
def ScoresWithoutGradient(self, q, k, v):
    dots = q @ k.mT
    with torch.no_grad():
        weights = dots.softmax(-1)
    return weights @ v


@left("its forward computed no attention that is known")
def Checkpointed(self, q, k, v):
    def inner(q, k, v):
        return (q @ k.mT).softmax(-1) @ v

    if not torch.is_grad_enabled():
        return inner(q, k, v).relu_()
    return torch.utils.checkpoint.checkpoint(inner, q, k, v, use_reentrant=False).relu_()


def parts_of(module: nn.Module, x: Tensor, *args: object) -> list[Tensor]:
    """The output, and all gradients."""
    x = x.detach().requires_grad_()
    out = module(x, *args)
    out = out[0] if isinstance(out, tuple) else out
    leaves = [x, *module.parameters()]
    gradients = torch.autograd.grad((out * draw(*out.shape, seed=9)).sum(), leaves, allow_unused=True)
    return [out, *(torch.zeros(1) if g is None else g for g in gradients)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert type(one) is Tensor
        torch.testing.assert_close(one, other, atol=2e-5 * (1 + float(other.detach().abs().max())), rtol=1e-4)


def row_of(report: fastattn.swap.SwapReport) -> fastattn.swap.Row:
    return next(row for row in report.rows if row.path == "")


@pytest.mark.parametrize("kind", FUSED, ids=lambda kind: kind.__name__)
def test_a_spelling_runs_on_the_kernels(kind: type[Attention]) -> None:
    module = kind()
    x = draw(BATCH, LENGTH, WIDTH)
    expected = parts_of(module, x)
    report = swap(module)
    row = row_of(report)
    assert (row.action, row.kernel) == ("swapped", "attention")
    with report.counting():
        found = parts_of(module, x)
        with torch.no_grad():
            torch.testing.assert_close(module(x), expected[0], atol=2e-5, rtol=1e-4)
        with torch.inference_mode():
            torch.testing.assert_close(module(x), expected[0], atol=2e-5, rtol=1e-4)
    assert (row.calls, row.fallbacks, row.choices) == (3, {}, {})
    assert_same(found, expected)
    assert inspect.signature(module.forward) == inspect.signature(kind().forward)
    report.undo()
    assert torch.equal(module(x), expected[0])


@pytest.mark.parametrize("kind, reason", NOT_FUSED, ids=lambda value: getattr(value, "__name__", ""))
def test_what_else_is_done_to_scores_is_done_to_theirs(kind: type[Attention], reason: str) -> None:
    module = kind()
    x = draw(BATCH, LENGTH, WIDTH)
    expected = parts_of(module, x)
    with torch.no_grad():
        inferred = module(x)
    report = swap(module, linears=False)
    assert row_of(report).action == "swapped"
    with report.counting():
        assert_same(parts_of(module, x), expected)
        with torch.no_grad():
            torch.testing.assert_close(module(x), inferred, atol=2e-5, rtol=1e-4)
    assert list(row_of(report).fallbacks) == [reason]


# ---- what is kept of scores and weights ------------------------------------------------------------------------------


class Keeps(Attention):
    """Returns its weights, or stores them, as kind says."""

    kind = "returned"

    def attend(self, q, k, v):
        weights = (q @ k.mT * self.scale).softmax(-1)
        if self.kind == "in a buffer":
            self.causal = weights
        elif self.kind == "stored":
            self.kept = weights
        elif self.kind == "in a list":
            self.kept = [{"weights": weights}]
        elif self.kind == "in a child":
            self.drop.kept = weights
        elif self.kind == "elsewhere":
            ELSEWHERE.append(weights)
        elif self.kind == "averaged":
            self.kept = weights.mean(1)
        self.last = weights
        return weights @ v

    def forward(self, x):
        out, last = super().forward(x), self.last
        del self.last
        return (out, last) if self.kind == "returned" else out


ELSEWHERE: list[Tensor] = []


@pytest.mark.parametrize(
    "kind", ("returned", "in a buffer", "stored", "in a list", "in a child", "elsewhere", "averaged")
)
def test_kept_weights_are_what_they_were(kind: str) -> None:
    def found(module: Keeps) -> tuple[Tensor, Tensor]:
        ELSEWHERE.clear()
        out = module(draw(BATCH, LENGTH, WIDTH))
        kept = {
            "returned": lambda: out[1],
            "in a buffer": lambda: module.causal,
            "in a list": lambda: module.kept[0]["weights"],
            "in a child": lambda: module.drop.kept,
            "elsewhere": lambda: ELSEWHERE[0],
        }.get(kind, lambda: module.kept)()
        return (out[0] if kind == "returned" else out), kept

    module = Keeps()
    module.kind = kind
    expected = found(module)
    report = swap(module, linears=False)
    with report.counting():
        out, kept = found(module)
    assert type(out) is Tensor and type(kept) is (Deferred if kind == "elsewhere" else Tensor)
    if kind == "elsewhere":
        assert kept.node.is_made
    assert_same([out, kept + 0], list(expected))
    assert sum(row_of(report).fallbacks.values()) == (kind != "elsewhere")
    gradients = [torch.autograd.grad(each.square().sum(), module.qkv.weight)[0] for each in (kept, expected[1])]
    assert_same(*([each] for each in gradients))


def test_weights_that_are_kept_after_dropout_are_those_of_the_output() -> None:
    class Dropped(Keeps):
        def attend(self, q, k, v):
            self.last = self.drop((q @ k.mT).softmax(-1))
            self.kept = v
            return self.last @ v

    module = Dropped(dropout=0.5)
    swap(module, linears=False)
    out, weights = module(draw(BATCH, LENGTH, WIDTH))
    assert 0.3 < float((weights == 0).float().mean()) < 0.7
    again = module.proj((weights @ module.kept).transpose(1, 2).reshape(BATCH, LENGTH, WIDTH))
    assert_same([out], [again])


def test_a_module_that_keeps_its_weights_goes_back_to_its_own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Keeps()
    report = swap(module, linears=False)
    products: list[bool] = []
    real = written_out.deferral
    monkeypatch.setattr(written_out, "deferral", lambda *args: products.append(True) or real(*args))
    with report.counting():
        for _ in range(written_out._RETRY + 1):
            module(draw(BATCH, LENGTH, WIDTH))
    assert len(products) == written_out._PATIENCE + 1
    assert row_of(report).fallbacks == {"its attention scores or weights are kept": written_out._RETRY + 1}


# ---- what surrounds it -----------------------------------------------------------------------------------------------


@pytest.fixture
def module() -> Attention:
    return next(kind for kind in FUSED if kind.__name__ == "MinGPT")(dropout=0.5).eval()


X = draw(BATCH, LENGTH, WIDTH)


def test_dropout_is_drawn_in_training(module: Attention) -> None:
    module.eval()
    expected = module(X)
    swap(module, linears=False, strict=True)
    module.train()
    assert not torch.equal(module(X), module(X))
    with torch.no_grad():
        mean = torch.stack([module(X) for _ in range(3000)]).mean(0)
    torch.testing.assert_close(mean, expected, atol=0.05, rtol=0.05)
    torch.manual_seed(3)
    first = module(X)
    torch.manual_seed(3)
    assert torch.equal(module(X), first)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("kind", FUSED, ids=lambda kind: kind.__name__)
def test_half_dtypes_err_no_more_than_theirs(kind: type[Attention], dtype: torch.dtype) -> None:
    """At most twice, and what rounding cannot avoid: in inference, where a sum of gradients blurs nothing."""
    if kind.__name__ in ("BiasAndAdditiveMask", "Windows", "SeesNothingInSomeRows"):
        pytest.skip("it is written for float32")
    if dtype is torch.float16 and kind.__name__ in ("Annotated", "SeesNothing", "ZeroedAfterwards"):
        pytest.skip("float16 has no such low number, or none that the bound of scores allows")
    halved = kind().to(dtype)
    x = X.to(dtype)
    exact = copy.deepcopy(halved).double()
    if kind.__name__ == "Whispers":
        exact.forward = copy.deepcopy(halved).float().forward
        reference = exact(x.float()).double()
    else:
        reference = exact(x.double()) if kind.__name__ != "Einsum" else copy.deepcopy(halved).float()(x.float()).double()
    with torch.no_grad():
        theirs = (halved(x).double() - reference).abs().amax()
        report = swap(halved, linears=False, norms=False)
        with report.counting():
            ours = (halved(x).double() - reference).abs().amax()
    assert not row_of(report).fallbacks
    unit = torch.finfo(dtype).eps / 2
    assert ours <= 2 * theirs + 2 * unit * reference.abs().amax() + 2**-20


def test_hooks_see_what_they_saw(module: Attention) -> None:
    seen: list[Tensor] = []
    report = swap(module, linears=False)
    handle = module.drop.register_forward_hook(lambda child, inputs, output: seen.append(output))
    with report.counting():
        module(X)
    assert type(seen[0]) is Tensor and row_of(report).fallbacks == {"its drop has hooks": 1}
    handle.remove()
    module.proj.register_forward_hook(lambda child, inputs, output: None)
    module.register_forward_hook(lambda child, inputs, output: None)
    with report.counting():
        module(X)
    assert row_of(report).fallbacks == {}


def test_strict_forbids_the_original(module: Attention) -> None:
    swap(module, linears=False, strict=True)
    module(X)
    module.drop.register_forward_hook(lambda child, inputs, output: None)
    with pytest.raises(fastattn.NotSupported, match="its drop has hooks"):
        module(X)
    kept = Keeps()
    swap(kept, linears=False, strict=True)
    with pytest.raises(fastattn.NotSupported, match="are kept"):
        kept(X)


def test_a_forced_backend_runs_calls_of_any_size(module: Attention, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn.backends import reference

    monkeypatch.setattr(written_out, "SMALLEST", {False: 1 << 40, True: 1 << 40})
    calls: list[bool] = []
    forward = reference.attention_forward
    monkeypatch.setattr(reference, "attention_forward", lambda *args: calls.append(True) or forward(*args))
    expected = module(X)
    report = swap(module, linears=False)
    with report.counting():
        for _ in range(3):
            assert torch.equal(module(X), expected)
    assert row_of(report).choices == {written_out.AS_FAST: 3} and not calls
    with fastattn.use_backend("reference"):
        torch.testing.assert_close(module(X), expected, atol=1e-5, rtol=1e-5)
    report.undo()
    swap(module, linears=False, backend="reference")
    torch.testing.assert_close(module(X), expected, atol=1e-5, rtol=1e-5)
    assert len(calls) == 2


def under_vmap(module: nn.Module) -> Tensor:
    return torch.vmap(module)(X[None])[0]


def under_functional_call(module: nn.Module) -> Tensor:
    return torch.func.vjp(module, X)[0]


def under_autocast(module: nn.Module) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return module(X)


def under_a_function_mode(module: nn.Module) -> Tensor:
    with torch.device("cpu"):
        return module(X)


def under_jvp(module: nn.Module) -> Tensor:
    return torch.func.jvp(module, (X,), (X,))[0]


def of_a_subclass(module: nn.Module) -> Tensor:
    return module(X.as_subclass(type("Mine", (Tensor,), {}))).as_subclass(Tensor)


def compiled(module: nn.Module) -> Tensor:
    torch._dynamo.reset()
    return torch.compile(module, backend="eager", fullgraph=True)(X)


def exported(module: nn.Module) -> Tensor:
    return torch.export.export(module, (X,), strict=False).module()(X)


def traced(module: nn.Module) -> Tensor:
    return torch.jit.trace(module, (X,), check_trace=False)(X)


@pytest.mark.parametrize(
    "run",
    (
        under_vmap,
        under_functional_call,
        under_jvp,
        under_autocast,
        under_a_function_mode,
        of_a_subclass,
        compiled,
        exported,
        traced,
    ),
)
def test_what_torch_does_to_modules_it_does_to_the_original(module: Attention, run) -> None:
    expected = run(copy.deepcopy(module))
    report = swap(module, linears=False)
    with report.counting():
        found = run(module)
    torch.testing.assert_close(found, expected)
    if run not in (compiled, exported):
        assert len(row_of(report).fallbacks) == 1
    with report.counting():
        module(X)
    assert row_of(report).fallbacks == {}


def test_on_another_device_it_is_left_with_a_reason(module: Attention) -> None:
    found = row_of(fastattn.plan(module.to("meta")))
    assert found.reason == "attention that a class writes out is taken over on CPUs, and it lies on meta"


def test_a_class_that_only_multiplies_is_no_attention() -> None:
    class OnlyMultipliesAttention(Attention):
        def __init__(self) -> None:
            super().__init__()
            del self.softmax

        def attend(self, q, k, v):
            return q @ k.mT @ v

    found = row_of(fastattn.plan(OnlyMultipliesAttention()))
    assert (found.action, found.reason) == ("left", "no recipe for class OnlyMultipliesAttention")


def test_a_module_with_attention_inside_is_left_to_that(module: Attention) -> None:
    class Outer(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def attend(self, q, k, v):
            return (q @ k.mT).softmax(-1) @ v

    found = {row.path: row.action for row in fastattn.plan(Outer(), linears=False).rows}
    assert found == {"inner": "swap"}


def test_a_method_replaced_later_runs(module: Attention) -> None:
    report = swap(module, linears=False)
    module.attend = lambda q, k, v: v * 0
    with report.counting():
        torch.testing.assert_close(module(X), module.proj.bias.expand(X.shape))
    assert row_of(report).fallbacks == {"its attend was replaced": 1}


def test_errors_are_theirs(module: Attention) -> None:
    short = draw(BATCH, LENGTH, WIDTH // 2)
    wrong = NOT_FUSED[0][0]()
    wrong.attend = None
    swap(module, linears=False)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        module(short)
    with pytest.raises(RuntimeError, match="must match the existing size|must match the size"):
        module(draw(BATCH, LENGTH + 1, WIDTH))
    torch.testing.assert_close(module(X), module(X))


def test_outputs_may_be_viewed_as_products_are() -> None:
    class Views(Attention):
        def forward(self, x):
            q, k, v = self.heads(x)
            out = (q @ k.mT).softmax(-1) @ v
            return out.view(BATCH, -1), out.as_strided((2, 3), (3, 1)), out

    module = Views().eval()
    expected = module(X)
    swap(module, linears=False)
    found = module(X)
    assert_same(list(found), list(expected))
    assert found[2].is_contiguous()


def test_what_is_written_to_behind_the_mode_is_noticed() -> None:
    class Behind(Attention):
        def attend(self, q, k, v):
            q = q.detach().clone()
            dots = q @ k.mT
            with torch._C.DisableTorchFunction():
                q.mul_(2)
            return dots.softmax(-1) @ v

    module = Behind()
    swap(module, linears=False)
    with pytest.raises(RuntimeError, match="leave this module out of the swap"):
        module(X)


def test_copies_and_threads(module: Attention) -> None:
    expected = module(X)
    swap(module, linears=False)
    twin = copy.deepcopy(module)
    found: list[Tensor] = []
    threads = [threading.Thread(target=lambda: found.extend(twin(X) for _ in range(20))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80
    for each in found:
        torch.testing.assert_close(each, expected, atol=1e-5, rtol=1e-5)


def test_saved_whole_it_loads_swapped_in_a_fresh_process(tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text(
        "import torch\nfrom torch import nn\n\n\n"
        "class Attention(nn.Module):\n"
        "    def forward(self, q):\n        return (q @ q.mT).softmax(-1) @ q\n"
    )
    script = (
        "import sys, torch\nsys.path.insert(0, {0!r})\nimport theirs, fastattn\nm = theirs.Attention()\n"
        "fastattn.swap(m)\ntorch.save(m, {0!r} + '/m.pt')\n"
    )
    load = (
        "import sys, torch\nsys.path.insert(0, {0!r})\nm = torch.load({0!r} + '/m.pt', weights_only=False)\n"
        "q = torch.randn(1, 2, 400, 8)\n"
        "torch.testing.assert_close(m(q), m.fastattn_original.forward(m, q), atol=1e-5, rtol=1e-5)\n"
        "import fastattn\nr = fastattn.swap(m)\nprint(r)\n"
        "from fastattn.swap.recipes import written_out as w\nassert not w._in_vain and not w._too_small\n"
        "print(type(m).__mro__)\n"
    )
    for text in (script, load):
        run = subprocess.run([sys.executable, "-c", text.format(str(tmp_path))], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
    assert "WritesOut" in run.stdout


class Outer(Attention):
    """Attention of its own around a child's, in whose forward it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = FUSED[0]()

    def attend(self, q, k, v):
        dots = q @ k.mT
        x = self.inner(v.transpose(1, 2).flatten(2))
        return dots.softmax(-1) @ v + x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def test_a_module_within_another(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Outer()
    expected = parts_of(module, X)
    inner = swap(module.inner, linears=False)
    recipe = written_out.Recipe
    monkeypatch.setattr(written_out, "Recipe", lambda *args, applies, **options: recipe(*args, **options))
    report = swap(module, linears=False)
    with report.counting(), inner.counting():
        assert_same(parts_of(module, X), expected)
    assert row_of(report).action == "swapped" and row_of(report).fallbacks == {}
    assert row_of(inner).fallbacks == {}


# ---- random programs -------------------------------------------------------------------------------------------------


class Program(Attention):
    """Random operations on a few variables, in a straight line. Names one product and one softmax: @ and softmax."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.steps, self.log = seed, []

    def attend(self, q, k, v):
        if self.dropout:
            return (q @ k.mT).softmax(-1) @ v
        return run_program(self, q, k, v)


def run_program(module: Program, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What it does depends on the seed and on shapes alone."""
    import random

    choose = random.Random(module.steps)
    small, scores, log = [q * 1.0, k * 1.0, v * 1.0], [], []
    module.log = log
    see = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    masks = [~see, module.padding[:, None, None], module.lonely[:, None, None], ~see.flip(1) & ~see]
    out = v * 0.1
    for _ in range(choose.randint(3, 12)):
        if not scores or choose.random() < 0.15:
            scores.append(choose.choice(small) @ choose.choice(small).mT)
            log.append("product")
            continue
        i = choose.randrange(len(scores)) if choose.random() < 0.3 else len(scores) - 1
        s, what = scores[i], choose.randrange(26)
        log.append(f"{what} of {i}")
        if what < 3:
            scores[i] = s * choose.choice((0.35, 0.5, module.temperature.exp()))
        elif what == 3:
            scores[i] = s / 2.0
        elif what < 6:
            scores[i] = s + choose.choice((module.bias, masks[0] * -1e4, s.new_zeros(LENGTH).float()))
        elif what < 9:
            scores[i] = s.masked_fill(choose.choice(masks), choose.choice((-1e9, -1e4, -3e38)))
        elif what == 9:
            scores[i] = s.masked_fill(masks[0], -math.inf)
        elif what < 13:
            scores.append(s.softmax(-1))
        elif what == 13:
            scores[i] = F.dropout(s, 0.0 if choose.random() < 0.7 else 0.3, module.training and choose.random() < 0.0)
        elif what < 18:
            out = out + s.softmax(-1) @ choose.choice(small)
        elif what == 18:
            out = out + (s.softmax(-1) @ choose.choice(small)).tanh()
            scores.append(s)
        elif what == 19:
            s.mul_(0.5)
        elif what == 20:
            s.masked_fill_(choose.choice(masks), choose.choice((-1e9, -1e4, 0.0)))
        elif what == 21:
            s.add_(module.bias * 0.5)
        elif what == 22:
            scores[i] = s.view(-1, LENGTH, LENGTH).view(BATCH, HEADS, LENGTH, LENGTH)
        elif what == 23:
            s[..., 0] = 0.25
        elif what == 24:
            scores.append(s.transpose(-1, -2) if choose.random() < 0.5 else s[:, :, :LENGTH])
        else:
            with torch.set_grad_enabled(choose.random() < 0.5):
                t = choose.choice(small)
                if not torch.is_grad_enabled():
                    out = out + (s.softmax(-1) @ t) * 0.5
                else:
                    scores.append(Straight.apply(s * 1.5))
        if choose.random() < 0.05 and not torch.is_grad_enabled():
            choose.choice(small).mul_(1.5)
    return out + (scores[-1] if choose.random() < 0.2 else scores[0]).clamp(-5, 5).softmax(-1) @ v


def outcome(module: Program, gradients: bool) -> list[Tensor] | str:
    try:
        if gradients:
            return parts_of(module, X)
        with torch.no_grad():
            return [module(X)]
    except RuntimeError as error:
        return str(error).splitlines()[0][:60]


@pytest.mark.parametrize("start", range(0, 400, 40))
def test_random_programs_give_what_they_gave(start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    attended: list[bool] = []
    real = products.attend
    monkeypatch.setattr(products, "attend", lambda *args: attended.append(True) or real(*args))
    for seed in range(start, start + 40):
        for gradients in (False, True):
            module = Program(seed)
            expected = outcome(module, gradients)
            report = swap(module, linears=False)
            with report.counting():
                found = outcome(module, gradients)
            if isinstance(expected, str) or isinstance(found, str):
                assert found == expected, (seed, gradients, module.log)
                continue
            for one, other in zip(found, expected, strict=True):
                scale = 1 + float(other.detach().nan_to_num().abs().max())
                assert torch.allclose(one, other, atol=1e-4 * scale, rtol=1e-3, equal_nan=True), (
                    f"seed {seed}, gradients {gradients}: {float((one - other).abs().max())} of {scale}: {module.log}"
                )
    assert len(attended) > 15
