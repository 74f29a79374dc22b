"""Experts of transformers' mixtures."""

from __future__ import annotations

import copy
import inspect
from importlib import import_module

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

pytest.importorskip("transformers.integrations.moe")  # 5.0 has it

from transformers.integrations import moe  # noqa: E402
from transformers.models.mixtral.modeling_mixtral import MixtralExperts  # noqa: E402
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts  # noqa: E402

from fastattn.swap import plan, swap  # noqa: E402
from fastattn.swap.recipes import experts as recipe  # noqa: E402
from fastattn.swap.recipes import free_linear  # noqa: E402

WIDTH, HIDDEN, COUNT, CHOSEN, TOKENS = 16, 24, 5, 2, 7
VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))


@pytest.fixture(autouse=True)
def small_ones_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if these experts were large, on a machine where that pays."""
    always = dict.fromkeys(free_linear.PAYS_BY_LONG_CALLS, free_linear.Pays(1, 1, 1))
    monkeypatch.setattr(free_linear, "PAYS_BY_LONG_CALLS", always)
    monkeypatch.setattr(free_linear, "is_measured", lambda dtype: True)


def config(implementation: str = "grouped_mm"):
    found = transformers.Qwen3MoeConfig(
        hidden_size=WIDTH, moe_intermediate_size=HIDDEN, num_experts=COUNT, num_experts_per_tok=CHOSEN
    )
    found._experts_implementation = implementation
    return found


def drawn(experts_class: type[nn.Module] = Qwen3MoeExperts, implementation: str = "grouped_mm") -> nn.Module:
    module = experts_class(config(implementation))
    for at, parameter in enumerate(module.parameters()):
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(at)) / 4)
    return module.eval()


def inputs(dtype: torch.dtype = torch.float32, tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, the experts of each, of which the fourth is nobody's, and their weights."""
    draw = torch.Generator().manual_seed(1)
    index = torch.stack([torch.randperm(COUNT - 1, generator=draw)[:CHOSEN] for _ in range(tokens)])
    index[index == 3] = COUNT - 1
    scale = torch.rand(tokens, CHOSEN, generator=draw)
    return torch.randn(tokens, WIDTH, generator=draw).to(dtype), index, scale.to(dtype)


def exact(module: nn.Module, x: Tensor, index: Tensor, scale: Tensor) -> Tensor:
    gate_up, down = module.gate_up_proj.double(), module.down_proj.double()
    y = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(len(x)):
        for expert, weight in zip(index[token], scale[token].double(), strict=True):
            gate, up = (gate_up[expert] @ x[token].double()).chunk(2)
            y[token] += weight * (down[expert] @ (nn.functional.silu(gate) * up))
    return y


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_is_as_near_to_the_exact_sum_as_the_original(dtype: torch.dtype, implementation: str) -> None:
    module = drawn(implementation=implementation).to(dtype)
    given = inputs(dtype)
    expected, true = module(*given), exact(module, *given)
    report = swap(module)
    with report.counting():
        found = module(*given)
    (row,) = report.rows
    assert (row.kernel, row.calls, row.fallbacks, row.choices) == ("gated_ffn of each expert", 1, {}, {})
    assert found.dtype == expected.dtype == dtype
    error, bound = (float((each.double() - true).abs().max()) for each in (found, expected))
    assert error <= 2 * bound + 2 * torch.finfo(dtype).eps * float(true.abs().max())
    report.undo()
    assert torch.equal(module(*given), expected)


@torch.no_grad()
def test_copies_and_calls_by_name() -> None:
    for experts_class in (Qwen3MoeExperts, MixtralExperts):
        assert recipe.read(experts_class) is not None
    module = drawn()
    x, index, scale = inputs()
    expected = module(x, index, scale)
    swap(module)
    found = module(hidden_states=x, top_k_weights=scale, top_k_index=index)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(TypeError, match="forward"):
        module(x, index)


@torch.no_grad()
def test_wide_weights_of_the_sum_beside_halves() -> None:
    module = drawn().bfloat16()
    x, index, scale = inputs(torch.bfloat16)
    expected = module(x, index, scale.float())
    swap(module)
    found = module(x, index, scale.float())
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, atol=3e-2, rtol=3e-2)


def test_with_gradients_the_original_runs() -> None:
    module = drawn()
    given = inputs()
    report = swap(module)
    with report.counting():
        module(*given).sum().backward()
    assert not report.rows[0].fallbacks and report.rows[0].choices == {free_linear.AS_FAST: 1}
    assert module.gate_up_proj.grad is not None


def test_with_a_backend_forced_there_are_gradients_all_the_same() -> None:
    original, module = drawn(), drawn()
    swap(module, backend="reference")
    gradients = []
    for each in (original, module):
        x, index, scale = inputs()
        x.requires_grad_()
        scale.requires_grad_()
        each(x, index, scale).square().sum().backward()
        gradients.append([x.grad, scale.grad, each.gate_up_proj.grad, each.down_proj.grad])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_many_rows_for_an_expert_are_left_to_torch_where_its_products_are_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free_linear, "has_slow_products", lambda dtype: False)
    module = drawn()
    report = swap(module)
    for tokens, choices in ((80, {}), (81, {free_linear.AS_FAST: 1}), (0, {free_linear.AS_FAST: 1})):
        with report.counting():
            module(*inputs(tokens=tokens)) if tokens else None
        assert report.rows[0].choices == (choices if tokens else {})
    monkeypatch.setattr(free_linear, "has_slow_products", lambda dtype: True)
    with report.counting():
        module(*inputs(tokens=81))
    assert report.rows[0].choices == {}


@pytest.mark.skipif(VERSION < (5, 19), reason="the eager forward refuses such an index")
@torch.no_grad()
def test_an_index_of_no_expert_is_the_originals() -> None:
    module = drawn(implementation="eager")
    x, index, scale = inputs()
    index[2, 1] = COUNT  # which the eager forward leaves out
    expected = module(x, index, scale)
    report = swap(module)
    with report.counting():
        assert torch.equal(module(x, index, scale), expected)
    assert report.rows[0].fallbacks == {"an index is none of an expert": 1}


@torch.no_grad()
def test_an_expert_twice_and_no_rows() -> None:
    module = drawn(implementation="eager")
    x, index, scale = inputs()
    index[:] = 2
    expected = module(x, index, scale)
    empty = module(x[:0], index[:0], scale[:0])
    swap(module, backend="reference")
    torch.testing.assert_close(module(x, index, scale), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(module(x[:0], index[:0], scale[:0]), empty)


@pytest.mark.skipif(
    torch.__version__ < "2.8" or VERSION < (5, 19), reason="transformers' own grouped products are not traced"
)
@torch.no_grad()
def test_compiles_as_one_graph() -> None:
    module, given = drawn().bfloat16(), inputs(torch.bfloat16)
    expected = module(*given)
    swap(module)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), expected)


@torch.no_grad()
def test_what_it_must_not_run_is_run_by_the_original_and_counted() -> None:
    module, given = drawn(), inputs()
    report = swap(module)

    def fallbacks(*given: Tensor) -> dict[str, int]:
        with report.counting():
            module(*given)
        return report.rows[0].fallbacks

    module._is_expert_parallel = True
    assert fallbacks(*given) == {"its experts are shared out over processes": 1}
    module._is_expert_parallel = False
    module.act_fn = nn.Tanh()
    assert fallbacks(*given) == {"act_fn is Tanh, which has no kernel": 1}
    module.act_fn = nn.SiLU()
    assert fallbacks(*given) == {}
    module.act_fn.register_forward_hook(lambda module, args, output: output + 1)
    assert list(fallbacks(*given).values()) == [1]
    module.act_fn = nn.SiLU()
    module.config = config("mine")
    moe.ALL_EXPERTS_FUNCTIONS.register("mine", lambda self, x, index, scale: x + 1)
    assert fallbacks(*given) == {"its config asks for the experts of mine": 1}
    module.config = config()
    module._apply_gate = lambda gate_up: gate_up.chunk(2, -1)[1]
    assert fallbacks(*given) == {"its _apply_gate was replaced": 1}
    del module._apply_gate
    module.double().config = config("eager")
    assert fallbacks(given[0].double(), *given[1:]) == {"the input is float64": 1}


class Plain(nn.Module):
    """As Qwen3-MoE's before it is decorated."""

    def __init__(self, config) -> None:
        super().__init__()
        self.num_experts, self.act_fn = COUNT, nn.SiLU()
        self.gate_up_proj = nn.Parameter(torch.empty(COUNT, 2 * HIDDEN, WIDTH))
        self.down_proj = nn.Parameter(torch.empty(COUNT, WIDTH, HIDDEN))

    forward = Qwen3MoeExperts.forward.__wrapped__


@moe.use_experts_implementation
class Same(Plain):
    pass


@moe.use_experts_implementation
class Clamped(Plain):
    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate.clamp(max=7.0)) * up


@moe.use_experts_implementation
class AnotherForward(Plain):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        return hidden_states


FLAGS = [
    {"has_gate": False},
    {"is_concatenated": False},
    {"has_post_expert_norm": True},
    {"experts_interface": moe.ExpertsInterface()},
]


class Overridden(Qwen3MoeExperts):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        return super().forward(hidden_states, top_k_index, top_k_weights) * 2


def test_classes_of_ones_own_are_swapped() -> None:
    assert [row.action for row in plan(drawn(Same)).rows] == ["swap"]


@pytest.mark.parametrize("experts_class", [Plain, Overridden])
def test_what_only_looks_like_them_is_left(experts_class: type[nn.Module]) -> None:
    assert not [row for row in plan(drawn(experts_class)).rows if row.action == "swap"]


def test_experts_that_no_recipe_knows_are_in_the_report() -> None:
    class MyExperts(Plain):
        pass

    (row,) = plan(drawn(MyExperts)).rows
    assert (row.action, row.reason) == ("left", "no recipe for class MyExperts")
    assert plan(drawn(MyExperts), ffns=False).rows == []


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: next(iter(flags)))
def test_what_is_behind_the_interface_otherwise_is_left(flags: dict[str, object]) -> None:
    if not flags.keys() <= inspect.signature(moe.use_experts_implementation).parameters.keys():
        assert VERSION < (5, 20)
        pytest.skip(f"transformers {transformers.__version__} has no such flag")
    experts_class = moe.use_experts_implementation(**flags)(type("Asks", (Plain,), {}))
    assert not [row for row in plan(drawn(experts_class)).rows if row.action == "swap"]


def general(name: str, implementation: str = "batched_mm") -> nn.Module:
    """Experts of another layout: of a model, or of a class above, whose forwards say nothing of the implementation."""
    settings = config(implementation)
    sizes = {"intermediate_size": HIDDEN, "num_local_experts": COUNT, "swiglu_alpha": 1.702, "swiglu_limit": 1.0}
    sizes |= {"moe_num_experts": COUNT, "n_routed_experts": COUNT, "moe_latent_size": None, "mlp_hidden_act": "relu2"}
    sizes |= {"moe_hidden_size": WIDTH, "post_norm_eps": 1e-5, "hidden_act": "silu"}
    settings.update(sizes)
    torch.manual_seed(2)
    found = GENERAL[name]
    module = (_of_transformers(found) if isinstance(found, str) else found)(settings)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.eval()


def _of_transformers(path: str) -> type[nn.Module]:
    """A class of the installed version, all of which 5.20 has."""
    file, _, name = path.partition(".")
    try:
        found = getattr(import_module(f"transformers.models.{file}.modeling_{file}"), name)
        is_asking = hasattr(found.forward, "__wrapped__")
    except (ImportError, AttributeError):
        is_asking = False
    if not is_asking:
        assert VERSION < (5, 20)
        pytest.skip(f"in transformers {transformers.__version__} {name} is not behind the interface of experts")
    return found


GENERAL = {
    "gpt-oss": "gpt_oss.GptOssExperts",
    "nemotron": "nemotron_h.NemotronHExperts",
    "aria": "aria.AriaExperts",
    "muse": "muse_spark.MuseSparkExperts",
    "clamped": Clamped,
    "another forward": AnotherForward,
}


@torch.no_grad()
@pytest.mark.parametrize("name", GENERAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_layouts_are_as_near_to_the_exact_sum_as_the_original(dtype: torch.dtype, name: str) -> None:
    module, (x, index, scale) = general(name).to(dtype), inputs(dtype)
    expected = module(x, index, scale)
    true = copy.deepcopy(module).double()(x.double(), index, scale.double())
    report = swap(module)
    with report.counting():
        found = module(x, index, scale)
    row = next(row for row in report.rows if row.path == "")
    assert (row.kernel, row.calls, row.fallbacks, row.choices) == ("two linears of each expert", 1, {}, {})
    assert found.dtype == expected.dtype
    error, bound = (float((each.double() - true).abs().max()) for each in (found, expected))
    assert error <= 2 * bound + 2 * torch.finfo(dtype).eps * float(true.abs().max())
    torch.testing.assert_close(module(x[:0], index[:0], scale[:0]), expected[:0])
    report.undo()
    assert torch.equal(module(x, index, scale), expected)


def test_other_layouts_with_a_backend_forced_have_gradients() -> None:
    gradients = []
    for is_swapped in (False, True):
        module, (x, index, scale) = general("gpt-oss"), inputs()
        if is_swapped:
            swap(module, backend="reference")
        x.requires_grad_()
        module(x, index, scale).square().sum().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in module.parameters())])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_other_layouts_run_what_was_changed_since() -> None:
    module, given = general("gpt-oss"), inputs()
    report = swap(module)

    def fallbacks() -> dict[str, int]:
        with report.counting():
            module(*given)
        return report.rows[0].fallbacks

    module._apply_gate = lambda hidden: hidden[:, :HIDDEN] * 2.0
    found = module(*given)
    assert fallbacks() == {}
    report.undo()
    torch.testing.assert_close(found, module(*given), atol=1e-5, rtol=1e-5)
    report = swap(module)
    module.config._experts_implementation = "eager"
    assert fallbacks() == {"its config asks for the experts of eager": 1}
    module.config._experts_implementation = "grouped_mm"
    module.down_proj_bias = nn.Parameter(torch.zeros(COUNT, 1))
    assert fallbacks() == {"its inputs and weights do not fit together": 1}


def test_other_layouts_that_run_their_own_forward_are_left() -> None:
    (row,) = plan(general("gpt-oss", "eager")).rows
    assert (row.action, row.reason) == ("left", "its config asks for the experts of eager")


def test_those_of_other_activations_are_left() -> None:
    module = drawn()
    module.act_fn = nn.Tanh()
    (row,) = plan(module).rows
    assert (row.action, row.reason) == ("left", "act_fn is Tanh, which has no kernel")


def test_small_ones_are_no_business_of_a_swap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    module = drawn()
    module.act_fn = nn.Tanh()
    assert plan(module).rows == plan(drawn()).rows == []


@torch.no_grad()
def test_a_model_says_what_it_said_before() -> None:
    settings = config()
    settings.update({"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8})
    settings.update({"vocab_size": 32, "decoder_sparse_step": 1})
    torch.manual_seed(0)
    model = transformers.Qwen3MoeModel(settings).eval()
    ids = torch.randint(0, 32, (2, 6))
    expected = model(input_ids=ids).last_hidden_state
    swapped = copy.deepcopy(model)
    report = swap(swapped)
    with report.counting():
        found = swapped(input_ids=ids).last_hidden_state
    calls = [row.calls for row in report.rows if row.class_name == "Qwen3MoeExperts"]
    assert calls == [1, 1]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
