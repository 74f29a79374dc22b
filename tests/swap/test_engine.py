"""plan, swap and undo: what changes in a model, what never does, and what is refused."""

from __future__ import annotations

import copy
import importlib.metadata
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastattn
import fastattn.swap.report
from fastattn.dispatch import backends
from fastattn.errors import NotSupported
from fastattn.swap import NotSwapped, engine, plan, swap


def output(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).last_hidden_state


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def test_swap_keeps_parameters_keys_and_config_object(tiny_bert, batch) -> None:
    model = tiny_bert()
    config, keys = model.config, list(model.state_dict())
    parameters = [(name, id(parameter)) for name, parameter in model.named_parameters()]
    names = [type(module).__name__ for module in model.modules()]
    before, original_classes = output(model, batch), classes(model)
    report = swap(model)
    assert list(model.state_dict()) == keys
    assert [(name, id(parameter)) for name, parameter in model.named_parameters()] == parameters
    assert [type(module).__name__ for module in model.modules()] == names
    assert model.config is not config
    assert not torch.equal(output(model, batch), torch.zeros_like(before))
    report.undo()
    assert classes(model) == original_classes
    assert model.config is config
    assert all(not name.startswith("fastattn") for module in model.modules() for name in module.__dict__)
    assert torch.equal(output(model, batch), before)


def test_plan_changes_nothing(tiny_bert) -> None:
    model = tiny_bert()
    config, before = model.config, classes(model)
    report = plan(model)
    assert classes(model) == before
    assert model.config is config
    assert not report.applied
    assert {row.action for row in report.rows} == {"swap", "fused"}
    with pytest.raises(RuntimeError, match="undo: nothing to undo"):
        report.undo()


def test_undo_twice_raises(tiny_bert) -> None:
    report = swap(tiny_bert())
    report.undo()
    with pytest.raises(RuntimeError, match="undone before"):
        report.undo()


def test_undo_refuses_a_module_that_changed_class_and_changes_nothing() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8))
    report = swap(model)
    nn.utils.parametrize.register_parametrization(model[1], "weight", nn.Identity())
    before = classes(model)
    with pytest.raises(RuntimeError, match=r"undo: 1 is now a .*ParametrizedLayerNorm"):
        report.undo()
    assert classes(model) == before
    nn.utils.parametrize.remove_parametrizations(model[1], "weight")
    report.undo()
    assert classes(model) == [nn.Sequential, nn.LayerNorm, nn.LayerNorm]


class Frozen(nn.Module):
    """Refuses attributes once it is built."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)

    def __setattr__(self, name, value):
        if name == "__class__":
            raise AttributeError("frozen")
        super().__setattr__(name, value)

    def forward(self, x):
        return self.down(self.act(self.up(x)))


def test_a_module_that_refuses_attributes_is_swapped_and_put_back() -> None:
    module = Frozen()
    x = torch.randn(3, 8)
    expected = module(x)
    report = swap(module)
    assert type(module) is not Frozen
    torch.testing.assert_close(module(x), expected)
    report.undo()
    assert type(module) is Frozen


def test_a_swap_that_fails_midway_leaves_nothing_swapped(tiny_bert, monkeypatch) -> None:
    model = nn.Sequential(tiny_bert(), nn.LayerNorm(8), Frozen())
    before, config = classes(model), model[0].config
    apply = engine._Set.apply

    def fail_at_the_last(step: engine._Set) -> None:
        if step.original is Frozen:
            raise AttributeError("frozen")
        apply(step)

    monkeypatch.setattr(engine._Set, "apply", fail_at_the_last)
    with pytest.raises(AttributeError, match="frozen"):
        swap(model, backend="reference")
    assert classes(model) == before and model[0].config is config
    assert not any(name.startswith("fastattn") for module in model.modules() for name in vars(module))


def test_undo_after_hooks_that_were_removed(tiny_bert, batch) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = tiny_bert()
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
    report = swap(model)
    for module in model.modules():
        hooks.add_hook_to_module(module, hooks.ModelHook())
    with pytest.raises(RuntimeError, match="was replaced on the instance since the swap"):
        report.undo()
    hooks.remove_hook_from_module(model, recurse=True)
    report.undo()
    with torch.no_grad():
        assert torch.equal(model(**batch).last_hidden_state, expected)


def test_a_module_that_holds_its_own_forward_is_swapped(tiny_bert, batch) -> None:
    """As accelerate leaves it when it removes its hooks, and transformers 4 when it has collected attention weights."""
    model = tiny_bert()
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
    for module in model.modules():
        module.forward = module.forward
    report = swap(model, strict=True)
    with report.counting(), torch.no_grad():
        torch.testing.assert_close(model(**batch).last_hidden_state, expected, atol=1e-5, rtol=1e-4)
    assert report.all_called
    assert not any(row.fallbacks for row in report.rows)
    report.undo()
    with torch.no_grad():
        assert torch.equal(model(**batch).last_hidden_state, expected)


def test_undo_refuses_a_replaced_config(tiny_bert) -> None:
    model = tiny_bert()
    report = swap(model)
    mine = model.config
    model.config = copy.deepcopy(mine)
    with pytest.raises(RuntimeError, match="undo: a BertModel has another config"):
        report.undo()
    model.config = mine
    report.undo()


def test_a_config_shared_by_two_models_changes_in_one(tiny_bert, batch) -> None:
    first = tiny_bert()
    second = type(first)(first.config).eval()
    before = output(second, batch)
    assert first.config is second.config
    chosen = second.config._attn_implementation
    report = swap(first)
    assert first.config._attn_implementation == "fastattn"
    configs = [module.config for module in first.modules() if hasattr(module, "config")]
    assert all(config is first.config for config in configs)
    assert second.config._attn_implementation == chosen
    assert torch.equal(output(second, batch), before)
    report.undo()
    assert first.config is second.config


def test_set_attn_implementation_after_the_swap_is_obeyed(tiny_bert, batch, valid_difference) -> None:
    model = tiny_bert()
    before = output(model, batch)
    report = swap(model)
    model.set_attn_implementation("eager")
    with report.counting():
        assert valid_difference(output(model, batch), before) < 1e-5
    row = next(row for row in report.rows if row.class_name == "BertSelfAttention")
    assert row.fallbacks == {'the config asks for the attention "eager"': 1}
    report.undo()
    assert torch.equal(output(model, batch), before)


def test_undo_keeps_what_was_changed_in_the_config_since(tiny_bert, batch, valid_difference) -> None:
    model = tiny_bert()
    config, chosen = model.config, model.config._attn_implementation
    config.obsolete = 1
    report = swap(model)
    model.resize_token_embeddings(70)
    model.config.use_cache = False
    model.config.marks = {"of": ["mine"]}
    del model.config.obsolete
    model.set_attn_implementation("eager")
    found = output(model, batch)
    report.undo()
    assert model.config is config
    assert (config.vocab_size, config.use_cache, config.marks) == (70, False, {"of": ["mine"]})
    assert not hasattr(config, "obsolete")
    assert config._attn_implementation == chosen
    assert valid_difference(output(model, batch), found) < 1e-5


def tiny_clip() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text, vision = {**sizes, "vocab_size": 60}, {**sizes, "image_size": 8, "patch_size": 4}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


def test_a_config_of_several_parts_still_reaches_them() -> None:
    model = tiny_clip()
    parts = (model.text_model, model.vision_model)
    before, old = model.config.to_dict(), model.config

    def chosen() -> tuple[str, ...]:
        return tuple(part.config._attn_implementation for part in parts)

    report = swap(model)
    assert chosen() == ("fastattn", "fastattn")
    assert (model.config.text_config, model.config.vision_config) == tuple(part.config for part in parts)
    assert all(
        part.config is not whole for part, whole in zip(parts, (old.text_config, old.vision_config), strict=True)
    )
    model.set_attn_implementation({"text_config": "eager"})
    assert chosen() == ("eager", "fastattn")
    model.set_attn_implementation("fastattn")
    assert chosen() == ("fastattn", "fastattn")
    report.undo()
    assert model.config is old
    assert parts[0].config is old.text_config
    assert model.config.to_dict() == before
    assert chosen() == ("sdpa", "sdpa")


def test_a_part_that_is_met_before_the_whole() -> None:
    clip = tiny_clip()
    report = swap(nn.ModuleList([clip.text_model, clip]))
    assert clip.text_model.config is clip.config.text_config
    assert clip.text_model.config._attn_implementation == clip.vision_model.config._attn_implementation == "fastattn"
    other = copy.deepcopy(clip.config.vision_config)
    clip.config.vision_config = other
    report.undo()
    assert clip.config.vision_config is other
    assert clip.text_model.config._attn_implementation == "sdpa"


def test_a_report_is_saved_with_the_model_that_holds_it() -> None:
    model = tiny_clip()
    model.report = swap(model)
    loaded = pickle.loads(pickle.dumps(model))
    loaded.config.projection_dim = 77
    loaded.report.undo()
    assert type(loaded.text_model.encoder.layers[0]) is type(tiny_clip().text_model.encoder.layers[0])
    assert loaded.config.projection_dim == 77
    assert loaded.config.text_config is loaded.text_model.config
    assert loaded.text_model.config._attn_implementation == "sdpa"
    assert model.text_model.config._attn_implementation == "fastattn"
    model.report.undo()


class Thing:
    """It equals itself alone."""


def test_undo_leaves_alone_what_it_cannot_compare(tiny_bert) -> None:
    model = tiny_bert()
    thing = model.config.thing = Thing()
    swap(model).undo()
    assert model.config.thing is thing
    report = swap(model)
    model.config.thing = other = Thing()
    report.undo()
    assert model.config.thing is other


@pytest.mark.parametrize("off", ("attention", "norms", "ffns", "linears"))
def test_each_part_can_be_left_out(off: str, tiny_bert, batch, valid_difference) -> None:
    model = tiny_bert()
    before = output(model, batch)
    report = swap(model, **{off: False})
    rows = {row.path: row for row in report.rows}
    words = {"attention": "attention", "norms": "norm", "ffns": "linear_act", "linears": "linear (q, k, v)"}
    assert not any(words[off] in row.kernel for row in report.rows)
    assert (rows["embeddings.LayerNorm"].action == "left") == (off == "norms")
    if off == "norms":
        assert rows["embeddings.LayerNorm"].reason == "turned off: norms=False"
    assert (model.config._attn_implementation == "fastattn") == (off != "attention")
    with report.counting():
        assert valid_difference(output(model, batch), before) < 1e-5
    assert report.all_called
    report.undo()
    assert torch.equal(output(model, batch), before)


def test_only_one_part(tiny_bert, batch, valid_difference) -> None:
    for part in ("attention", "norms", "ffns", "linears"):
        model = tiny_bert()
        before = output(model, batch)
        flags = dict.fromkeys(("attention", "norms", "ffns", "linears"), False)
        report = swap(model, **{**flags, part: True})
        with report.counting():
            assert valid_difference(output(model, batch), before) < 1e-5
        assert report.all_called, part
        report.undo()
        assert torch.equal(output(model, batch), before)


def test_swap_twice_leaves_the_first_swap_alone(tiny_bert, batch) -> None:
    model = tiny_bert()
    before = output(model, batch)
    first = swap(model)
    second = swap(model, strict=True)
    assert {row.reason for row in second.rows if row.class_name != "LayerNorm"} == {"swapped before"}
    if second.swapped_modules:
        second.undo()
    first.undo()
    assert torch.equal(output(model, batch), before)


def test_strict_lists_everything_and_swaps_nothing(tiny_bert) -> None:
    model = tiny_bert(hidden_act="gelu_10")
    model.encoder.layer[1].output.dense.register_forward_hook(lambda *_: None)
    before = classes(model)
    with pytest.raises(NotSwapped) as caught:
        swap(model, strict=True)
    assert isinstance(caught.value, NotSupported)
    assert set(caught.value.reasons) == {
        "encoder.layer.0",
        "encoder.layer.0.intermediate",
        "encoder.layer.1",
        "encoder.layer.1.intermediate",
        "encoder.layer.1.output",
    }
    assert "encoder.layer.1.output: dense has hooks" in str(caught.value)
    assert "the activation ClippedGELUActivation has no kernel" in str(caught.value)
    assert classes(model) == before
    swap(tiny_bert(), strict=True)
    swap(tiny_bert(hidden_act="gelu_10"), strict=True, ffns=False)


def test_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match="backend='cudnn' is unknown: pass one of"):
        swap(nn.LayerNorm(4), backend="cudnn")


def test_unusable_backend_is_refused() -> None:
    unusable = [name for name, reason in backends().items() if reason is not None]
    if not unusable:
        pytest.skip("every backend is usable here")
    with pytest.raises(NotSupported, match=unusable[0]):
        swap(nn.LayerNorm(4), backend=unusable[0])


def test_backend_is_forced_and_forgotten_by_undo(tiny_bert, batch, valid_difference) -> None:
    model = tiny_bert()
    before = output(model, batch)
    report = swap(model, backend="reference")
    assert model.embeddings.LayerNorm.fastattn_backend == "reference"
    assert valid_difference(output(model, batch), before) < 1e-5
    report.undo()
    assert "fastattn_backend" not in model.embeddings.LayerNorm.__dict__


def test_model_must_be_a_module() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got dict"):
        swap({})


def test_the_package_is_callable_after_its_parts_were_imported(tiny_bert) -> None:
    package = sys.modules["fastattn.swap"]
    for function in (fastattn.swap, package):
        assert function(nn.LayerNorm(4)).rows[0].action == "swapped"
        with pytest.raises(TypeError):
            function(nn.LayerNorm(4), norm=False)
    assert package.plan(nn.LayerNorm(4)).rows[0].action == "swap"


def test_shared_module_is_swapped_once() -> None:
    norm = nn.LayerNorm(8)
    model = nn.ModuleDict({"first": norm, "second": nn.Sequential(nn.Linear(8, 8), norm)})
    report = swap(model)
    assert [(row.path, row.action, row.reason) for row in report.rows] == [("first", "swapped", "also at second.1")]
    assert model["first"] is model["second"][1]
    report.undo()
    assert type(norm) is nn.LayerNorm


def test_the_root_itself_can_be_swapped() -> None:
    norm = nn.LayerNorm(8)
    report = swap(norm)
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    with report.counting():
        torch.testing.assert_close(norm(x), nn.functional.layer_norm(x, (8,)))
    assert "(the model)" in str(report)
    assert report.all_called


def test_deepcopy_keeps_the_swap_and_owns_its_weights(tiny_bert, batch) -> None:
    model = tiny_bert()
    swap(model)
    twin = copy.deepcopy(model)
    assert classes(twin) == classes(model)
    assert torch.equal(output(twin, batch), output(model, batch))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert output(model, batch).abs().max() > 0


def test_saved_whole_it_stays_swapped_in_a_fresh_process(fresh_process, tiny_bert, batch, tmp_path: Path) -> None:
    model = tiny_bert()
    swap(model, linears=False)
    torch.save({"model": model, "batch": batch, "expected": output(model, batch)}, tmp_path / "model.pt")
    script = """
import sys, torch
saved = torch.load(sys.argv[1], weights_only=False)
model = saved["model"]
with torch.no_grad():
    assert torch.equal(model(**saved["batch"]).last_hidden_state, saved["expected"])
attention = model.encoder.layer[0].attention.self
assert type(attention).__module__ == "fastattn.swap.recognised", type(attention)
assert attention.fastattn_off == {"linears"}
assert model.config._attn_implementation == "fastattn"
import fastattn
assert fastattn.swap(torch.nn.LayerNorm(4)).rows[0].action == "swapped"
"""
    run = fresh_process(script, str(tmp_path / "model.pt"))
    assert run.returncode == 0, run.stderr


def test_hooks_of_the_swapped_module_still_fire(tiny_bert, batch) -> None:
    model = tiny_bert()
    seen = []
    model.encoder.layer[0].output.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    swap(model)
    output(model, batch)
    assert seen == [torch.Size([4, 9, 32])]


def test_an_optimiser_made_before_the_swap_goes_on(tiny_bert, batch) -> None:
    model = tiny_bert().train()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    swap(model)
    before = model.encoder.layer[0].output.dense.weight.detach().clone()
    model(**batch).last_hidden_state.square().sum().backward()
    optimiser.step()
    assert not torch.equal(model.encoder.layer[0].output.dense.weight, before)


def test_an_old_transformers_is_named(tiny_bert, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its interface the rest of the model is swapped all the same."""
    from fastattn import integrations
    from fastattn.swap import recognised

    monkeypatch.setattr(importlib.metadata, "version", lambda _: "4.56.2")
    integrations.why_not_transformers.cache_clear()
    monkeypatch.setattr(recognised, "_remembered", {})
    try:
        rows = swap(tiny_bert()).rows
    finally:
        integrations.why_not_transformers.cache_clear()
    reasons = {row.reason for row in rows if row.action == "left"}
    assert "transformers 4.56.2 is older than 4.57: install a newer one" in reasons
    assert any(row.action == "swapped" for row in rows)
