"""Large linears that belong to no block: the kernel where it is faster on a CPU, the original everywhere else."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastattn.backends import cpu
from fastattn.backends.cpu import library
from fastattn.functional import direct
from fastattn.nn.checks import why_not_linear
from fastattn.swap import plan, swap
from fastattn.swap.recipes import free_linear

pytestmark = pytest.mark.skipif(cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason()))
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the inputs that went to the kernel."""
    calls: list[tuple[int, ...]] = []
    linear_act = free_linear.linear_act

    def counted(x: Tensor, *args: object, **kwargs: object) -> Tensor:
        calls.append(tuple(x.shape))
        return linear_act(x, *args, **kwargs)

    monkeypatch.setattr(free_linear, "linear_act", counted)
    return calls


def pretend(monkeypatch: pytest.MonkeyPatch, isa: str) -> None:
    """Another instruction set than the one in use; an AMD is of Zen 5."""
    for file in (cpu, library):
        monkeypatch.setattr(file, "isa", lambda: isa)
    monkeypatch.setattr(free_linear, "_family", lambda: 26)


@pytest.fixture
def without_half_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best instruction set here may have some."""
    pretend(monkeypatch, "avx2")


def large(dtype: torch.dtype = torch.float32, *, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1024, 640, bias=bias), nn.Tanh()).to(dtype)


@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_original(kernel_calls, bias) -> None:
    model, x = large(bias=bias), torch.randn(2, 3, 1024)
    keys = list(model.state_dict())
    with torch.no_grad():
        expected = model(x)
        report = swap(model)
        assert [(row.path, row.class_name, row.kernel) for row in report.rows] == [("0", "Linear", "linear_act")]
        assert type(model[0]).__name__ == "Linear" and isinstance(model[0], nn.Linear)
        with report.counting():
            torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)
        assert report.all_called and kernel_calls == [(2, 3, 1024)]
        assert list(model.state_dict()) == keys
        report.undo()
        assert torch.equal(model(x), expected) and len(kernel_calls) == 1


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.usefixtures("without_half_instructions")
def test_halves_err_no_more_than_the_original(kernel_calls, dtype) -> None:
    model, x = large(dtype), torch.randn(70, 1024).to(dtype)
    with torch.no_grad():
        exact, original = model.double()(x.double()), model.to(dtype)(x)
        swap(model)
        error, before = ((y.double() - exact).abs().max() for y in (model(x), original))
    assert error <= 2 * before and kernel_calls == [(70, 1024)]


@pytest.fixture
def with_slow_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's products are slow here, in every dtype."""
    monkeypatch.setattr(free_linear, "has_slow_products", lambda dtype: True)
    monkeypatch.setattr(free_linear, "_is_zen4", lambda: False)


def test_the_original_runs_where_it_is_as_fast(kernel_calls, monkeypatch) -> None:
    monkeypatch.setattr(free_linear, "_is_amds", lambda: False)
    model = large()
    swap(model)
    for x in (torch.randn(33, 1024), torch.randn(1, 1024, requires_grad=True)):
        expected = torch.tanh(nn.functional.linear(x, model[0].weight, model[0].bias))
        assert torch.equal(model(x), expected)
    with torch.no_grad(), pytest.raises(RuntimeError, match="cannot be multiplied"):
        model(torch.randn(1, 1023))
    model[0].bias = nn.Parameter(model[0].bias.to(torch.bfloat16))
    with torch.no_grad(), pytest.raises(RuntimeError, match="must have the same dtype"):
        model(torch.randn(1, 1024))
    model[0].bias = nn.Parameter(model[0].bias.float())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(1, 1024)).dtype is torch.bfloat16
    assert not kernel_calls
    model[0].requires_grad_(False)
    model(torch.randn(1, 1024))
    assert kernel_calls == [(1, 1024)], "nothing is tracked"


@pytest.mark.parametrize(("isa", "name", "taken"), [
    ("avx512bf16", "AMD EPYC", True), ("avx2", "AMD EPYC", False), ("avx512", "Intel Xeon", False),
])  # fmt: skip
def test_many_rows_run_on_the_kernel_where_torch_leaves_half_of_the_processor(
    kernel_calls, monkeypatch, isa, name, taken
) -> None:
    pretend(monkeypatch, isa)
    monkeypatch.setattr(free_linear, "cpu_name", lambda: name)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    free_linear._is_amds.cache_clear()
    model, x = large(), torch.randn(70, 1024)
    expected = model(x).detach()
    swap(model)
    try:
        with torch.no_grad():
            found = model(x)
    finally:
        free_linear._is_amds.cache_clear()
    assert kernel_calls == ([(70, 1024)] if taken else [])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("with_slow_products")
@pytest.mark.parametrize("frozen", [(), ("weight",), ("weight", "bias")])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_trains_on_the_kernel(kernel_calls, monkeypatch, dtype, frozen) -> None:
    monkeypatch.setattr(free_linear, "is_measured", lambda dtype: True)
    model, x = large(dtype), torch.randn(2, 35, 1024).to(dtype).requires_grad_()
    for name in frozen:
        getattr(model[0], name).requires_grad_(False)
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    double = nn.Sequential(nn.Linear(1024, 640), nn.Tanh()).double()
    double.load_state_dict({name: t.double() for name, t in model.state_dict().items()})
    grad = torch.randn(2, 35, 640).to(dtype)
    wide = x.detach().double().requires_grad_()
    double(wide).backward(grad.double())
    exact = [wide.grad, *(p.grad for n, p in double[0].named_parameters() if n not in frozen)]
    before = torch.autograd.grad(model(x), leaves, grad)
    swap(model)
    found = torch.autograd.grad(model(x), leaves, grad)
    assert kernel_calls == [(2, 35, 1024)]
    for own, original, true in zip(found, before, exact, strict=True):
        assert own.dtype is dtype
        # Products of the same roundings: plain torch's error, and what is left to the order of sums.
        slack = 1e-6 * float(true.abs().max()) if dtype is torch.float32 else 0.0
        assert (own - true).abs().max() <= 2 * (original - true).abs().max() + slack


@pytest.mark.usefixtures("with_slow_products")
def test_a_gradient_penalty_is_differentiated(kernel_calls) -> None:
    model, x = large(), torch.randn(70, 1024, requires_grad=True)

    def penalties() -> tuple[Tensor, ...]:
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return torch.autograd.grad((slope.norm(dim=1) - 1).pow(2).sum(), (x, model[0].weight))

    expected = penalties()
    swap(model)
    for found, wanted in zip(penalties(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    assert kernel_calls == [(70, 1024)]


def test_a_forced_backend_runs_every_call(kernel_calls) -> None:
    model = large()
    swap(model, backend="cpu")
    model(torch.randn(40, 1024)).sum().backward()
    assert kernel_calls == [(40, 1024)] and model[0].weight.grad is not None


def test_what_would_gain_nothing_is_no_business_of_a_swap(monkeypatch) -> None:
    small, subclass = nn.Linear(64, 64), type("Mine", (nn.Linear,), {})(1024, 1024)
    meta, double = nn.Linear(1024, 1024, device="meta"), nn.Linear(1024, 1024, dtype=torch.float64)
    for linear in (small, nn.Linear(65536, 24), subclass, meta, double):
        assert not plan(nn.Sequential(linear)).rows
    assert not [row for row in plan(large(), linears=False).rows if row.action == "swap"]
    for isa, dtypes in {
        "amx": (torch.bfloat16, torch.float16),
        "avx512": (torch.float16,),
        "avx512bf16": (torch.bfloat16, torch.float16),
        "avx2": (torch.bfloat16, torch.float16),
    }.items():
        pretend(monkeypatch, isa)
        for dtype in (torch.bfloat16, torch.float16):
            assert len(plan(large(dtype)).rows) == (dtype in dtypes), (isa, dtype)


@pytest.mark.parametrize(
    ("isa", "vendor", "dtype", "rows", "features", "infers", "trains"),
    [
        ("avx512bf16", "AMD EPYC", torch.float32, 300, 1024, True, True),
        ("avx512bf16", "AMD EPYC", torch.float32, 300, 128, True, True),
        ("avx512bf16", "AMD EPYC", torch.float32, 16, 128, False, False),
        ("avx512bf16", "AMD EPYC", torch.float32, 1, 1024, True, False),
        ("avx512bf16", "Intel Xeon", torch.float32, 300, 1024, False, False),
        ("avx512bf16", "Intel Xeon", torch.float32, 30, 1024, True, False),
        ("avx512bf16", "AMD EPYC", torch.bfloat16, 32, 1024, True, False),
        ("avx512bf16", "AMD EPYC", torch.bfloat16, 33, 1024, False, False),
        ("avx2", "AMD EPYC", torch.bfloat16, 33, 1024, True, True),
        ("avx2", "AMD EPYC", torch.bfloat16, 16, 128, True, True),
        ("avx512", "Intel Xeon", torch.float16, 300, 128, True, True),
        ("avx512", "Intel Xeon", torch.float16, 4, 128, False, False),
        ("amx", "Intel Xeon", torch.bfloat16, 128, 1024, True, False),
        ("amx", "Intel Xeon", torch.bfloat16, 129, 1024, False, False),
        ("amx", "Intel Xeon", torch.float16, 300, 1024, True, True),
    ],
)
def test_the_kernel_runs_where_it_was_found_faster(
    monkeypatch, long_way, isa, vendor, dtype, rows, features, infers, trains
) -> None:
    pretend(monkeypatch, isa)
    monkeypatch.setattr(free_linear, "_is_amds", lambda: "AMD" in vendor)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    x, weight = torch.zeros(rows, features, dtype=dtype), torch.zeros(features, features, dtype=dtype)
    assert free_linear._is_faster(x, weight, None) == infers
    assert free_linear._is_faster(x, weight.requires_grad_(), None) == trains


@pytest.mark.parametrize(
    ("dtype", "rows", "infers"),
    [
        (torch.bfloat16, 16, True),
        (torch.bfloat16, 17, False),
        (torch.float16, 8, True),
        (torch.float16, 9, False),
        (torch.float16, 256, True),
    ],
)
def test_transposed_weights_run_on_amx_where_it_is_faster(monkeypatch, dtype, rows, infers) -> None:
    pretend(monkeypatch, "amx")
    x, weight = torch.zeros(rows, 1024, dtype=dtype), torch.zeros(1024, 640, dtype=dtype).t()
    assert free_linear._is_faster(x, weight, None) == infers


@pytest.mark.skipif(direct.calls("cpu") is None, reason="torch before 2.10, or no library")
@pytest.mark.parametrize(
    ("isa", "vendor", "dtype", "rows", "features", "infers"),
    [
        ("avx512bf16", "AMD EPYC", torch.float32, 16, 256, True),
        ("avx512bf16", "AMD EPYC", torch.float32, 15, 256, False),
        ("avx512bf16", "Intel Xeon", torch.float32, 16, 256, False),
        ("avx512bf16", "Intel Xeon", torch.float32, 2, 384, True),
        ("avx512bf16", "Intel Xeon", torch.float32, 1, 384, False),
        ("avx512bf16", "Intel Xeon", torch.float32, 33, 384, False),
        ("avx512bf16", "AMD EPYC", torch.bfloat16, 1, 128, True),
        ("avx512bf16", "AMD EPYC", torch.bfloat16, 32, 127, False),
        ("avx512bf16", "AMD EPYC", torch.bfloat16, 33, 128, False),
        ("avx2", "Intel Xeon", torch.bfloat16, 8, 128, True),
        ("avx2", "Intel Xeon", torch.bfloat16, 1, 256, False),
        ("avx512", "Intel Xeon", torch.float16, 2, 256, True),
        ("avx512", "Intel Xeon", torch.float16, 1, 512, True),
    ],
)
def test_short_calls_pay_for_smaller_weights(monkeypatch, isa, vendor, dtype, rows, features, infers) -> None:
    pretend(monkeypatch, isa)
    monkeypatch.setattr(free_linear, "_is_amds", lambda: "AMD" in vendor)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    x, weight = torch.zeros(rows, features, dtype=dtype), torch.zeros(features, features, dtype=dtype)
    assert free_linear._is_faster(x, weight, None) == infers


@pytest.mark.skipif(direct.calls("cpu") is None, reason="torch before 2.10, or no library")
@pytest.mark.parametrize(
    ("isa", "family", "rows", "features", "infers", "trains"),
    [
        ("avx512bf16", 25, 70, 768, True, False),
        ("avx512bf16", 25, 128, 768, True, True),
        ("avx512bf16", 25, 16, 256, False, False),
        ("avx512bf16", 25, 256, 256, True, False),
        ("avx512bf16", 25, 1, 384, True, False),
        ("avx512bf16", 26, 70, 768, True, True),
        ("avx512bf16", 26, 16, 256, True, False),
        ("avx512bf16", 26, 1, 384, False, False),
        ("avx2", 25, 70, 768, False, False),
        ("avx2", 25, 1, 384, False, False),
    ],
)
def test_generations_of_amds_differ(monkeypatch, isa, family, rows, features, infers, trains) -> None:
    pretend(monkeypatch, isa)
    monkeypatch.setattr(free_linear, "_is_amds", lambda: True)
    monkeypatch.setattr(free_linear, "_family", lambda: family)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    x, weight = torch.zeros(rows, features), torch.zeros(features, features)
    assert free_linear._is_faster(x, weight, None) == infers
    assert free_linear._is_faster(x, weight.requires_grad_(), None) == trains


def test_changed_linears_run_the_original(kernel_calls, monkeypatch) -> None:
    model, x = large(), torch.randn(2, 1024)
    report = swap(model)
    nn.utils.parametrizations.weight_norm(model[0])
    with torch.no_grad():
        expected = torch.tanh(nn.functional.linear(x, model[0].weight, model[0].bias))
        assert torch.equal(model(x), expected)
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x)
    with report.counting(), pytest.warns(UserWarning, match="forward was replaced"):
        assert torch.equal(model(x), torch.tanh(x))
    assert not kernel_calls


def test_a_forward_that_was_replaced_before_is_left(monkeypatch) -> None:
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, input: 3 * forward(self, input))
    assert not plan(large()).rows
    monkeypatch.undo()
    assert len(plan(large()).rows) == 1


def test_recorders_see_torchs_linear(kernel_calls) -> None:
    model, x = large(), torch.randn(2, 1024)
    swap(model)
    with torch.no_grad():
        traced = torch.jit.trace(model, x, check_trace=False)
        with FlopCounterMode(display=False) as counter:
            model(x)
    assert counter.get_total_flops() == 2 * 2 * 1024 * 640 and not kernel_calls
    assert traced(x.requires_grad_()).requires_grad


def test_a_default_device_records_nothing(kernel_calls) -> None:
    model, x = large(), torch.randn(2, 1024)
    swap(model)
    with torch.no_grad(), torch.device("cpu"):
        model(x)
    assert kernel_calls == [(2, 1024)]


def test_undo_asks_for_a_forward_that_was_put_on_top() -> None:
    model = large()
    report = swap(model)
    forward = model[0].forward
    model[0].forward = lambda *args: forward(*args)
    with pytest.raises(RuntimeError, match="forward of 0 was replaced"):
        report.undo()
    del model[0].forward
    report.undo()


def test_without_the_native_library_the_original_runs(kernel_calls, monkeypatch) -> None:
    model = large()
    swap(model)
    monkeypatch.setattr(cpu, "unavailable_reason", lambda: "not built here")
    with torch.no_grad():
        model(torch.randn(1, 1024))
    assert not kernel_calls and not plan(large()).rows


def test_hooks_are_called(kernel_calls) -> None:
    model = large()
    swap(model)
    model[0].register_forward_hook(lambda module, args, y: y * 2)
    with torch.no_grad():
        x = torch.randn(1, 1024)
        torch.testing.assert_close(model(x), torch.tanh(2 * nn.functional.linear(x, model[0].weight, model[0].bias)))
    assert kernel_calls


def test_a_parent_reads_a_swapped_linear() -> None:
    linear = nn.Sequential(nn.Linear(1024, 1024))
    swap(linear)
    assert why_not_linear(linear[0]) is None
    derived = type("Derived", (type(linear[0]),), {"__module__": "elsewhere"})
    linear[0].__class__ = derived
    assert why_not_linear(linear[0]) == "is a elsewhere.Derived"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("error:Dynamo")
def test_compiles_as_one_graph(dtype, without_half_instructions) -> None:
    model = large(dtype)
    swap(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for rows in (1, 5, 40):
            x = torch.randn(rows, 1024).to(dtype)
            assert torch.equal(compiled(x), model(x))


def test_a_saved_model_runs_where_nothing_was_swapped(fresh_process, tmp_path) -> None:
    model = large()
    swap(model)
    torch.save(model, tmp_path / "model.pt")
    script = (
        "import torch; model = torch.load('model.pt', weights_only=False)\n"
        "with torch.no_grad(): print(type(model[0]).__module__, tuple(model(torch.ones(1, 1024)).shape))"
    )
    run = fresh_process(script, cwd=tmp_path)
    assert run.stdout.split() == ["fastattn.swap.recipes.free_linear", "(1,", "640)"], run.stderr


@pytest.mark.usefixtures("without_half_instructions")
def test_transposed_linears_of_transformers(kernel_calls) -> None:
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(512, 1024)).to(torch.bfloat16)
    x = torch.randn(3, 4, 1024).to(torch.bfloat16)
    with torch.no_grad():
        exact, original = model.double()(x.double()), model.to(torch.bfloat16)(x)
        report = swap(model)
        assert [(row.class_name, row.kernel) for row in report.rows] == [("Conv1D", "linear_act")]
        assert (model(x).double() - exact).abs().max() <= 2 * (original.double() - exact).abs().max()
        assert kernel_calls == [(3, 4, 1024)]
        saved = io.BytesIO()
        torch.save(model, saved)
        saved.seek(0)
        assert torch.equal(torch.load(saved, weights_only=False)(x), model(x))
        report.undo()
        assert type(model[0]) is Conv1D and torch.equal(model(x), original)
