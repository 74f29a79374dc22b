"""MultiheadAttention as a module: what is torch.nn's, dropout, what runs torch's code, and torch's own machinery."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fastattn import dispatch, swap
from fastattn.nn import MultiheadAttention, counting
from fastattn.parity.guards import torch_threads

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"bias": False},
    {"add_bias_kv": True, "add_zero_attn": True},
    {"kdim": 10},
    {"kdim": 10, "vdim": 14, "bias": False, "add_bias_kv": True},
    {"dropout": 0.25, "batch_first": True, "dtype": torch.bfloat16},
    {"device": "meta"},
)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    dispatch._warned.clear()
    with torch_threads(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", dispatch.BackendWarning)
        warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors")
        warnings.filterwarnings("ignore", message="Support for mismatched")
        yield


def pair(**options: Any) -> tuple[MultiheadAttention, nn.MultiheadAttention]:
    """Ours and torch's, batch first, 24 wide with 4 heads, with the same weights."""
    options = {"batch_first": True, **options}
    ours, theirs = MultiheadAttention(24, 4, **options), nn.MultiheadAttention(24, 4, **options)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.3)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def fallbacks(module: nn.Module, call: Callable[[], Any]) -> list[str]:
    """The reasons that the call left to other code."""
    tallies = {id(module): counting.Tally()}
    counting.start(tallies)
    try:
        call()
    finally:
        counting.stop(tallies)
    return list(tallies[id(module)].fallbacks)


def assert_same(found: tuple[Tensor, Tensor | None], expected: tuple[Tensor, Tensor | None], **close: float) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **(close or {"atol": 1e-5, "rtol": 1e-5}))


# ---- construction and state ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_is_constructed_initialised_and_printed_as_torch(options: dict[str, Any]) -> None:
    made = []
    for kind in (MultiheadAttention, nn.MultiheadAttention):
        torch.manual_seed(3)
        made.append(kind(24, 4, **options))
    ours, theirs = made
    assert repr(ours) == repr(theirs)
    ignored = {"_parameters", "_modules"}
    assert {k: v for k, v in vars(ours).items() if k not in ignored} == {
        k: v for k, v in vars(theirs).items() if k not in ignored
    }
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        assert a.is_meta or torch.equal(a, b)
    if "device" not in options:
        ours.load_state_dict(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("sizes", ((0, 4), (24, 0), (24, 5)), ids=str)
def test_wrong_sizes_are_torchs_errors(sizes: tuple[int, int]) -> None:
    with pytest.raises((ValueError, AssertionError)) as expected:
        nn.MultiheadAttention(*sizes)
    with pytest.raises(expected.type):
        MultiheadAttention(*sizes)


def test_a_pickle_of_torch_1_1_loads() -> None:
    """It has no `_qkv_same_embed_dim`."""
    ours, theirs = pair()
    state = {name: value for name, value in vars(theirs).items() if name != "_qkv_same_embed_dim"}
    old = MultiheadAttention.__new__(MultiheadAttention)
    old.__setstate__(copy.deepcopy(state))
    x = torch.randn(2, 5, 24)
    assert_same(old(x, x, x), ours(x, x, x), atol=0, rtol=0)


def test_deepcopy_pickle_and_save(fresh_process, tmp_path: Path) -> None:
    ours, _ = pair()
    x = torch.randn(2, 5, 24)
    expected = ours(x, x, x)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert_same(twin(x, x, x), expected, atol=0, rtol=0)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    assert_same(torch.load(buffer, weights_only=False)(x, x, x), expected, atol=0, rtol=0)
    torch.save((ours, x, expected[0].detach()), tmp_path / "module.pt")
    code = (
        "import torch; m, x, y = torch.load('module.pt', weights_only=False); "
        "assert torch.allclose(m(x, x, x)[0], y, atol=1e-6); print(type(m).__module__)"
    )
    path = [str(Path(sys.modules["fastattn"].__file__).parents[1])]
    run = fresh_process(f"import sys; sys.path[:0] = {path}; {code}", cwd=tmp_path)
    assert run.stdout.strip() == "fastattn.nn.attention", run.stderr


# ---- wrong input -----------------------------------------------------------------------------------------------------

X = torch.zeros(2, 5, 24)
WRONG: dict[str, tuple[tuple[Tensor, ...], dict[str, Any]]] = {
    "four dimensions": ((X[None], X[None], X[None]), {}),
    "one dimension": ((X[0, 0],) * 3, {}),
    "query alone unbatched": ((X[0], X, X), {}),
    "value alone unbatched": ((X, X, X[0]), {}),
    "width of query": ((X[..., :20],) * 3, {}),
    "width of key": ((X, X[..., :20], X), {}),
    "lengths of key and value": ((X, X, X[:, :4]), {}),
    "batches of query and key": ((X, X[:1], X[:1]), {}),
    "dtype of query": ((X.bfloat16(),) * 3, {}),
    "dtype of key": ((X, X.double(), X.double()), {}),
    "causal without a mask": ((X, X, X), {"is_causal": True}),
    "attn_mask uint8": ((X, X, X), {"attn_mask": torch.zeros(5, 5, dtype=torch.uint8)}),
    "attn_mask int64": ((X, X, X), {"attn_mask": torch.zeros(5, 5, dtype=torch.int64)}),
    "attn_mask float64": ((X, X, X), {"attn_mask": torch.zeros(5, 5, dtype=torch.float64)}),
    "attn_mask bfloat16": ((X, X, X), {"attn_mask": torch.zeros(5, 5, dtype=torch.bfloat16)}),
    "attn_mask (L, S + 1)": ((X, X, X), {"attn_mask": torch.zeros(5, 6)}),
    "attn_mask (B, L, S)": ((X, X, X), {"attn_mask": torch.zeros(2, 5, 5)}),
    "attn_mask of 4 dimensions": ((X, X, X), {"attn_mask": torch.zeros(2, 4, 5, 5)}),
    "attn_mask of 1 dimension": ((X, X, X), {"attn_mask": torch.zeros(5)}),
    "attn_mask (1, L, S) unbatched": ((X[0],) * 3, {"attn_mask": torch.zeros(1, 5, 5)}),
    "key_padding_mask uint8": ((X, X, X), {"key_padding_mask": torch.zeros(2, 5, dtype=torch.uint8)}),
    "key_padding_mask (S,)": ((X, X, X), {"key_padding_mask": torch.zeros(5)}),
    "key_padding_mask (B, S + 1)": ((X, X, X), {"key_padding_mask": torch.zeros(2, 6)}),
    "key_padding_mask (S, B)": ((X, X, X), {"key_padding_mask": torch.zeros(5, 2)}),
    "key_padding_mask (B, S) unbatched": ((X[0],) * 3, {"key_padding_mask": torch.zeros(1, 5)}),
}


@pytest.mark.parametrize("need_weights", (True, False))
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_torchs_errors(wrong: str, need_weights: bool) -> None:
    ours, theirs = pair()
    inputs, options = WRONG[wrong]
    with pytest.raises(Exception) as expected:
        theirs(*inputs, **options, need_weights=need_weights)
    with pytest.raises(expected.type) as found:
        ours(*inputs, **options, need_weights=need_weights)
    assert str(found.value) == str(expected.value)


def test_torchs_errors_come_without_a_warning() -> None:
    ours, _ = pair()
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="is_causal"):
        warnings.simplefilter("error")
        ours(X, X, X, is_causal=True)


# ---- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", (True, False))
def test_the_weights_returned_are_those_used(grad: bool) -> None:
    ours, _ = pair(dropout=0.5)
    x = torch.randn(2, 40, 24)
    with torch.set_grad_enabled(grad):
        output, weights = ours(x, x, x, average_attn_weights=False)
        value = (x @ ours.in_proj_weight[48:].T + ours.in_proj_bias[48:]).unflatten(-1, (4, 6)).transpose(1, 2)
        rebuilt = ours.out_proj((weights @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(output, rebuilt, atol=1e-5, rtol=1e-5)
    assert 0.45 < float((weights == 0).float().mean()) < 0.55
    _, kept = ours.eval()(x, x, x, average_attn_weights=False)
    dropped = weights == 0
    torch.testing.assert_close(weights[~dropped], 2 * kept[~dropped], atol=1e-6, rtol=1e-4)
    _, averaged = ours.train()(x, x, x)
    assert averaged.shape == (2, 40, 40) and bool(((averaged.sum(-1) - 1).abs() > 0.05).any())


@pytest.mark.parametrize("need_weights", (True, False))
def test_dropout_has_the_right_mean_and_follows_the_seed(need_weights: bool) -> None:
    ours, _ = pair(dropout=0.3)
    x = torch.randn(1, 16, 24)

    def draw() -> Tensor:
        with torch.no_grad():
            return ours(x, x, x, need_weights=need_weights)[0]

    outputs = []
    for _ in range(2):
        torch.manual_seed(11)
        outputs.append(draw())
    assert torch.equal(*outputs) and not torch.equal(outputs[1], draw())
    draws = torch.stack([draw() for _ in range(2000)])
    expected = ours.eval()(x, x, x, need_weights=False)[0]
    error = draws.std(0) / len(draws) ** 0.5
    assert float(((draws.mean(0) - expected).abs() / error).max()) < 5  # of 384 normal deviates
    assert torch.equal(draw(), draw())


def test_gradients_under_dropout_without_weights() -> None:
    """The output is linear in the value: <dvalue, value> = <doutput, output> minus the biases' part, mask by mask."""
    ours, _ = pair(dropout=0.3, bias=False)
    query, value = torch.randn(2, 9, 24), torch.randn(2, 9, 24, requires_grad=True)
    output, _ = ours(query, query, value, need_weights=False)
    grad = torch.randn_like(output)
    (dvalue,) = torch.autograd.grad(output, value, grad)
    torch.testing.assert_close((dvalue * value).sum(), (grad * output).sum(), atol=1e-4, rtol=1e-4)


# ---- what is left to torch -------------------------------------------------------------------------------------------


class Marked(Tensor):
    pass


def test_what_the_kernels_do_not_take_runs_torchs_code_counted() -> None:
    ours, theirs = pair()
    x = torch.randn(2, 5, 24)
    cases: dict[str, tuple[dict[str, Any], torch.dtype, Any]] = {
        "the input is float64": ({}, torch.float64, x.double()),
        "the input is a Marked, not a plain tensor": ({}, torch.float32, x.as_subclass(Marked)),
        "attn_mask is a Marked, not a plain tensor": (
            {"attn_mask": torch.zeros(5, 5).as_subclass(Marked)},
            torch.float32,
            x,
        ),
    }
    for reason, (options, dtype, y) in cases.items():
        mine, other = copy.deepcopy(ours).to(dtype), copy.deepcopy(theirs).to(dtype)
        found: list[Any] = []
        with torch.no_grad():
            assert fallbacks(mine, lambda m=mine, y=y, o=options, f=found: f.append(m(y, y, y, **o))) == [reason]
            assert_same(found[0], other(y, y, y, **options), atol=0, rtol=0)


def test_nested_tensors_run_where_torch_takes_them() -> None:
    ours, theirs = pair()
    nested = torch.nested.nested_tensor([torch.randn(3, 24), torch.randn(5, 24)])
    ours.eval(), theirs.eval()
    with torch.no_grad():
        found, expected = ours(nested, nested, nested)[0], theirs(nested, nested, nested)[0]
        for a, b in zip(found.unbind(), expected.unbind(), strict=True):
            assert torch.equal(a, b)
    with pytest.raises(AssertionError, match="NestedTensor"):
        ours.train()(nested, nested, nested)


def test_wide_heads_and_full_dropout_are_left_to_torch() -> None:
    wide = MultiheadAttention(514, 2)
    x = torch.randn(3, 1, 514)
    assert fallbacks(wide, lambda: wide(x, x, x)) == ["the head dim is 257: the kernels take up to 256"]
    ours, _ = pair(dropout=1.0)
    y = torch.randn(2, 5, 24)
    assert fallbacks(ours, lambda: ours(y, y, y)) == ["dropout is 1.0"]
    assert torch.equal(ours(y, y, y)[0], ours.out_proj.bias.expand(2, 5, 24))


def test_weights_where_the_kernel_does_not_give_the_output_are_counted() -> None:
    ours, _ = pair(dropout=0.1)
    x = torch.randn(2, 5, 24)
    reason = "the attention weights are asked for (need_weights=True)"
    assert fallbacks(ours, lambda: ours(x, x, x)) == [reason]
    assert fallbacks(ours, lambda: ours(x, x, x, need_weights=False)) == []
    ours.eval()
    assert fallbacks(ours, lambda: ours(x, x, x)) == []
    with torch.no_grad():
        assert fallbacks(ours, lambda: ours(x, x, x)) == [reason]
        assert fallbacks(ours, lambda: ours(x, x, x, need_weights=False)) == []


@pytest.mark.parametrize("average", (True, False))
@pytest.mark.parametrize("batch, length", ((1, 700), (2, 300), (900, 12)))
def test_weights_formed_in_parts(batch: int, length: int, average: bool) -> None:
    """In inference they are formed for some entries or queries at a time, with each mask's slice."""
    ours, theirs = pair()
    x = torch.randn(batch, length, 24)
    keys = torch.zeros(batch, length, dtype=torch.bool)
    keys[:, length - 3 :] = True
    with torch.no_grad():
        for attn in (torch.randn(length, length), torch.rand(batch * 4, length, length) < 0.1):
            call = {"attn_mask": attn, "key_padding_mask": keys, "average_attn_weights": average}
            assert_same(ours(x, x, x, **call), theirs(x, x, x, **call))


# ---- the tensors are read as torch reads them ------------------------------------------------------------------------


class LoRALinear(nn.Module):
    """What peft puts in the place of a linear: `weight` is that of the layer inside."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.delta = base, nn.Parameter(torch.randn_like(base.weight))

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.delta.T


CHANGES: dict[str, Callable[[nn.MultiheadAttention], object]] = {
    "pruned in_proj": lambda m: prune.random_unstructured(m, "in_proj_weight", 0.4),
    "parametrised in_proj": lambda m: nn.utils.parametrize.register_parametrization(m, "in_proj_weight", nn.Tanh()),
    "parametrised out_proj": lambda m: parametrizations.weight_norm(m.out_proj),
    "LoRA out_proj": lambda m: setattr(m, "out_proj", LoRALinear(m.out_proj)),
    "hooked out_proj": lambda m: m.out_proj.register_forward_hook(lambda *_: torch.zeros(())),
    "hooked": lambda m: m.register_forward_hook(lambda _m, _x, y: (2 * y[0], y[1])),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_children_and_weights(change: str) -> None:
    """torch reads out_proj.weight and never calls out_proj."""
    results = []
    for module in pair():
        torch.manual_seed(1)
        CHANGES[change](module)
        x = torch.randn(2, 5, 24, requires_grad=True)
        output, _ = module(x, x, x, need_weights=False)
        output.sum().backward()
        results.append([output, x.grad, *(p.grad for p in module.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


# ---- torch's machinery -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", (pytest.param(False, marks=pytest.mark.slow), True))
@pytest.mark.parametrize("need_weights", (True, False))
@pytest.mark.parametrize("training", (True, False))
def test_compiles_whole(training: bool, need_weights: bool, dynamic: bool) -> None:
    ours, _ = pair()
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    hidden = torch.zeros(3, 6, dtype=torch.bool)
    hidden[1, 4:] = True
    call = {"attn_mask": torch.randn(6, 6), "key_padding_mask": hidden, "need_weights": need_weights}
    x = torch.randn(3, 6, 24, requires_grad=training)
    with torch.set_grad_enabled(training):
        results = compiled(x, x, x, **call), ours(x, x, x, **call)
    assert_same(*results)
    if training:
        grads = [torch.autograd.grad(r[0].square().sum(), (x, *ours.parameters())) for r in results]
        for found, expected in zip(*grads, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("need_weights", (True, False))
@pytest.mark.parametrize(
    "options", ({}, {"add_bias_kv": True, "add_zero_attn": True}, {"kdim": 24, "vdim": 24}), ids=str
)
def test_autocast_casts_as_torch(options: dict[str, Any], need_weights: bool) -> None:
    ours, theirs = pair(**options)
    x = torch.randn(2, 5, 24, requires_grad=True)
    masks = {"attn_mask": torch.randn(5, 5), "key_padding_mask": torch.zeros(2, 5, dtype=torch.bool)}
    results = []
    for module in (ours, theirs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output, weights = module(x, x, x, need_weights=need_weights, **masks)
        grads = torch.autograd.grad(output.float().square().sum(), (x, *module.parameters()))
        results.append([output, weights, *grads])
    for found, expected in zip(*results, strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            assert found.dtype == expected.dtype
            scale = float(expected.abs().max())
            torch.testing.assert_close(found, expected, atol=0.03 * scale, rtol=0.03)


@pytest.mark.parametrize("reentrant", (True, False))
def test_checkpointing_repeats_the_same_dropout(reentrant: bool) -> None:
    ours, _ = pair(dropout=0.4)
    x = torch.randn(2, 9, 24, requires_grad=True)
    grads = []
    for run in (lambda f, y: f(y), lambda f, y: checkpoint(f, y, use_reentrant=reentrant)):
        torch.manual_seed(5)
        output = run(lambda y: ours(y, y, y, need_weights=False)[0], x)
        grads.append(torch.autograd.grad(output.square().sum(), x, retain_graph=True) if not reentrant else ())
        if reentrant:
            x.grad = None
            output.square().sum().backward()
            grads[-1] = (x.grad,)
    torch.testing.assert_close(grads[0], grads[1], atol=0, rtol=0)


def test_functional_call_and_vmap() -> None:
    ours, theirs = pair()
    x = torch.randn(3, 2, 5, 24)
    tensors = {name: 0.5 * p.detach() for name, p in ours.named_parameters()}
    for need_weights in (True, False):
        call = {"need_weights": need_weights}
        found, expected = (torch.func.functional_call(m, tensors, (x[0],) * 3, call) for m in (ours, theirs))
        assert_same(found, expected)
        mapped = torch.func.vmap(lambda y, c=call: torch.func.functional_call(ours, tensors, (y,) * 3, c)[0])(x)
        torch.testing.assert_close(
            mapped, torch.stack([torch.func.functional_call(theirs, tensors, (y,) * 3, call)[0] for y in x]),
            atol=1e-5, rtol=1e-5,
        )  # fmt: skip


def test_the_backend_of_the_module_is_used() -> None:
    ours, _ = pair()
    x = torch.randn(2, 5, 24)
    expected = ours(x, x, x)
    ours.fastattn_backend = "reference"
    assert_same(ours(x, x, x), expected)
    missing = next((name for name, reason in dispatch.backends().items() if reason is not None), None)
    if missing is not None:
        ours.fastattn_backend = missing
        with pytest.raises(dispatch.NotSupported):
            ours(x, x, x)


@pytest.mark.parametrize("layout", ("batch", "seq"))
def test_empty_batches_and_lengths(layout: str) -> None:
    ours, _ = pair(batch_first=layout == "batch")
    for batch, len_q, len_k in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        query, key = ((batch, n, 24) if layout == "batch" else (n, batch, 24) for n in (len_q, len_k))
        for grad in (True, False):
            hidden = torch.zeros(len_q, len_k, dtype=torch.bool)
            with torch.set_grad_enabled(grad):
                output, weights = ours(torch.randn(query), *(torch.randn(key),) * 2, attn_mask=hidden)
            assert output.shape == query and weights.shape == (batch, len_q, len_k)
            assert len_k > 0 or torch.equal(output, ours.out_proj.bias.expand(query))


def test_selective_checkpointing_keeps_the_products_of_weights() -> None:
    """A policy that saves products, as torchtitan's: what they became in place could not be compared with them."""
    products = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}
    products.add(torch.ops.aten.baddbmm.default)

    def policy(context, operator, *args, **options):
        return CheckpointPolicy.MUST_SAVE if operator in products else CheckpointPolicy.PREFER_RECOMPUTE

    torch.manual_seed(4)
    original = nn.MultiheadAttention(32, 4, batch_first=True)
    module = copy.deepcopy(original)
    swap(module)
    gradients = []
    for each in (original, module):
        x = torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(5)).requires_grad_()
        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        checkpoint(lambda x, each=each: each(x, x, x)[0], x, use_reentrant=False, context_fn=contexts).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("length", (9, 200))  # few scores are torch's in inference
def test_weights_in_inference(length: int) -> None:
    torch.manual_seed(4)
    original = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    module = copy.deepcopy(original)
    report = swap(module)
    x = torch.randn(1, length, 32)
    with torch.no_grad(), report.counting():
        for found, expected in zip(module(x, x, x), original(x, x, x), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert report.rows[0].fallbacks == {"the attention weights are asked for (need_weights=True)": 1}
