"""What FlopCounterMode counts of the operators and of swapped models: as of torch's own."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

import fastattn
from fastattn.ops import flops

aten = torch.ops.aten
CPU_FLASH = {  # torch's own counter leaves these two of its attention kernels out
    aten._scaled_dot_product_flash_attention_for_cpu: inspect.unwrap(flop_counter.sdpa_flop),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: inspect.unwrap(flop_counter.sdpa_backward_flop),
}


def counted(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False, custom_mapping=CPU_FLASH) as counter:
        run()
    return counter.get_total_flops()


def forward_and_backward(run: Callable[..., Tensor], *args: Any) -> tuple[int, int]:
    """FLOPs of each."""
    found: list[Tensor] = []
    forward = counted(lambda: found.append(run(*args)))
    return forward, counted(found[0].sum().backward)


def drawn(*shapes: tuple[int, ...], grad: bool = True) -> list[Tensor]:
    return [torch.randn(shape, requires_grad=grad) for shape in shapes]


def sdpa(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> tuple[int, int]:
    """Forward and backward of torch's attention, its keys repeated for groups of queries."""
    k, v = (k[0], q[1], *k[2:]), (v[0], q[1], *v[2:])
    out = (*q[:3], v[3])
    return flop_counter.sdpa_flop_count(q, k, v), flop_counter.sdpa_backward_flop_count(out, q, k, v)


# ---- operators -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [None, fastattn.masks.Causal()])
@pytest.mark.parametrize("heads_kv", [1, 2, 4])
def test_attention(heads_kv: int, mask: Any) -> None:
    shapes = ((2, 4, 5, 8), (2, heads_kv, 7, 8), (2, heads_kv, 7, 6))
    found = forward_and_backward(lambda *qkv: fastattn.attention(*qkv, mask=mask), *drawn(*shapes))
    assert found == sdpa(*shapes)
    with torch.no_grad():
        assert counted(lambda: fastattn.attention(*drawn(*shapes), mask=mask)) == found[0]


def test_attention_beside_torchs_kernel() -> None:
    shapes = ((2, 4, 16, 8),) * 3
    found = forward_and_backward(fastattn.attention, *drawn(*shapes))
    assert found == forward_and_backward(F.scaled_dot_product_attention, *drawn(*shapes))


def test_packed_attention_counts_each_sequence() -> None:
    bounds_q, bounds_k = (torch.tensor(each, dtype=torch.int32) for each in ([0, 4, 5], [0, 7, 9]))
    shapes = ((5, 4, 8), (9, 2, 8), (9, 2, 6))

    def run(*qkv: Tensor) -> Tensor:
        return fastattn.attention_varlen(*qkv, bounds_q, bounds_k, max_seqlen_q=4, max_seqlen_k=7)

    one, two = sdpa((1, 4, 4, 8), (1, 2, 7, 8), (1, 2, 7, 6)), sdpa((1, 4, 1, 8), (1, 2, 2, 8), (1, 2, 2, 6))
    assert forward_and_backward(run, *drawn(*shapes)) == (one[0] + two[0], one[1] + two[1])
    longest = sdpa((2, 4, 4, 8), (2, 2, 7, 8), (2, 2, 7, 6))
    with FakeTensorMode(allow_non_fake_inputs=True):
        bounds_q, bounds_k = (torch.zeros(3, dtype=torch.int32) for _ in range(2))
        assert forward_and_backward(run, *drawn(*shapes)) == longest


@pytest.mark.parametrize("paged", [False, True])
def test_decode_counts_the_keys_there_are(paged: bool) -> None:
    lengths = torch.tensor([3, 8], dtype=torch.int32)
    q, *cache = drawn((2, 4, 1, 8), *([(3, 8, 2, 8)] * 2 if paged else [(2, 2, 16, 8)] * 2), grad=False)
    table = torch.tensor([[2, 0], [1, 0]], dtype=torch.int32) if paged else None

    def run() -> Any:
        return fastattn.attention_decode(q, *cache, lengths, block_table=table)

    one, two = sdpa((1, 4, 1, 8), (1, 2, 3, 8), (1, 2, 3, 8)), sdpa((1, 4, 1, 8), (1, 2, 8, 8), (1, 2, 8, 8))
    assert counted(run) == one[0] + two[0]
    with FakeTensorMode() as mode:
        q, lengths, *cache = (mode.from_tensor(t) for t in (q, lengths, *cache))
        table = None if table is None else mode.from_tensor(table)
        assert counted(run) == sdpa((2, 4, 1, 8), (2, 2, 16, 8), (2, 2, 16, 8))[0]


LAYERS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "linear": (fastattn.linear_act, F.linear, ((2, 3, 12), (20, 12), (20,))),
    "linear_act": (
        lambda *args: fastattn.linear_act(*args, activation="gelu"),
        lambda *args: F.gelu(F.linear(*args)),
        ((2, 3, 12), (20, 12), (20,)),
    ),
    "ffn": (
        lambda *args: fastattn.ffn(*args, activation="relu"),
        lambda x, w1, b1, w2, b2: F.linear(F.relu(F.linear(x, w1, b1)), w2, b2),
        ((2, 3, 12), (20, 12), (20,), (10, 20), (10,)),
    ),
    "gated_ffn": (
        lambda x, wg, bg, wu, bu, wd, bd: fastattn.gated_ffn(x, wg, wu, wd, "silu", bg, bu, bd),
        lambda x, wg, bg, wu, bu, wd, bd: F.linear(F.silu(F.linear(x, wg, bg)) * F.linear(x, wu, bu), wd, bd),
        ((2, 3, 12), (20, 12), (20,), (20, 12), (20,), (10, 20), (10,)),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_linears(name: str) -> None:
    """Whichever gradients are asked for."""
    ours, torchs, shapes = LAYERS[name]
    everything = tuple(range(len(shapes)))
    for wanted in (everything, *((i,) for i in everything), everything[1:], (0, len(shapes) - 1)):
        args = [torch.randn(shape, requires_grad=i in wanted) for i, shape in enumerate(shapes)]
        assert forward_and_backward(ours, *args) == forward_and_backward(torchs, *args), wanted


@pytest.mark.parametrize("packed", [False, True])
def test_encoder_layer(packed: bool) -> None:
    wide, lone = (8, 8), (8,)
    shapes = (wide, lone, wide, lone, wide, lone, wide, lone, lone, lone, (32, 8), (32,), (8, 32), lone, lone, lone)
    weights = drawn(*shapes, grad=False)
    (x,) = drawn((9, 8) if packed else (3, 4, 8), grad=False)
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32) if packed else None

    def run() -> Tensor:
        return fastattn.encoder_layer(x, *weights, heads=2, cu_seqlens=bounds)

    rows, pairs = (9, 4 * 4 + 5 * 5) if packed else (12, 3 * 4 * 4)
    assert counted(run) == 2 * rows * (4 * 64 + 2 * 256) + 4 * pairs * 8


def test_every_operator_has_a_formula() -> None:
    """But for the norms, which have no product. A formula takes the arguments by place as by name."""
    here = {name for name in dir(torch.ops.fastattn) if isinstance(getattr(torch.ops.fastattn, name), _PACKET)}
    assert here - set(flops._FORMULAS) == {"norm", "norm_forward", "norm_backward"}
    formula = flop_counter.flop_registry[torch.ops.fastattn.linear_act_forward]
    x, weight = drawn((3, 12), (20, 12))
    assert formula(x, weight, None, "none", False, "", out_val=None) == 2 * 3 * 12 * 20
    assert formula(x, weight=weight, out_val=None) == 2 * 3 * 12 * 20


_PACKET = torch._ops.OpOverloadPacket


def test_exported_graphs() -> None:
    class Layer(nn.Module):
        def forward(self, x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
            return fastattn.ffn(x, w1, None, w2, None, activation="relu")

    args = tuple(drawn((3, 12), (20, 12), (10, 20)))
    graph = torch.export.export(Layer(), args, strict=False).module()
    assert forward_and_backward(graph, *args) == forward_and_backward(Layer(), *args)
    with torch.no_grad():
        assert counted(lambda: graph(*args)) == 2 * 3 * (12 * 20 + 20 * 10)


# ---- when the counter is imported ------------------------------------------------------------------------------------

COUNT = """
import sys, torch
{first}
assert ("torch.utils.flop_counter" in sys.modules) is {imported}
{second}
x, weight = torch.randn(3, 12), torch.randn(20, 12)
with FlopCounterMode(display=False) as counter:
    fastattn.linear_act(x, weight, None)
module = sys.modules["torch.utils.flop_counter"]
assert "fastattn" not in type(module.__loader__).__module__ and module.__spec__.loader is module.__loader__
assert not any("fastattn" in type(each).__module__ for each in sys.meta_path)
print(counter.get_total_flops())
"""
OURS, TORCHS = "import fastattn.ops, fastattn.swap", "from torch.utils.flop_counter import FlopCounterMode"
PROBED = f"""{OURS}
from importlib.util import find_spec
assert find_spec("torch.utils.flop_counter").loader.get_code("torch.utils.flop_counter") is not None"""


@pytest.mark.parametrize(
    ("first", "second", "imported"), [(OURS, TORCHS, False), (PROBED, TORCHS, False), (TORCHS, OURS, True)]
)
def test_either_may_be_imported_first(fresh_process, first: str, second: str, imported: bool) -> None:
    """And this package does not import the counter by itself."""
    done = fresh_process(COUNT.format(first=first, second=second, imported=imported))
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == str(2 * 3 * 12 * 20)


# ---- swapped models --------------------------------------------------------------------------------------------------


def _model(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    tokens = {"input_ids": torch.randint(0, 50, (2, 16))}
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    sdpa = {"attn_implementation": "sdpa"}
    if name == "bert":
        return transformers.BertModel(transformers.BertConfig(vocab_size=50, **size, **dropout, **sdpa)), tokens
    if name == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=50, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **sdpa
        )
        return transformers.GPT2Model(config), tokens
    if name == "llama":
        return transformers.LlamaModel(transformers.LlamaConfig(vocab_size=50, **size, **sdpa)), tokens
    if name == "vit":
        config = transformers.ViTConfig(image_size=32, patch_size=8, **size, **dropout, **sdpa)
        return transformers.ViTModel(config), {"pixel_values": torch.randn(2, 3, 32, 32)}
    config = transformers.T5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", attn_implementation="eager",
    )  # fmt: skip
    return transformers.T5Model(config), {**tokens, "decoder_input_ids": torch.randint(0, 50, (2, 12))}


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit", "t5"])
def test_swapped_models(name: str) -> None:
    """As the original on torch's attention kernels; one that writes attention out, as T5, keeps its scores."""
    model, inputs = _model(name)
    swapped = copy.deepcopy(model)
    assert fastattn.swap(swapped).rows

    def run(model: nn.Module) -> Tensor:
        return model(**inputs).last_hidden_state

    forward, backward = forward_and_backward(run, model)
    again = 0 if name != "t5" else 2 * (2 * 2 * 4 * 8) * (16 * 16 + 12 * 12 + 12 * 16)
    assert forward_and_backward(run, swapped) == (forward, backward + again)
    for each in (model, swapped):
        with torch.no_grad():
            assert counted(lambda each=each: run(each.eval())) == forward
