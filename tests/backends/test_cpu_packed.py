"""Weights that are kept packed: the same answers from every kernel that reads them, and never those of old values."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import fastattn
from fastattn.backends import cpu
from fastattn.backends.cpu.library import native
from fastattn.parity.bound import parity
from fastattn.parity.eager import eager_linear_act
from fastattn.parity.magnitude import linear_act_magnitudes

pytestmark = pytest.mark.skipif(cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason()))
ISAS = [] if cpu.unavailable_reason() else cpu.available_isas()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def most_in_place(isa: str, dtype: torch.dtype) -> int:
    """Of more rows every kernel packs, kept or not; up to there a weight may be read where it lies."""
    if isa == "amx" and dtype is torch.bfloat16:
        return 128
    return 48 if isa in ("avx512", "avx512bf16", "amx") else 32


def most_beside_packed(isa: str, dtype: torch.dtype) -> int:
    """Of more rows a weight that is kept packed is read so."""
    return 48 if isa == "amx" and dtype is torch.bfloat16 else 32


Keep = Callable[[Tensor], int]


@pytest.fixture
def keep() -> Iterator[Keep]:
    """keep(weight) -> the number under which its memory is kept; forgotten after the test."""
    tokens = []

    def keep(weight: Tensor) -> int:
        alias = weight.detach()
        reach = sum((size - 1) * stride for size, stride in zip(alias.shape, alias.stride(), strict=True)) + 1
        tokens.append(native().keep_packed(alias, alias.data_ptr(), reach * alias.element_size()))
        return int(tokens[-1])

    yield keep
    for token in tokens:
        native().forget_packed(token)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def pieces(token: int) -> int:
    state = native().packed_state(token)
    assert state is not None
    return int(state[0])


def is_kept(dtype: torch.dtype) -> bool:
    """Whether the instruction set in use keeps weights of the dtype."""
    return dtype is torch.float32 or (dtype is torch.bfloat16 and cpu.isa() in ("avx512bf16", "amx"))


def splits(dtype: torch.dtype, rows: int) -> bool:
    """Whether AMX multiplies in parts, which it does not keep."""
    return dtype is torch.float32 and rows >= 400


@pytest.mark.parametrize("lies", ["by rows", "by columns"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_products_are_those_of_an_unpacked_weight(
    isa: str, dtype: torch.dtype, lies: str, keep: Keep, threads: None
) -> None:
    """Bitwise where the weight is packed either way; of fewer rows by the parity rule."""
    draw = random.Random(f"{isa} {dtype} {lies}")
    activations = [None, "gelu", "silu"]
    shapes = [(m, draw.randint(1, 130), draw.randint(1, 130)) for m in (1, 3, 9, 20, 32, 33, 70, 201)]
    shapes += [(33, 700, 49), (601, 520, 31), (450, 96, 100), (5, 1100, 24), (12, 1024, 96)]
    with cpu.use_isa(isa):
        for m, k, n in shapes:
            x, weight = torch.randn(m, k).to(dtype), (torch.randn(n, k) * k**-0.5).to(dtype)
            if lies == "by columns":
                weight = weight.t().contiguous().t()
            bias = torch.randn(n).to(dtype) if draw.random() < 0.7 else None
            activation = draw.choice(activations)
            plain = fastattn.linear_act(x, weight, bias, activation, backend="cpu")
            token = keep(weight)
            first, again = (fastattn.linear_act(x, weight, bias, activation, backend="cpu") for _ in range(2))
            said = f"{m} x {k} x {n}, bias {bias is not None}, {activation}"
            assert torch.equal(first, again), said
            assert pieces(token) <= is_kept(dtype), said
            if is_kept(dtype) and m > most_beside_packed(isa, dtype) and not (isa == "amx" and splits(dtype, m)):
                assert pieces(token) == 1, said
            if m > most_in_place(isa, dtype):
                assert torch.equal(plain, first), said
                continue
            wide = [None if t is None else t.double() for t in (x, weight, bias)]
            truth = fastattn.reference.linear_act(*wide, activation)
            eager = eager_linear_act(x, weight, bias, activation)
            magnitude = linear_act_magnitudes(x, weight, bias, activation, torch.zeros_like(plain))["y"]
            row = parity("y", first, truth, eager, magnitude)
            assert row.passed, f"{said}: {row}"


@pytest.mark.parametrize("way", ["short", "long"])
@pytest.mark.parametrize("isa", ISAS)
def test_blocks_read_all_of_their_weights_packed(
    isa: str, way: str, keep: Keep, request: pytest.FixtureRequest
) -> None:
    if way == "long":
        request.getfixturevalue("long_way")
    x, up, gate = torch.randn(55, 100), torch.randn(130, 100) / 10, torch.randn(130, 100) / 10
    down, bias = torch.randn(60, 130) / 12, torch.randn(130)
    seed = torch.tensor([3])
    with cpu.use_isa(isa), torch.inference_mode():

        def calls() -> list[Tensor]:
            return [
                fastattn.ffn(x, up, bias, down, None, backend="cpu"),
                fastattn.ffn(x, up, bias, down, None, dropout_p=0.3, dropout_seed=seed, backend="cpu"),
                fastattn.gated_ffn(x, gate, up, down, b_up=bias, backend="cpu"),
                fastattn.gated_ffn(x, gate, up, down, dropout_p=0.3, dropout_seed=seed, backend="cpu"),
            ]

        plain = calls()
        tokens = [keep(weight) for weight in (up, gate, down)]
        for one, other in zip(plain, calls(), strict=True):
            assert torch.equal(one, other)
        assert [pieces(token) for token in tokens] == [1, 1, 1]


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_a_layer_is_that_of_unpacked_weights(
    isa: str, dtype: torch.dtype, norm_first: bool, keep: Keep, threads: None
) -> None:
    """One kernel after the other and by blocks, which cut the hidden features into chunks of 384 of which the last is
    not whole."""
    features, hidden = 72, 500
    in_proj, wo, up, down = (
        (torch.randn(n, k) * k**-0.5).to(dtype)
        for n, k in ((3 * features, features), (features, features), (hidden, features), (features, hidden))
    )
    q, k, v = in_proj.chunk(3)
    bias = torch.randn(hidden).to(dtype)
    weights = (q, None, k, None, v, None, wo, None, None, None, up, bias, down, None, None, None)
    with cpu.use_isa(isa), torch.inference_mode():
        xs = [torch.randn(1, rows, features).to(dtype) for rows in (50, 63, 110, 300)]

        def calls() -> list[Tensor]:
            return [
                fastattn.encoder_layer(x, *weights, heads=3, norm_first=norm_first, backend="cpu")  # type: ignore[arg-type]
                for x in xs
            ]

        plain = calls()
        tokens = [keep(weight) for weight in (in_proj, wo, up, down)]
        for kept in (calls(), calls()):
            for one, other in zip(plain, kept, strict=True):
                assert torch.equal(one, other), one.shape
        assert [pieces(token) for token in tokens] == ([3, 1, 1, 1] if is_kept(dtype) else [0, 0, 0, 0])


def test_another_instruction_set_packs_for_itself(keep: Keep) -> None:
    x, weight = torch.randn(50, 90), torch.randn(70, 90)
    token = keep(weight)
    for isa in (*ISAS, *ISAS):
        with cpu.use_isa(isa):
            torch.testing.assert_close(fastattn.linear_act(x, weight, backend="cpu"), x @ weight.t())
    assert pieces(token) == len(ISAS)


def test_parts_of_a_weight_are_kept_as_they_are_read(keep: Keep) -> None:
    x, experts = torch.randn(50, 64), torch.randn(3, 128, 64)
    token = keep(experts)
    outside = torch.randn(128, 64)
    for weight in (experts[0], experts[2], *experts[1].chunk(2), experts[1][5:70].t()[:, :30].t(), outside):
        assert torch.equal(*(fastattn.linear_act(x, weight, backend="cpu") for _ in range(2)))
        torch.testing.assert_close(fastattn.linear_act(x, weight), x @ weight.t(), rtol=1e-4, atol=1e-4)
    assert pieces(token) == 5


def test_views_without_end_do_not_fill_the_memory(keep: Keep) -> None:
    x, weight = torch.randn(40, 256), torch.randn(1024, 256)
    token = keep(weight)
    for rows in range(1024, 900, -1):
        torch.testing.assert_close(fastattn.linear_act(x, weight[:rows]), x @ weight[:rows].t(), rtol=1e-4, atol=1e-4)
    count, size, _ = native().packed_state(token)
    assert 4 <= count <= 5 and size <= 5 * weight.nbytes


def test_few_rows_take_no_memory(keep: Keep) -> None:
    weight = torch.randn(96, 40)
    token = keep(weight)
    fastattn.linear_act(torch.randn(1, 40), weight, backend="cpu")
    fastattn.linear_act(torch.randn(0, 40), weight, backend="cpu")
    assert native().packed_state(token) == (0, 0, False)
    fastattn.linear_act(torch.randn(33, 40), weight, backend="cpu")
    count, size, changed = native().packed_state(token)
    assert count == 1 and not changed and 96 * 40 * 4 <= size <= 2 * 96 * 40 * 4


def test_gradients_are_those_of_an_unpacked_weight(keep: Keep) -> None:
    """A product with a weight the other way, in backward, packs nothing to keep."""
    x, up, down = torch.randn(50, 48), torch.randn(100, 48), torch.randn(48, 100)

    def gradients() -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x,)] + [up.requires_grad_(), down.requires_grad_()]
        y = fastattn.ffn(leaves[0], leaves[1], None, leaves[2], None, backend="cpu")
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    plain = gradients()
    tokens = [keep(up), keep(down)]
    for one, other in zip(plain, gradients(), strict=True):
        assert torch.equal(one, other)
    assert [pieces(token) for token in tokens] == [1, 1]


def double_in_place(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.mul_(2.0)


def double_in_inference_mode(weight: nn.Parameter) -> None:
    with torch.inference_mode():
        weight.mul_(2.0)


def copy_over(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.copy_(weight.clone() * 2.0)


def double_a_view(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight[:, 3:].mul_(2.0)


def double_data(weight: nn.Parameter) -> None:
    weight.data.mul_(2.0)


def double_by_numpy(weight: nn.Parameter) -> None:
    weight.detach().numpy()[:] *= 2.0


def double_elsewhere(weight: nn.Parameter) -> None:
    weight.data = weight.detach() * 2.0


def load(weight: nn.Parameter) -> None:
    module = nn.Module()
    module.weight = weight
    module.load_state_dict({"weight": weight.detach() * 2.0})


def free_and_fill(weight: nn.Parameter) -> None:
    """As FSDP does."""
    values, storage = weight.detach() * 2.0, weight.untyped_storage()
    size = storage.size()
    storage.resize_(0)
    storage.resize_(size)
    weight.data.copy_(values)


@pytest.mark.parametrize(
    "change",
    [
        double_in_place,
        double_in_inference_mode,
        copy_over,
        double_a_view,
        double_data,
        double_by_numpy,
        double_elsewhere,
        load,
        free_and_fill,
    ],
)
def test_a_changed_weight_is_not_read_packed(change: Callable[[nn.Parameter], None], keep: Keep) -> None:
    x, weight = torch.randn(64, 96), nn.Parameter(torch.randn(80, 96))
    token = keep(weight)
    with torch.no_grad():
        fastattn.linear_act(x, weight)
        assert pieces(token) == 1
        change(weight)
        torch.testing.assert_close(fastattn.linear_act(x, weight), x @ weight.t())


def test_a_small_step_past_the_count_of_changes_is_seen(keep: Keep) -> None:
    """Of which most elements, in a half dtype, remain what they were."""
    weight = torch.randn(800, 96, dtype=torch.bfloat16)
    if not is_kept(weight.dtype):
        pytest.skip(f"{cpu.isa()} keeps no bfloat16")
    token = keep(weight)
    x = torch.randn(200, 96, dtype=torch.bfloat16)
    fastattn.linear_act(x, weight)
    stepped = (weight.float() * 1.0022).bfloat16()
    assert 0.7 < (stepped == weight).float().mean() < 1.0
    weight.data.copy_(stepped)
    fastattn.linear_act(x, weight)
    assert native().packed_state(token) == (0, 0, True)


def test_memory_that_was_freed_is_not_looked_at(keep: Keep) -> None:
    x, weight = torch.randn(64, 96), torch.randn(800, 96)
    token = keep(weight)
    fastattn.linear_act(x, weight)
    weight.untyped_storage().resize_(0)
    others = [torch.randn(800, 96) for _ in range(20)]  # some of which may lie where it lay
    for other in others:
        torch.testing.assert_close(fastattn.linear_act(x, other), x @ other.t())
    assert native().packed_state(token) == (0, 0, True)


def test_forgetting_while_others_compute() -> None:
    """A kernel that reads packed memory ends before it is freed."""
    x, weights = torch.randn(64, 128), [torch.randn(256, 128) for _ in range(4)]
    expected = [fastattn.linear_act(x, weight) for weight in weights]
    wrong = []

    def compute() -> None:
        for _ in range(60):
            for weight, y in zip(weights, expected, strict=True):
                if not torch.equal(fastattn.linear_act(x, weight), y):
                    wrong.append(weight)

    workers = [threading.Thread(target=compute) for _ in range(2)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        tokens = [native().keep_packed(w.detach(), w.data_ptr(), w.nbytes) for w in weights]
        for token in tokens:
            assert native().forget_packed(token)
    assert not wrong
    assert not native().forget_packed(tokens[0])
    assert native().packed_state(tokens[0]) is None
