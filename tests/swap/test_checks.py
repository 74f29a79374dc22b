"""Each way in which a child stops being the plain module that a parent may read: outputs are those of the child."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.modules.module as torch_module
from torch import nn
from torch.nn.utils import parametrizations, prune

from fastattn import dispatch
from fastattn.nn import checks
from fastattn.nn.checks import why_not_dropout, why_not_input, why_not_linear
from fastattn.nn.norm import why_not_layer_norm
from fastattn.swap import SwapReport, swap
from fastattn.swap.recipes.torch_nn import LayerNorm

Change = Callable[[nn.Module], nn.Module]


class OddLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1.0


class OddTensor(torch.Tensor):
    pass


def hooked(child: nn.Module) -> nn.Module:
    child.register_forward_hook(lambda module, args, out: out * 2.0)
    return child


def pre_hooked(child: nn.Module) -> nn.Module:
    child.register_forward_pre_hook(lambda module, args: (args[0] * 2.0,))
    return child


def backward_hooked(child: nn.Module) -> nn.Module:
    child.register_full_backward_hook(lambda module, grad_in, grad_out: None)
    return child


def pruned(child: nn.Module) -> nn.Module:
    return prune.l1_unstructured(child, "weight", amount=0.5)


def bias_pruned(child: nn.Module) -> nn.Module:
    return prune.random_unstructured(child, "bias", amount=0.5)


def parametrised(child: nn.Module) -> nn.Module:
    return parametrizations.weight_norm(child)


def quantised(child: nn.Module) -> nn.Module:
    holder = nn.Sequential(child)
    return torch.ao.quantization.quantize_dynamic(holder, {nn.Linear})[0]


def forward_replaced(child: nn.Module) -> nn.Module:
    original = child.forward
    child.forward = lambda x: original(x) * 3.0
    return child


def weight_computed(child: nn.Module) -> nn.Module:
    weight = child.weight.detach() * 2.0
    del child._parameters["weight"]
    child.weight = weight
    return child


def weight_subclassed(child: nn.Module) -> nn.Module:
    child.weight = nn.Parameter(child.weight.detach().as_subclass(OddTensor))
    return child


def subclassed(child: nn.Module) -> nn.Module:
    other = OddLinear(child.in_features, child.out_features)
    other.load_state_dict(child.state_dict())
    return other


CHANGES: dict[str, Change] = {
    change.__name__: change
    for change in (
        hooked,
        pre_hooked,
        backward_hooked,
        pruned,
        bias_pruned,
        parametrised,
        quantised,
        forward_replaced,
        weight_computed,
        weight_subclassed,
        subclassed,
    )
}
PLACES = {
    "encoder.layer.0.attention.self": "query",
    "encoder.layer.0.attention.output": "dense",
    "encoder.layer.0.intermediate": "dense",
    "encoder.layer.1.output": "dense",
}
LAYERS = {  # the layers that hold them, which then call their children instead of running as one call
    "encoder.layer.0": "attention.self.query",
    "encoder.layer.1": "output.dense",
}


def run(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).last_hidden_state


def fallbacks(report: SwapReport) -> dict[str, dict[str, int]]:
    return {row.path: row.fallbacks for row in report.rows if row.fallbacks}


@pytest.mark.parametrize("moment", ("before", "after"))
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_child_is_called(change: str, moment: str, tiny_bert, batch, valid_difference) -> None:
    plain, model = tiny_bert(), tiny_bert()
    unchanged = run(plain, batch)
    for path, name in PLACES.items():
        holder = plain.get_submodule(path)
        setattr(holder, name, CHANGES[change](getattr(holder, name)))
    expected = run(plain, batch)

    report = swap(plain if moment == "before" else model)
    swapped = plain if moment == "before" else model
    if moment == "after":
        for path, name in PLACES.items():
            holder = swapped.get_submodule(path)
            torch.manual_seed(0)
            setattr(holder, name, CHANGES[change](getattr(holder, name)))
        if change == "bias_pruned":  # drawn at random: take the other's mask
            swapped.load_state_dict(plain.state_dict())
    with report.counting():
        found = run(swapped, batch)
    assert valid_difference(found, expected) < 2e-5
    if change not in ("backward_hooked", "parametrised", "weight_subclassed"):  # these change no number
        assert valid_difference(found, unchanged) > 1e-3
    if change == "weight_subclassed":  # what a subclass computes is of the subclass: all that follows is called too
        assert set(fallbacks(report)) >= set(PLACES)
        return
    assert set(fallbacks(report)) == {*PLACES, *LAYERS}
    for path, name in (*PLACES.items(), *LAYERS.items()):
        (reason,) = fallbacks(report)[path]
        assert reason.startswith(name + " ")
    report.undo()
    assert torch.equal(run(swapped, batch), expected) or moment == "after"


def test_lora_wrapped_children_are_called(tiny_bert, batch, valid_difference) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["query", "value", "dense"], r=4, init_lora_weights=False)
    plain = tiny_bert()
    torch.manual_seed(3)
    eager = peft.get_peft_model(plain, config).eval()
    expected = run(eager, batch)
    assert valid_difference(expected, run(tiny_bert(), batch)) > 1e-2

    model = tiny_bert()
    swap(model)  # before wrapping
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(model, config).eval()
    assert valid_difference(run(wrapped, batch), expected) < 2e-5

    report = swap(eager)  # after wrapping
    with report.counting():
        assert valid_difference(run(eager, batch), expected) < 2e-5
    assert any("peft.tuners.lora" in row.reason for row in report.rows)
    attention = fallbacks(report)["base_model.model.encoder.layer.0.attention.self"]
    assert sorted(reason.split()[0] for reason in attention) == ["query", "value"]

    with torch.no_grad():  # a merged adapter changes the base weight, which is read where the child is plain again
        merged, merged_eager = wrapped.merge_and_unload(), peft.get_peft_model(tiny_bert(), config)
        merged_eager.load_state_dict(eager.state_dict())
        assert valid_difference(run(merged, batch), run(merged_eager.eval(), batch)) < 2e-5


def test_lora_training_reaches_the_adapters_only(tiny_bert, batch) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_bert()
    swap(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"], r=2)).train()
    wrapped(**batch).last_hidden_state.square().sum().backward()
    trained = {name for name, parameter in wrapped.named_parameters() if parameter.grad is not None}
    assert trained
    assert all("lora_" in name for name in trained)


def test_accelerate_hooks_are_honoured(tiny_bert, batch, valid_difference) -> None:
    hooks = pytest.importorskip("accelerate.hooks")

    class Double(hooks.ModelHook):
        def post_forward(self, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
            return output * 2.0

    plain, model = tiny_bert(), tiny_bert()
    report = swap(model)
    for each in (plain, model):
        hooks.add_hook_to_module(each.encoder.layer[0].output.dense, Double())
    with report.counting():
        assert valid_difference(run(model, batch), run(plain, batch)) < 2e-5
    assert fallbacks(report) == {
        "encoder.layer.0": {"output.dense has its forward replaced on the instance": 1},
        "encoder.layer.0.output": {"dense has its forward replaced on the instance": 1},
    }


@pytest.mark.parametrize("name", ("LayerNorm", "dropout"))
def test_a_changed_norm_or_dropout_is_called(name: str, tiny_bert, batch, valid_difference) -> None:
    plain, model = tiny_bert(), tiny_bert()
    report = swap(model)
    for each in (plain, model):
        hooked(getattr(each.encoder.layer[0].output, name))
    with report.counting():
        assert valid_difference(run(model, batch), run(plain, batch)) < 2e-5
    assert fallbacks(report) == {
        "encoder.layer.0": {f"output.{name} has hooks": 1},
        "encoder.layer.0.output": {f"{name} has hooks": 1},
    }


def test_global_hooks_see_every_child(tiny_bert, batch) -> None:
    plain, model = tiny_bert(), tiny_bert()
    swap(model)
    seen: list[list[str]] = []
    for each in (plain, model):
        names: list[str] = []
        handle = torch_module.register_module_forward_hook(lambda m, a, o, names=names: names.append(type(m).__name__))
        try:
            run(each, batch)
        finally:
            handle.remove()
        seen.append(names)
    assert seen[0] == seen[1]


def test_counting_is_no_hook(tiny_bert, batch) -> None:
    model = tiny_bert()
    report = swap(model)
    with report.counting():
        run(model, batch)
    assert not fallbacks(report)
    assert report.all_called


def test_functional_call_uses_the_given_weights(tiny_bert, batch, valid_difference) -> None:
    plain, model = tiny_bert(), tiny_bert()
    swap(model)
    weights = {name: value.detach() * 0.9 for name, value in plain.named_parameters()}
    found, expected = (
        torch.func.functional_call(each, weights, (), batch).last_hidden_state.detach() for each in (model, plain)
    )
    assert valid_difference(found, expected) < 2e-5


def test_reasons() -> None:
    assert why_not_linear(nn.Linear(2, 2)) is None
    assert why_not_linear(nn.Linear(2, 2, bias=False)) is None
    assert why_not_linear(nn.Identity()) == "is a torch.nn.modules.linear.Identity"
    assert why_not_linear(nn.Linear(2, 2, device="meta")) == "has its weight on the meta device"
    no_weight = nn.Linear(2, 2)
    no_weight.weight = None
    assert why_not_linear(no_weight) == "has no weight"
    assert why_not_linear(weight_subclassed(nn.Linear(2, 2))) == "has a OddTensor as its weight"

    assert why_not_layer_norm(nn.LayerNorm(4)) is None
    assert why_not_layer_norm(nn.LayerNorm(4, elementwise_affine=False)) is None
    assert why_not_layer_norm(LayerNorm(4)) is None
    assert why_not_layer_norm(nn.LayerNorm((2, 4))) == "normalises over 2 dimensions"
    assert why_not_layer_norm(nn.RMSNorm(4)) == "is a torch.nn.modules.normalization.RMSNorm"

    assert why_not_dropout(nn.Dropout(0.5)) is None
    assert why_not_dropout(nn.Dropout(1.0)) == "has p = 1.0"
    assert why_not_dropout(nn.Dropout1d(0.5)) == "is a torch.nn.modules.dropout.Dropout1d"

    assert why_not_input(torch.zeros(2)) is None
    assert why_not_input(nn.Parameter(torch.zeros(2))) is None
    assert why_not_input(torch.zeros(2, dtype=torch.float64)) == "the input is float64"
    assert why_not_input(torch.zeros(2, device="meta")) == "the input lies on meta"
    assert why_not_input(torch.zeros(2).as_subclass(OddTensor)) == "the input is a OddTensor, not a plain tensor"
    nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
    assert why_not_input(nested) == "the input is a nested tensor"


def test_what_was_moved_to_a_gpu_without_kernels_runs_the_original_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference, which alone would take it, is slower than what was there."""
    verdicts = {"cuda": "too old", "triton": "not installed", "reference": None}
    monkeypatch.setattr(dispatch, "_unavailable", verdicts.get)
    monkeypatch.setattr(dispatch, "why_no_kernels_on_gpus", dispatch.why_no_kernels_on_gpus.__wrapped__)
    monkeypatch.setattr(checks, "is_plain", lambda x: True)
    there = SimpleNamespace(is_nested=False, layout=torch.strided, dtype=torch.float32, is_cpu=False, is_cuda=True)
    assert why_not_input(there) == "no kernels run on this GPU: cuda: too old; triton: not installed"
    with dispatch.use_backend("reference"):
        assert why_not_input(there) is None
    assert why_not_input(there, "reference") is None
    verdicts["triton"] = None
    assert why_not_input(there) is None


def test_float64_and_meta_models_run_the_original_code(tiny_bert, batch) -> None:
    model = tiny_bert().double()
    expected = run(copy.deepcopy(model), batch)
    swap(model, attention=False)
    assert torch.equal(run(model, batch), expected)
