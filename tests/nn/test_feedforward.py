"""FeedForward and GatedFeedForward against the same blocks of torch modules, by the rule of fastattn.parity."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.nn import FeedForward, GatedFeedForward
from fastattn.nn.counting import Tally, start, stop

WIDTH, HIDDEN = 24, 40
TORCH = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu2": lambda x: F.relu(x).square(),
}


class TorchFeedForward(nn.Module):
    def __init__(self, activation: Callable[[Tensor], Tensor], bias: bool) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(WIDTH, HIDDEN, bias=bias), nn.Linear(HIDDEN, WIDTH, bias=bias)
        self.activate = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.activate(self.linear1(x)))


class TorchGatedFeedForward(nn.Module):
    def __init__(self, activation: Callable[[Tensor], Tensor], bias: bool) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, HIDDEN, bias=bias), nn.Linear(WIDTH, HIDDEN, bias=bias)
        self.down_proj = nn.Linear(HIDDEN, WIDTH, bias=bias)
        self.activate = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activate(self.gate_proj(x)) * self.up_proj(x))


def name_of(activation: object) -> str:
    return activation if isinstance(activation, str) else getattr(activation, "__name__", str(activation))


BLOCKS = [(FeedForward, TorchFeedForward), (GatedFeedForward, TorchGatedFeedForward)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [*TORCH, F.gelu, nn.SiLU(), torch.tanh], ids=name_of)
@pytest.mark.parametrize(("ours", "theirs"), BLOCKS, ids=["plain", "gated"])
def test_equals_torch(ours, theirs, activation, bias: bool, dtype: torch.dtype, against_torch, randomised) -> None:
    module = randomised(ours(WIDTH, HIDDEN, activation, bias=bias))
    plain = theirs(TORCH[activation] if isinstance(activation, str) else activation, bias)
    against_torch(module, plain, {"x": torch.randn(2, 5, WIDTH)}, {}, dtype=dtype, grad=True)


@pytest.mark.parametrize("kind", [FeedForward, GatedFeedForward])
def test_dropout_follows_training(kind: type[nn.Module]) -> None:
    module, x = kind(WIDTH, HIDDEN, dropout=0.5), torch.randn(3, WIDTH)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


@pytest.mark.parametrize("kind", [FeedForward, GatedFeedForward])
def test_children_that_are_not_plain_are_called(kind: type[nn.Module]) -> None:
    module, x = kind(WIDTH, HIDDEN), torch.randn(3, WIDTH)
    plain = module(x)
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            hook = child.register_forward_hook(lambda module, args, out: out)
            tallies = {id(module): Tally()}
            start(tallies)
            torch.testing.assert_close(module(x), plain)
            stop(tallies)
            assert tallies[id(module)].fallbacks == {f"{name} has hooks": 1}
            hook.remove()


def test_the_activation_is_checked_and_printed() -> None:
    with pytest.raises(ValueError, match="activation='swish' is unknown: pass one of relu, gelu"):
        FeedForward(4, 8, "swish")
    with pytest.raises(TypeError, match=r"activation is the class GELU: pass an object of it, GELU\(\)"):
        FeedForward(4, 8, nn.GELU)
    with pytest.raises(TypeError, match="activation=3 is a int: pass a name, a callable, or None"):
        GatedFeedForward(4, 8, 3)
    assert FeedForward(4, 8, None)(torch.ones(1, 4)).shape == (1, 4)
    assert "activation=gelu" in repr(FeedForward(4, 8)) and "activation=silu" in repr(GatedFeedForward(4, 8))
    assert "(activation): GELU" in repr(FeedForward(4, 8, nn.GELU()))


@pytest.mark.parametrize("kind", [FeedForward, GatedFeedForward])
def test_copies_and_saved_modules_compute_the_same(kind: type[nn.Module]) -> None:
    module, x = kind(WIDTH, HIDDEN, "quick_gelu"), torch.randn(3, WIDTH)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), module(x))
    assert set(module.state_dict()) >= {f"{name}.weight" for name in dict(module.named_children()) if name != "dropout"}
