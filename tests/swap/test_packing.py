"""prepack: which weights of a model are kept, what its handle says, and what happens to the model meanwhile."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastattn
from fastattn.backends import cpu
from fastattn.backends.cpu.library import native
from fastattn.swap.packing import PackedRow

pytestmark = pytest.mark.skipif(cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason()))

ROWS = 56
"""Of an input: of so many every kernel packs."""


def block(**options: object) -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 64, **options), nn.GELU(), nn.Linear(64, 32, **options)).eval()  # type: ignore[arg-type]


def swapped_block() -> nn.Sequential:
    model = block()
    fastattn.swap(model)
    return model


def actions(handle: fastattn.Prepacked) -> list[str]:
    return [row.action for row in handle.rows]


def reasons(handle: fastattn.Prepacked) -> list[str]:
    return [row.reason for row in handle.rows]


@torch.inference_mode()
def run(model: nn.Module, *inputs: Tensor, **arguments: Tensor | bool) -> Tensor:
    output = model(*inputs, **arguments)
    return output if isinstance(output, Tensor) else output[0]


def test_a_model_keeps_its_weights_from_the_first_call_on() -> None:
    model, x = swapped_block(), torch.randn(ROWS, 32)
    before, names = run(model, x), set(model.state_dict())
    handle = fastattn.prepack(model)
    assert actions(handle) == ["waits", "waits"] and handle.bytes == 0
    assert torch.equal(run(model, x), before)
    assert actions(handle) == ["packed", "packed"]
    assert 2 * 32 * 64 * 4 <= handle.bytes <= 4 * 32 * 64 * 4
    assert torch.equal(run(model, x), before)
    assert set(model.state_dict()) == names
    handle.undo()
    assert actions(handle) == ["left", "left"] and reasons(handle) == ["undone", "undone"] and handle.bytes == 0
    assert torch.equal(run(model, x), before)
    handle.undo()


def test_what_it_prints() -> None:
    model = nn.Sequential(swapped_block(), swapped_block(), nn.Embedding(5, 32), nn.Bilinear(2, 2, 2).double())
    handle = fastattn.prepack(model)
    run(model[0], torch.randn(ROWS, 32))
    run(model[1], torch.randn(ROWS, 32))
    size = f"{2 * handle.rows[0].bytes / 2**20:.1f}"
    assert str(handle).splitlines() == [
        f"fastattn prepack of Sequential: 4 weights packed, {handle.bytes / 2**20:.1f} MiB beside the model; 0 wait "
        "for a call, 1 left alone",
        "path            shape      dtype    action  MiB  reason",
        "--------------  ---------  -------  ------  ---  -------------",
        f"{{0-1}}.0.weight  64 x 32    float32  packed  {size}",
        f"{{0-1}}.2.weight  32 x 64    float32  packed  {size}",
        "3.weight        2 x 2 x 2  float64  left         it is float64",
    ]
    assert handle.rows[-1] == PackedRow("3.weight", (2, 2, 2), torch.float64, "left", 0, "it is float64")


def test_bert_reads_every_weight_packed(tiny_bert, batch) -> None:
    model = tiny_bert()
    fastattn.swap(model)
    batch = {name: value.repeat(2, 1) for name, value in batch.items()}  # of so many rows every kernel packs
    before = run(model, **batch)
    handle = fastattn.prepack(model)
    after = [run(model, **batch) for _ in range(2)]
    assert torch.equal(after[0], before) and torch.equal(after[1], before)
    packed = {row.path for row in handle.rows if row.action == "packed"}
    assert packed == {f"encoder.layer.{i}.{name}.weight" for i in range(2) for name in _OF_A_LAYER}
    assert not any("embedding" in row.path for row in handle.rows)


_OF_A_LAYER = (
    *(f"attention.self.{name}" for name in ("query", "key", "value")),
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)


@pytest.mark.parametrize("swapped", [True, False])
def test_thirds_of_an_in_projection_are_kept_apart_where_they_are_read_apart(swapped: bool) -> None:
    """In a whole layer q, k and v are read apart, in attention alone as one."""
    if swapped:
        model: nn.Module = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
        fastattn.swap(model)
    else:
        model = fastattn.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    x = torch.randn(1, ROWS, 32)  # of more, AMX splits float32, and does not read it packed
    before, alone = run(model, x), run(model.self_attn, x, x, x, need_weights=False)
    handle = fastattn.prepack(model)
    assert torch.equal(run(model, x), before)
    found = {row.path: row.reason for row in handle.rows if row.action == "packed"}
    names = ("self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
    assert found == {"self_attn.in_proj_weight": "3 parts", **dict.fromkeys(names, "")}
    assert torch.equal(run(model.self_attn, x, x, x, need_weights=False), alone)
    assert {row.path: row.reason for row in handle.rows}["self_attn.in_proj_weight"] == "4 parts"


def test_experts_are_kept_each(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    qwen = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    config = transformers.Qwen3MoeConfig(
        hidden_size=64, moe_intermediate_size=48, num_experts=3, num_experts_per_tok=1, experts_implementation="eager"
    )
    experts = qwen.Qwen3MoeExperts(config).eval()
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.1)
    monkeypatch.setattr("fastattn.swap.recipes.experts._is_large", lambda gate_up: True)
    monkeypatch.setattr("fastattn.swap.recipes.experts.may_gain", lambda *args: True)
    model = nn.Sequential(experts)
    assert fastattn.swap(model).rows[0].action == "swapped"
    x, index = torch.randn(2 * ROWS, 64), torch.arange(2).repeat(ROWS).unsqueeze(1)  # nobody goes to the third
    inputs = (x, index, torch.ones(2 * ROWS, 1))
    before = run(model[0], *inputs)
    handle = fastattn.prepack(model)
    assert torch.equal(run(model[0], *inputs), before) and torch.equal(run(model[0], *inputs), before)
    assert reasons(handle) == ["4 parts", "2 parts"]


def test_transposed_weights_are_kept() -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2Model(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=ROWS)).eval()
    fastattn.swap(model)
    ids = torch.arange(ROWS).unsqueeze(0)
    before = run(model, input_ids=ids)
    handle = fastattn.prepack(model)
    assert torch.equal(run(model, input_ids=ids), before)
    packed = {row.path for row in handle.rows if row.action == "packed"}
    assert {"h.0.mlp.c_fc.weight", "h.0.mlp.c_proj.weight"} <= packed


def test_what_is_left_out_says_why() -> None:
    model = nn.Sequential(swapped_block(), block(dtype=torch.float16), nn.Linear(8, 8, device="meta"))
    with torch.inference_mode():
        model.append(nn.Linear(4, 4))
    handle = fastattn.prepack(model)
    assert reasons(handle)[2:] == [
        *[f"{cpu.isa()} keeps no float16: it would take twice its memory"] * 2,
        "it lies on meta",
        "it was made in inference mode, where torch does not count its changes",
    ]


def test_parameters_of_any_kind_are_met() -> None:
    model = swapped_block()
    model.append(nn.LazyLinear(4))
    for name, data in {
        "nested": torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)]),
        "sparse": torch.eye(4).to_sparse(),
        "empty": torch.empty(10, 10)[:0, :5],
        "expanded": torch.ones(1, 1).expand(5, 7),
    }.items():
        model.register_parameter(name, nn.Parameter(data))
    handle = fastattn.prepack(model)
    run(model[:3], torch.randn(ROWS, 32))
    assert {row.path: row.reason for row in handle.rows if row.action != "packed"} == {
        "sparse": "it is sparse_coo",
        "empty": "it has no memory",
        "expanded": "no call that gains by it has read it yet",
    }
    handle.undo()


def test_halves_are_kept_where_the_processor_multiplies_them() -> None:
    model = block(dtype=torch.bfloat16)
    fastattn.swap(model)
    handle = fastattn.prepack(model)
    run(model, torch.randn(200, 32, dtype=torch.bfloat16))  # AMX reads weights where they lie for up to 128 rows
    assert actions(handle) == ["packed" if cpu.isa() in ("avx512bf16", "amx") else "left"] * 2


def test_two_handles_of_one_model() -> None:
    model, x = swapped_block(), torch.randn(ROWS, 32)
    first, second = fastattn.prepack(model), fastattn.prepack(model)
    before = run(model, x)
    assert actions(first) == actions(second) == ["packed", "packed"]
    first.undo()
    assert actions(first) == ["left", "left"] and actions(second) == ["packed", "packed"]
    assert torch.equal(run(model, x), before)
    second.undo()
    assert second.bytes == 0


def kept(tokens: list[int | None]) -> list[object]:
    """What the binding knows of each: how many matrices, their bytes, whether they have changed; None of none."""
    return [native().packed_state(token) for token in tokens]


def test_without_its_handle_a_model_stays_packed_until_the_next_one() -> None:
    model, x = swapped_block(), torch.randn(ROWS, 32)
    handle = fastattn.prepack(model)
    run(model, x)
    tokens, before = [weight.token for weight in handle._weights], kept([weight.token for weight in handle._weights])
    del handle
    gc.collect()
    assert kept(tokens) == before and None not in before
    with torch.no_grad():
        model.load_state_dict({name: tensor + 1 for name, tensor in model.state_dict().items()}, assign=True)
    again = fastattn.prepack(model)
    assert kept(tokens) == [None, None], "parameters that have been replaced would stay in memory"
    run(model, x)
    assert actions(again) == ["packed", "packed"]
    again.undo()
    assert again.bytes == 0


def test_prepacked_again_weights_are_what_they_are_by_then() -> None:
    """Even where nobody saw that they had changed: a few elements, past torch's count."""
    model, x = swapped_block(), torch.randn(ROWS, 32)
    handle = fastattn.prepack(model)
    run(model, x)
    model[0].weight.data[20, 5:9] = 3.0
    again = fastattn.prepack(model)
    expected = run(copy.deepcopy(model), x)
    assert torch.equal(run(model, x), expected) and torch.equal(run(model, x), expected)
    assert actions(handle) == actions(again) == ["packed", "packed"]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda handle: pickle.loads(pickle.dumps(handle))])
def test_a_copy_of_a_handle_keeps_nothing(copied: Callable[[object], Any]) -> None:
    model = swapped_block()
    handle = fastattn.prepack(model)
    run(model, torch.randn(ROWS, 32))
    other = copied(handle)
    assert other.rows == [] and "0 weights packed" in str(other)
    other.undo()
    assert actions(handle) == ["packed", "packed"]
    model.handle = handle  # type: ignore[assignment]
    assert copied(model).handle is not None


def test_threads_prepack_at_once() -> None:
    models, x = [swapped_block() for _ in range(2)], torch.randn(ROWS, 32)
    expected, errors = [run(model, x) for model in models], []
    crowd = nn.Sequential(*[swapped_block() for _ in range(50)])
    others = fastattn.prepack(crowd)  # each prepack looks at them

    def work() -> None:
        try:
            for i in range(100):
                model = models[i % 2]
                handle = fastattn.prepack(model)
                assert torch.equal(run(model, x), expected[i % 2])
                assert len(handle.rows) == 2
                if i % 3:
                    handle.undo()
        except Exception as error:
            errors.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(before)
    assert errors == [] and actions(others) == ["waits"] * 100


def test_with_the_model_everything_goes() -> None:
    model = swapped_block()
    handle = fastattn.prepack(model)
    run(model, torch.randn(ROWS, 32))
    weight = weakref.ref(model[0].weight)
    del model
    gc.collect()
    assert weight() is None
    assert handle.bytes == 0 and reasons(handle) == ["its module is gone"] * 2


def test_a_copy_is_not_packed() -> None:
    model, x = swapped_block(), torch.randn(ROWS, 32)
    handle = fastattn.prepack(model)
    before, size = run(model, x), handle.bytes
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            copied[0].weight.zero_()
            copied[2].weight.zero_()
        assert torch.equal(run(copied, x), copied[2].bias.expand(ROWS, -1))
    assert handle.bytes == size and torch.equal(run(model, x), before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform does not fork")
def test_a_worker_forked_after_a_call_on_one_thread_may_use_several(fresh_process) -> None:
    script = """
import os, time, torch, fastattn
from torch import nn
model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)).eval()
fastattn.swap(model)
handle = fastattn.prepack(model)
x = torch.randn(200, 64)
torch.set_num_threads(1)
with torch.inference_mode():
    expected = model(x)
    child = os.fork()
    if not child:
        torch.set_num_threads(2)
        right = torch.allclose(model(x), expected, atol=1e-5) and all(row.action == "packed" for row in handle.rows)
        os._exit(0 if right else 3)
for _ in range(600):
    ended, status = os.waitpid(child, os.WNOHANG)
    if ended:
        raise SystemExit(os.waitstatus_to_exitcode(status))
    time.sleep(0.1)
os.kill(child, 9)
raise SystemExit("the worker hangs")
"""
    run = fresh_process(script)
    assert run.returncode == 0, run.stderr


def test_another_dtype_frees_what_was_packed_of_the_old_one() -> None:
    model, x = swapped_block(), torch.randn(ROWS, 32)
    handle = fastattn.prepack(model)
    before = run(model, x)
    model.to(torch.bfloat16)
    torch.testing.assert_close(run(model, x.bfloat16()).float(), before, atol=0.05, rtol=0.05)
    assert reasons(handle) == ["its module holds other memory by now; prepack again to keep that"] * 2
    model.to(torch.float32)
    run(model, x)
    assert actions(handle) == ["left", "left"]
    again = fastattn.prepack(model)
    run(model, x)
    assert actions(again) == ["packed", "packed"]


def test_a_replaced_parameter_is_not_read_packed() -> None:
    model, x = swapped_block(), torch.randn(ROWS, 32)
    handle = fastattn.prepack(model)
    run(model, x)
    model[2].weight = nn.Parameter(torch.zeros(32, 64))
    assert torch.equal(run(model, x), model[2].bias.detach().expand(ROWS, -1))
    assert actions(handle) == ["packed", "left"]


def test_undoing_the_swap_first() -> None:
    model, x = block(), torch.randn(ROWS, 32)
    plain = run(model, x)
    report = fastattn.swap(model)
    handle = fastattn.prepack(model)
    run(model, x)
    report.undo()
    assert torch.equal(run(model, x), plain)
    handle.undo()
    assert handle.bytes == 0


def sgd(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)  # type: ignore[arg-type]


def fused_adam(parameters: object) -> torch.optim.Optimizer:
    """Whose steps torch does not count."""
    return torch.optim.AdamW(parameters, lr=0.5, fused=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("optimizer", [sgd, fused_adam])
def test_training_goes_on_with_the_weights_as_they_are(optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    x = torch.randn(ROWS, 32)
    outputs = []
    for packs in (False, True):
        torch.manual_seed(5)
        model = swapped_block()
        steps = optimizer(model.parameters())
        handle = fastattn.prepack(model) if packs else None
        for _ in range(2):
            outputs.append(run(model, x))
            model(x).square().sum().backward()
            steps.step()
            steps.zero_grad()
        outputs.append(run(model, x))
        if handle is not None:
            assert reasons(handle) == ["it has changed since; prepack again to keep what it is now"] * 2
            again = fastattn.prepack(model)
            assert torch.equal(run(model, x), outputs[-1]) and actions(again) == ["packed", "packed"]
    for plain, packed in zip(outputs[:3], outputs[3:], strict=True):
        assert torch.equal(plain, packed)


def test_a_step_of_a_buffer_changes_the_weights_that_lie_in_it() -> None:
    """By few elements, of which torch does not count the change."""
    model, x = swapped_block(), torch.randn(ROWS, 32)
    flat = nn.Parameter(torch.randn(8000))
    model[0].weight = nn.Parameter(flat.detach()[100 : 100 + 64 * 32].view(64, 32))
    handle = fastattn.prepack(model)
    run(model, x)
    flat.grad = torch.zeros_like(flat)
    flat.grad[100 + 20 * 32 + 5] = 1.0
    torch.optim.SGD([flat], lr=1.0, fused=True).step()
    assert torch.equal(run(model, x), run(copy.deepcopy(model), x))
    assert actions(handle) == ["left", "packed"]


def test_weights_loaded_before_the_first_call_are_the_ones_that_are_kept() -> None:
    model, x = swapped_block(), torch.randn(ROWS, 32)
    handle = fastattn.prepack(model)
    model.load_state_dict({name: tensor * 2.0 for name, tensor in model.state_dict().items()})
    expected = run(copy.deepcopy(model), x)
    assert torch.equal(run(model, x), expected) and torch.equal(run(model, x), expected)
    assert actions(handle) == ["packed", "packed"]


def test_under_a_function_mode() -> None:
    """Which sees every question that is asked of a tensor."""
    model, x = swapped_block(), torch.randn(ROWS, 32)
    before = run(model, x)
    handle = fastattn.prepack(model)
    with torch.device("cpu"):
        assert torch.equal(run(model, x), before) and torch.equal(run(model, x), before)
        assert actions(handle) == ["packed", "packed"]
        with torch.no_grad():
            model[2].weight.zero_()
        assert torch.equal(run(model, x), model[2].bias.detach().expand(ROWS, -1))


def test_under_a_transform() -> None:
    model, x = swapped_block(), torch.randn(3, ROWS, 32)
    before = run(model, x)
    handle = fastattn.prepack(model)
    run(model, x)
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(model)(x), before)
    _, tangent = torch.func.vjp(model, x)
    torch.testing.assert_close(
        tangent(torch.ones_like(before))[0], torch.autograd.grad(model(x.requires_grad_()).sum(), x)[0]
    )
    assert actions(handle) == ["packed", "packed"]


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
def test_compiled_steps_are_seen(fused: bool) -> None:
    model, x = swapped_block(), torch.randn(ROWS, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    handle = fastattn.prepack(model)
    run(model, x)
    model(x).square().sum().backward()
    torch.compile(optimizer.step)()
    expected = run(copy.deepcopy(model), x)
    assert torch.equal(run(model, x), expected)
    assert actions(handle) == ["left", "left"]


@pytest.mark.slow
def test_compiled_graphs_read_packed_weights() -> None:
    model, x = swapped_block(), torch.randn(ROWS, 32)
    before = run(model, x)
    handle = fastattn.prepack(model)
    compiled = torch.compile(model)
    assert torch.equal(run(compiled, x), before)
    assert actions(handle) == ["packed", "packed"]
    with torch.no_grad():
        model[2].weight.zero_()
    assert torch.equal(run(compiled, x), model[2].bias.detach().expand(ROWS, -1))


def test_large_linears_in_bfloat16_run_on_the_kernel_while_they_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 33 to 128 rows: torch's product is as fast as that of a weight that is not."""
    if cpu.isa() != "avx512bf16":
        pytest.skip("measured with AVX-512 BF16 alone")
    model = nn.Sequential(nn.Linear(512, 512, dtype=torch.bfloat16)).eval()
    report = fastattn.swap(model)
    x = torch.randn(64, 512, dtype=torch.bfloat16)

    def choices() -> dict[str, int]:
        with report.counting():
            run(model, x)
            run(model, x.repeat(3, 1))
        return report.rows[0].choices

    assert choices() == {"torch's kernel is as fast": 2}
    handle = fastattn.prepack(model)
    assert choices() == {"torch's kernel is as fast": 1}
    assert actions(handle) == ["packed"]
    handle.undo()
    assert choices() == {"torch's kernel is as fast": 2}


def test_a_model_that_was_not_swapped_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"nothing in this Sequential runs on fastattn's kernels.*fastattn\.swap\(model\)"
    ):
        fastattn.prepack(block())
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got dict"):
        fastattn.prepack({})  # type: ignore[arg-type]


def test_without_the_kernels_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = swapped_block()
    monkeypatch.setattr(cpu, "unavailable_reason", lambda: "the native CPU library is not installed")
    with pytest.raises(fastattn.NotSupported, match="the native CPU library is not installed"):
        fastattn.prepack(model)
