"""Which modules get a row, and what it says."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import prune

from fastattn import dispatch
from fastattn.swap import plan


class MyLayerNorm(nn.LayerNorm):
    def forward(self, input):
        return super().forward(input) + 1


class SwiGLUFeedForward(nn.Module):
    pass


class LinearAttention(nn.Module):
    pass


class Block(nn.Module):
    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def rows(model: nn.Module, **flags: bool) -> list[tuple[str, str, str]]:
    return [(row.path, row.action, row.reason) for row in plan(model, **flags).rows]


def test_known_unknown_and_uninteresting_modules() -> None:
    model = Block(
        norm=nn.LayerNorm(4),
        rms=nn.RMSNorm(4),
        mine=MyLayerNorm(4),
        torchs=nn.MultiheadAttention(4, 2),
        attention=LinearAttention(),
        ffn=SwiGLUFeedForward(),
        linear=nn.Linear(4, 4),
        group=nn.GroupNorm(2, 4),
    )
    assert rows(model) == [
        ("norm", "swap", ""),
        ("rms", "swap", ""),
        ("mine", "left", "only the exact class LayerNorm is swapped, this is a subclass of it"),
        ("torchs", "swap", ""),
        ("attention", "left", "no recipe for class LinearAttention"),
        ("ffn", "left", "no recipe for class SwiGLUFeedForward"),
    ]


def test_rows_of_parts_not_asked_for_say_so_or_are_absent() -> None:
    model = Block(norm=nn.LayerNorm(4), mine=MyLayerNorm(4), attention=LinearAttention())
    assert rows(model, norms=False, attention=False) == [("norm", "left", "turned off: norms=False")]


def test_a_part_that_stands_only_beside_another_is_off_with_it() -> None:
    model = Block(attention=nn.MultiheadAttention(4, 2))
    assert rows(model, attention=False) == [("attention", "left", "turned off: attention=False")]
    assert rows(model, attention=False, linears=False) == [
        ("attention", "left", "turned off: attention=False, linears=False")
    ]
    (row,) = plan(model, linears=False).rows
    assert (row.action, row.kernel) == ("swap", "attention")


def test_only_the_innermost_lookalike_is_listed() -> None:
    class OuterAttention(Block):
        pass

    class InnerAttention(nn.Module):
        pass

    model = Block(outer=OuterAttention(inner=InnerAttention(), norm=nn.LayerNorm(4)))
    assert [row[0] for row in rows(model)] == ["outer.inner", "outer.norm"]


def test_lookalikes_beside_each_other_are_both_listed() -> None:
    class NoAttention(nn.Module):
        pass

    assert [row[0] for row in rows(Block(a=NoAttention(), ab=NoAttention()))] == ["a", "ab"]


def test_attention_that_is_none_of_the_known_is_left_with_a_reason() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ReformerConfig(
        attention_head_size=8,
        attn_layers=["lsh"],
        hidden_size=16,
        num_attention_heads=2,
        feed_forward_size=16,
        vocab_size=16,
        axial_pos_embds=False,
        num_buckets=2,
        is_decoder=False,
        num_hidden_layers=1,
    )
    found = rows(transformers.ReformerModel(config))
    layer = "encoder.layers.0.attention"
    assert (f"{layer}.self_attention", "left", "it takes no softmax") in found
    assert (f"{layer}.layer_norm", "swap", "") in found
    assert not any(path == layer for path, _, _ in found)


class ReadFeedForward(nn.Module):
    """One that a recipe knows, with children that it may not know."""

    def __init__(self, up: nn.Module, act: object) -> None:
        super().__init__()
        self.up, self.act, self.down = up, act, nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.up(x)))


class FlaggedLayerNorm(nn.Module):
    """By its name a norm, whatever the flag says."""

    def __init__(self, subtracts: bool) -> None:
        super().__init__()
        self.subtracts, self.weight = subtracts, nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.subtracts:
            return x - self.weight
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (ReadFeedForward(nn.Conv1d(4, 8, 1), nn.GELU()), "up is a torch.nn.modules.conv.Conv1d, not a linear"),
        (
            ReadFeedForward(nn.Linear(4, 8), nn.PReLU()),
            "act is a torch.nn.modules.activation.PReLU, which has parameters",
        ),
        (
            ReadFeedForward(nn.Linear(4, 8), nn.Identity()),
            "act is a torch.nn.modules.linear.Identity, not an activation",
        ),
    ],
    ids=["conv", "learns", "none"],
)
def test_a_module_that_its_recipe_does_not_fit_is_left_and_says_why(module: nn.Module, reason: str) -> None:
    assert rows(Block(ffn=module)) == [("ffn", "left", reason)]
    assert rows(Block(ffn=module), ffns=False) == []


def test_a_module_whose_activation_has_no_kernel_is_left_or_turned_off() -> None:
    model = Block(ffn=ReadFeedForward(nn.Linear(4, 8), nn.Softsign()))
    assert rows(model) == [("ffn", "left", "the activation Softsign has no kernel")]
    assert rows(model, ffns=False) == [("ffn", "left", "turned off: ffns=False")]


def test_flags_of_another_branch_are_named() -> None:
    assert rows(Block(norm=FlaggedLayerNorm(False))) == [("norm", "swap", "")]
    assert rows(Block(norm=FlaggedLayerNorm(True))) == [("norm", "left", "its flags are those of another branch")]


def test_on_a_gpu_without_kernels_nothing_is_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = {"cuda": "too old", "triton": "not installed", "cpu": None, "reference": None}
    monkeypatch.setattr(dispatch, "_unavailable", verdicts.get)
    monkeypatch.setattr(dispatch, "why_no_kernels_on_gpus", dispatch.why_no_kernels_on_gpus.__wrapped__)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = Block(here=nn.LayerNorm(4), there=nn.LayerNorm(4, device="cuda"))
    reason = "no kernels run on this GPU: cuda: too old; triton: not installed"
    assert rows(model) == [("here", "swap", ""), ("there", "left", reason)]
    assert [row.action for row in plan(model, backend="reference").rows] == ["swap", "swap"]
    verdicts["triton"] = None
    assert [row.action for row in plan(model).rows] == ["swap", "swap"]


def test_a_module_whose_forward_is_replaced_is_left() -> None:
    norm = nn.LayerNorm(4)
    norm.forward = lambda x: x
    assert rows(Block(norm=norm)) == [
        ("norm", "left", "its forward is replaced on the instance (by an offloading hook, say): swap before that")
    ]


def test_a_forward_of_another_library_version_is_left(tiny_bert, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_bert()
    output = type(model.encoder.layer[0].output)

    def forward(self, hidden_states: torch.Tensor, input_tensor: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return hidden_states

    monkeypatch.setattr(output, "forward", forward)
    found = {row.path: row.action for row in plan(model).rows}
    assert "encoder.layer.0.output" not in found
    assert found["encoder.layer.0.output.LayerNorm"] == "swap"  # its parent no longer does its work


def test_an_attention_whose_forward_was_replaced_is_left(tiny_bert, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_bert()
    attention = type(model.encoder.layer[0].attention.self)
    original = attention.forward
    monkeypatch.setattr(attention, "forward", lambda self, *args, **kwargs: original(self, *args, **kwargs))
    row = next(row for row in plan(model).rows if row.path == "encoder.layer.0.attention.self")
    assert (row.action, row.reason) == ("left", "no recipe for class BertSelfAttention")


def test_children_that_would_be_called_are_named(tiny_bert) -> None:
    model = tiny_bert()
    prune.l1_unstructured(model.encoder.layer[0].attention.self.query, "weight", amount=0.5)
    row = next(row for row in plan(model).rows if row.path == "encoder.layer.0.attention.self")
    assert (row.action, row.reason) == ("swap", "query has hooks")


def test_what_cannot_be_read_is_left_with_the_error() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.act = nn.Linear(4, 4), nn.ReLU()

        def forward(self, x):
            return self.down(self.act(self.up(x)))

    (row,) = plan(Block()).rows
    assert row.action == "left"
    assert row.reason == "it could not be read: AttributeError: 'Block' object has no attribute 'down'"


def test_scripted_modules_are_no_business_of_a_swap() -> None:
    assert rows(Block(scripted=torch.jit.script(nn.Linear(3, 3)), norm=nn.LayerNorm(3))) == [("norm", "swap", "")]


def test_parametrised_norms_are_left() -> None:
    norm = nn.utils.parametrizations.weight_norm(nn.LayerNorm(4), dim=None)
    (row,) = plan(Block(norm=norm)).rows
    assert (row.action, row.reason) == (
        "left",
        "only the exact class LayerNorm is swapped, this is a subclass of it",
    )
