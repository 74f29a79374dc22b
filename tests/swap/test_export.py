"""torch.export of swapped models: the graph holds the kernels, with their gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastattn

OLD = torch.__version__ < "2.8"
PADDED = torch.tensor([[False] * 10, [False] * 7 + [True] * 3])
Model = tuple[nn.Module, tuple[Tensor, ...], dict[str, Tensor], Callable[[Tensor], Tensor]]


class LastHiddenState(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state


def encoder() -> Model:
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, activation="gelu", batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return model, (torch.randn(2, 10, 64),), {"src_key_padding_mask": PADDED}, lambda out: out[~PADDED]


def llama() -> Model:
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=100)
    model = LastHiddenState(transformers.LlamaModel(transformers.LlamaConfig(num_key_value_heads=2, **sizes)))
    return model, (torch.randint(100, (2, 10)), (~PADDED).long()), {}, lambda out: out[~PADDED]


def bert() -> Model:
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=100)
    model = LastHiddenState(transformers.BertModel(transformers.BertConfig(**sizes), add_pooling_layer=False))
    return model, (torch.randint(100, (2, 10)), (~PADDED).long()), {}, lambda out: out[~PADDED]


# What of torch's own is left: Llama's projections and head stand by themselves.
EXPORTED = {
    encoder: {"attention": 2, "norm": 4, "linear_act": 4, "ffn": 2},
    llama: {"attention": 2, "norm": 5, "gated_ffn": 2},
    bert: {"attention": 2, "norm": 5, "linear_act": 12},
}


def operators(program: torch.export.ExportedProgram) -> dict[str, int]:
    """How often the graph calls each of fastattn's operators."""
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    ours = [name.split(".")[1] for name in names if name.startswith("fastattn.")]
    return {name: ours.count(name) for name in ours}


@pytest.fixture(params=[encoder, llama, bert], ids=lambda build: build.__name__)
def case(request: pytest.FixtureRequest) -> tuple[Model, dict[str, int]]:
    model, *rest = request.param()
    return (model.eval(), *rest), EXPORTED[request.param]


@pytest.mark.parametrize("strict", [False, True])
def test_the_graph_holds_the_kernels(case: tuple[Model, dict[str, int]], strict: bool) -> None:
    (model, args, kwargs, valid), expected = case
    if strict and OLD and isinstance(model, LastHiddenState):
        pytest.skip("torch 2.7's Dynamo takes no attributes such as swapped classes have when it exports")
    before = valid(model(*args, **kwargs))
    fastattn.swap(model)
    program = torch.export.export(model, args, kwargs, strict=strict)
    assert operators(program) == expected
    for exported in (program.module(), program.run_decompositions().module()):
        torch.testing.assert_close(valid(exported(*args, **kwargs)), before, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("tracks", [False, True])
@pytest.mark.parametrize("width", [128, 256, 768])
def test_a_graph_takes_any_number_of_rows(width: int, tracks: bool, strict: bool) -> None:
    """Which kernel is the faster one, of norms and linears by themselves, depends on that: a graph may not ask."""
    if strict and OLD:
        pytest.skip("torch 2.7 does not tell a strict export from torch.compile, whose graphs may ask")
    model = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU()).eval()
    before = copy.deepcopy(model)
    fastattn.swap(model)
    rows = torch.export.Dim("rows", min=2, max=4096)
    with torch.set_grad_enabled(tracks):
        program = torch.export.export(model, (torch.randn(8, width),), dynamic_shapes=({0: rows},), strict=strict)
    for count in (3, 40, 3000):
        x = torch.randn(count, width)
        torch.testing.assert_close(program.module()(x), before(x), atol=2e-5, rtol=1e-4)


def test_gradients_pass_through_the_graph(case: tuple[Model, dict[str, int]]) -> None:
    (model, args, kwargs, valid), _ = case
    plain = copy.deepcopy(model)
    fastattn.swap(model)
    exported = torch.export.export(model, args, kwargs, strict=False).module()
    direction = torch.randn_like(valid(plain(*args, **kwargs)))
    for each in (plain, exported):
        (valid(each(*args, **kwargs)) * direction).sum().backward()
    parameters = dict(exported.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(parameters[name].grad, parameter.grad, atol=1e-4, rtol=1e-4, msg=name)


def test_without_gradients_whole_layers_are_exported() -> None:
    model, args, kwargs, _ = encoder()
    fastattn.swap(model.eval())
    with torch.no_grad():
        program = torch.export.export(model, args, kwargs, strict=False)
    assert operators(program) == {"encoder_layer_forward": 2}


def test_training_with_dropout_draws_in_the_graph() -> None:
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.5, batch_first=True)
    fastattn.swap(layer.train())
    x = torch.randn(2, 10, 64)
    exported = torch.export.export(layer, (x,), strict=False).module()
    torch.manual_seed(3)
    first = exported(x)
    torch.manual_seed(3)
    again, other = exported(x), exported(x)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    first.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in exported.parameters())


def test_lengths_may_be_left_open() -> None:
    model, (x,), _, _ = encoder()
    fastattn.swap(model.eval())
    free = torch.export.Dim.DYNAMIC
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: free, 1: free},), strict=False).module()
    for shape in ((2, 10, 64), (3, 33, 64), (5, 1, 64)):
        y = torch.randn(shape)
        torch.testing.assert_close(exported(y), model(y), atol=5e-6, rtol=1e-5)


def test_a_saved_program_loads_in_a_fresh_process(fresh_process, tmp_path: Path) -> None:
    model, args, kwargs, _ = encoder()
    fastattn.swap(model.eval())
    program = torch.export.export(model, args, kwargs, strict=False)
    torch.export.save(program, tmp_path / "model.pt2")
    torch.save((args, kwargs, program.module()(*args, **kwargs)), tmp_path / "case.pt")
    script = (
        "import sys, torch, fastattn.ops\n"  # registers the operators
        "args, kwargs, out = torch.load(sys.argv[1] + '/case.pt')\n"
        "module = torch.export.load(sys.argv[1] + '/model.pt2').module()\n"
        "torch.testing.assert_close(module(*args, **kwargs), out)\n"
    )
    run = fresh_process(script, str(tmp_path))
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_it_compiles_ahead_of_time(tmp_path: Path) -> None:
    model, args, kwargs, _ = encoder()
    fastattn.swap(model.eval())
    with torch.no_grad():
        before = model(*args, **kwargs)
        program = torch.export.export(model, args, kwargs, strict=False)
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        torch.testing.assert_close(torch._inductor.aoti_load_package(path)(*args, **kwargs), before)


def test_onnx_gets_torch_s_own_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    model, args, kwargs, valid = encoder()
    before = valid(model.eval()(*args, **kwargs))
    fastattn.swap(model)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)  # what torch.onnx.export's own use of it sees
    program = torch.export.export(model, args, kwargs, strict=False)
    assert not operators(program)
    torch.testing.assert_close(valid(program.module()(*args, **kwargs)), before, atol=5e-6, rtol=1e-5)
