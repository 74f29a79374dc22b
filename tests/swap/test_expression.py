"""What is read of a forward, and which forwards are not read."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.swap.expression import Call, Expression, Input, Op, Own, spelling_of, spellings_of

CALLS: list[object] = []
NUMBER = 2.0


def expression_of(module_class: type[nn.Module]) -> Expression | None:
    found = spelling_of(module_class)
    return None if found is None else found.expression


class Gated(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """A docstring, names of variables and the order of lines leave no trace."""
        beside = self.up(x)
        gate: Tensor = F.silu(self.gate(x))
        return self.down(gate * beside)


class GatedOtherwise(nn.Module):
    def forward(self, hidden):
        return self.down(self._product(hidden))

    def _product(self, hidden):
        return torch.nn.functional.silu(self.gate(hidden)) * self.up(hidden)


def test_spellings_of_one_block() -> None:
    gate, up = Call(Own("gate"), (Input(0),)), Call(Own("up"), (Input(0),))
    expected = Call(Own("down"), (Op("mul", (Op("silu", (gate,)), up)),))
    assert expression_of(Gated) == expression_of(GatedOtherwise) == expected
    found = spelling_of(GatedOtherwise)
    assert found.inputs == ("hidden",)
    assert found.methods == {"forward": GatedOtherwise.forward, "_product": GatedOtherwise._product}


def test_methods_functions_and_operators_are_one_operation() -> None:
    class Methods(nn.Module):
        def forward(self, x):
            return x.pow(2).mean(-1, keepdim=True).rsqrt()

    class Functions(nn.Module):
        def forward(self, x):
            return torch.rsqrt(torch.mean(x**2, -1, keepdim=True))

    assert expression_of(Methods) == expression_of(Functions) is not None


def test_numbers_on_either_side_and_pieces() -> None:
    class Module(nn.Module):
        def forward(self, x, y):
            a, b = self.linear(x).chunk(2, dim=-1)
            return (1.0 - a) / (2 + b) * -y

    whole = Op("chunk", (Call(Own("linear"), (Input(0),)), 2), (("dim", -1),))
    a, b = Op("getitem", (whole, 0)), Op("getitem", (whole, 1))
    quotient = Op("div", (Op("sub", (1.0, a)), Op("add", (2, b))))
    assert expression_of(Module) == Op("mul", (quotient, Op("neg", (Input(1),))))


class Branch(nn.Module):
    def forward(self, x):
        return self.a(x) if self.training else x


class NoneBranch(nn.Module):
    def forward(self, x):
        if self.a is None:
            return x
        return self.a(x)


class Loop(nn.Module):
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Instance(nn.Module):
    def forward(self, x):
        return self.a(x * isinstance(self.weight, Tensor))


class WritesToItsInput(nn.Module):
    def forward(self, x):
        x.mul_(2)
        return self.a(x)


class AddsInPlace(nn.Module):
    def forward(self, x):
        x += 1
        return self.a(x)


class WritesItems(nn.Module):
    def forward(self, x):
        x[0] = 0
        return self.a(x)


class Remembers(nn.Module):
    def forward(self, x):
        self.last = x
        return self.a(x)


class CallsForEffect(nn.Module):
    def forward(self, x):
        self.monitor(x)
        return self.a(x)


class Prints(nn.Module):
    def forward(self, x):
        print(x)
        return self.a(x)


class Appends(nn.Module):
    def forward(self, x):
        CALLS.append(x)
        return self.a(x)


class Seeds(nn.Module):
    def forward(self, x):
        torch.manual_seed(0)
        return self.a(x)


class OtherModule(nn.Module):
    def forward(self, x):
        return self.a(x) * math.pi


class Default(nn.Module):
    def forward(self, x, scale=1.0):
        return self.a(x) * scale


class Many(nn.Module):
    def forward(self, *x):
        return self.a(x[0])


class Options(nn.Module):
    def forward(self, x):
        return self.a(x, mode="fast")


class ReadsShape(nn.Module):
    def forward(self, x):
        rows, columns = x.shape
        return self.a(x).reshape(rows, columns)


class UnusedInput(nn.Module):
    def forward(self, x, unused):
        return self.a(x)


class Lambda(nn.Module):
    def forward(self, x):
        act = lambda h: F.gelu(h) if torch.is_grad_enabled() else F.relu(h)  # noqa: E731
        return self.a(act(x))


class Comprehension(nn.Module):
    def forward(self, x):
        [CALLS.append(i) for i in (1, 2)]
        return self.a(x)


class Alias(nn.Module):
    def forward(self, x):
        t = torch
        t.manual_seed(0)
        return self.a(x)


class OwnDictionary(nn.Module):
    def forward(self, x):
        self.__dict__.update(last=1)
        return self.a(x)


class ReadForEffect(nn.Module):
    @property
    def tick(self):
        CALLS.append("tick")
        return 1.0

    def forward(self, x):
        self.tick  # noqa: B018
        return self.a(x)


class HelperWithDefault(nn.Module):
    def _log(self, x, log=CALLS):
        log.append("helper")
        return F.gelu(x)

    def forward(self, x):
        return self.a(self._log(x))


class Tries(nn.Module):
    def forward(self, x):
        try:
            return self.a(x)
        except:  # noqa: E722
            return x


class OfAGlobalNumber(nn.Module):
    def forward(self, x):
        return self.a(x) * NUMBER


class WritesOut(nn.Module):
    def forward(self, x):
        return torch.mul(self.a(x), self.weight, out=self.buffer)


class NoSuchMethod(nn.Module):
    def forward(self, x):
        return self.a(x).gelu()


class AsksItsClass(nn.LayerNorm):
    factor = 2.0

    def forward(self, input):
        return super().forward(input) * __class__.factor


class Super(nn.Linear):
    def forward(self, input):
        return super().forward(input)


class Computed(nn.Module):
    @property
    def weight(self):
        CALLS.append("read")
        return torch.ones(1)

    def forward(self, x):
        return self.weight(x)


def _decorated(function):
    def wrapper(self, x):
        CALLS.append(x)
        return function(self, x)

    return wrapper


class Decorated(nn.Module):
    @_decorated
    def forward(self, x):
        return self.a(x)


@pytest.mark.parametrize(
    "module_class",
    [
        Branch,
        NoneBranch,
        Loop,
        Instance,
        WritesToItsInput,
        AddsInPlace,
        WritesItems,
        Remembers,
        CallsForEffect,
        Prints,
        Appends,
        Seeds,
        OtherModule,
        Default,
        Many,
        Options,
        ReadsShape,
        UnusedInput,
        Lambda,
        Comprehension,
        Alias,
        OwnDictionary,
        ReadForEffect,
        HelperWithDefault,
        Tries,
        OfAGlobalNumber,
        WritesOut,
        NoSuchMethod,
        Super,
        AsksItsClass,
        Computed,
        Decorated,
        nn.Module,
        nn.Sequential,
    ],
)
def test_what_cannot_be_read_is_not_run_either(module_class, capsys: pytest.CaptureFixture[str]) -> None:
    CALLS.clear()
    state = torch.get_rng_state()
    assert expression_of(module_class) is None
    assert not CALLS
    assert capsys.readouterr().out == ""
    assert torch.equal(torch.get_rng_state(), state)


class Flag(nn.Module):
    def forward(self, x):
        y = self.a(x)
        if self.gated:
            y = y * self.b(x)
        return y if not self.negated else -y


def test_a_branch_on_flags_has_a_spelling_for_each_of_their_values() -> None:
    a, b = Call(Own("a"), (Input(0),)), Call(Own("b"), (Input(0),))
    product = Op("mul", (a, b))
    expected = {
        (("gated", False), ("negated", False)): a,
        (("gated", False), ("negated", True)): Op("neg", (a,)),
        (("gated", True), ("negated", False)): product,
        (("gated", True), ("negated", True)): Op("neg", (product,)),
    }
    assert {found.flags: found.expression for found in spellings_of(Flag)} == expected
    assert spelling_of(Flag) is None


def test_flags_hold_as_bools_only() -> None:
    module = Flag()
    module.gated, module.negated = True, False
    assert [dict(found.flags) for found in spellings_of(Flag) if found.holds_for(module)] == [
        {"gated": True, "negated": False}
    ]
    for value in (1, "yes", None, torch.tensor(True), nn.Linear(2, 2)):
        module.__dict__["gated"] = value
        assert not [found for found in spellings_of(Flag) if found.holds_for(module)]


class FlagOfAnInput(nn.Module):
    def forward(self, x, y):
        return self.a(x * y) if y else x


class FlagOfAValue(nn.Module):
    def forward(self, x):
        return self.a(x) if self.scale + 1 else x


class ComparesAnAttribute(nn.Module):
    def forward(self, x):
        return self.a(x) if self.kind == "a" else x


class WhileFlag(nn.Module):
    def forward(self, x):
        while self.again:
            x = self.a(x)
        return x


class IsAnother(nn.Module):
    def forward(self, x):
        return self.a(x) * (self.weight is self.bias)


class NoneInAHelper(nn.Module):
    def forward(self, x):
        return self.scaled(self.a(x))

    def scaled(self, x):
        return x if self.weight is None else x * self.weight


class NoneOfAnInput(nn.Module):
    def forward(self, x, y):
        return self.a(x) * y if y is not None else self.a(x)


class ThreeFlags(nn.Module):
    def forward(self, x):
        return self.a(x) if self.one and self.two and self.three else x


class FlagHidesAnEffect(nn.Module):
    def forward(self, x):
        if self.counted:
            CALLS.append(x)
        return self.a(x)


class Asserts(nn.Module):
    def forward(self, x):
        assert x
        return self.a(x)


@pytest.mark.parametrize(
    "module_class",
    [
        FlagOfAnInput,
        FlagOfAValue,
        ComparesAnAttribute,
        WhileFlag,
        IsAnother,
        NoneInAHelper,
        NoneOfAnInput,
        Asserts,
    ],
)
def test_other_branches_are_not_read(module_class) -> None:
    CALLS.clear()
    assert spellings_of(module_class) == ()
    assert not CALLS


def test_what_a_way_not_taken_touches_is_not_touched() -> None:
    (found,) = spellings_of(FlagHidesAnEffect)
    assert found.flags == (("counted", False),) and found.expression == Call(Own("a"), (Input(0),))
    assert not CALLS


@pytest.mark.parametrize(
    "use",
    [
        "CALLS(x)",
        "x + CALLS",
        "CALLS * x",
        "CALLS[0](x)",
        "self.a(x) if CALLS else x",
        "self.a(x, CALLS)",
        "x.pow(CALLS)",
        "self.a(x) if len(x) else x",
        "max(self.a(x), 0)",
        "torch.pow(x, CALLS)",
        "CALLS",
        "(x, CALLS)",
    ],
)
def test_globals_are_unknown(use: str) -> None:
    scope = {"nn": nn, "torch": torch, "CALLS": [], "__name__": __name__}
    exec(f"class Module(nn.Module):\n    def forward(self, x):\n        return {use}\n", scope)
    assert spellings_of(scope["Module"]) == ()


def test_more_flags_than_two_are_not_read() -> None:
    assert {found.expression for found in spellings_of(ThreeFlags)} == {Input(0)}


def test_a_flag_under_which_the_forward_cannot_be_read() -> None:
    class Module(nn.Module):
        def forward(self, x):
            return x.reshape(*x.shape, 1) if self.wide else self.a(x)

    (found,) = spellings_of(Module)
    assert found.flags == (("wide", False),)


def test_axis_is_dim() -> None:
    class Axis(nn.Module):
        def forward(self, x):
            return torch.mean(x, axis=-1, keepdim=True)

    assert expression_of(Axis) == Op("mean", (Input(0),), (("dim", -1), ("keepdim", True)))


# ---- what is answered while a forward is read ------------------------------------------------------------------------


torch_npu = None


def is_torch_npu_available() -> bool:
    return False


def is_ready_available() -> bool:
    raise AssertionError("asked")


class ForOtherDevices(nn.Module):
    def forward(self, x):
        if x.device.type == "mps":
            return self.b(x)
        if is_torch_npu_available():
            return torch_npu.a(x)
        return self.a(x) if x.device.type != "xpu" else self.b(x)


def test_questions_for_devices_that_the_kernels_do_not_run_on_are_answered_with_no() -> None:
    assert expression_of(ForOtherDevices) == Call(Own("a"), (Input(0),))


@pytest.mark.parametrize(
    "use",
    [
        "self.b(x) if x.device.type == 'cuda' else self.a(x)",
        "self.b(x) if x.device.index == 'mps' else self.a(x)",
        "self.b(x) if x.dtype == torch.float32 else self.a(x)",
        "self.b(x) if x == 'mps' else self.a(x)",
        "self.b(x) if is_ready_available() else self.a(x)",
    ],
)
def test_no_other_question_is(use: str) -> None:
    scope = {"nn": nn, "torch": torch, "is_ready_available": is_ready_available, "__name__": __name__}
    exec(f"class Module(nn.Module):\n    def forward(self, x):\n        return {use}\n", scope)
    assert spellings_of(scope["Module"]) == ()


class TakesOptions(nn.Module):
    def forward(self, x, *args, **kwargs):
        if len(args) > 0 or kwargs.get("scale", None) is not None:  # noqa: SIM910
            CALLS.append(x)
        return self.a(x)


def test_options_are_read_as_not_given_where_that_is_asked_for() -> None:
    assert spelling_of(TakesOptions) is None
    found = spelling_of(TakesOptions, without_options=True)
    assert found is not None and found.expression == Call(Own("a"), (Input(0),)) and found.inputs == ("x",)


@pytest.mark.parametrize(
    "use",
    [
        "self.b(x) if self.get('a') is not None else self.a(x)",
        "self.b(x) if self.a(x) is None else self.a(x)",
        "self.b(x) if x.get('a') is None else self.a(x)",
        "self.b(x) if kwargs is None else self.a(x)",
        "self.b(x) if self.last is x else self.a(x)",
        "self.b(x) if x is self.last else self.a(x)",
        "self.b(x) if None is self.last else self.a(x)",
        "self.b(x) if self.last.weight is None else self.a(x)",
        "self.a(x, **kwargs) if kwargs.get('a') is x else self.a(x)",
    ],
)
def test_no_other_test_for_none_is_read(use: str) -> None:
    scope = {"nn": nn, "__name__": __name__}
    exec(f"class Module(nn.Module):\n    def forward(self, x, **kwargs):\n        return {use}\n", scope)
    assert spellings_of(scope["Module"], without_options=True) == ()


def test_texts_stand_for_what_attributes_hold() -> None:
    class Form(nn.Module):
        def forward(self, x):
            return F.gelu(self.a(x), approximate=self.form)

    found = spelling_of(Form, texts={"form": "tanh"})
    assert found is not None and found.expression.options == (("approximate", "tanh"),)


class MayHaveNoWeight(nn.Module):
    def forward(self, x):
        x = x.relu()
        if self.weight is not None:
            x = x * self.weight
        return x + self.bias if self.bias is not None else x


def test_attributes_that_are_compared_with_none_have_a_spelling_for_each_case() -> None:
    found = {spelling.nones: spelling for spelling in spellings_of(MayHaveNoWeight)}
    scaled = Op("mul", (Op("relu", (Input(0),)), Own("weight")))
    assert found[("weight", False), ("bias", False)].expression == Op("add", (scaled, Own("bias")))
    assert found[("weight", True), ("bias", True)].expression == Op("relu", (Input(0),))
    assert len(found) == 4 and spelling_of(MayHaveNoWeight) is None
    module = MayHaveNoWeight()
    module.weight, module.bias = nn.Parameter(torch.ones(2)), None
    assert [nones for nones, each in found.items() if each.holds_for(module)] == [(("weight", False), ("bias", True))]


def test_more_comparisons_with_none_than_two_are_not_read() -> None:
    class Module(nn.Module):
        def forward(self, x):
            return self.a(x) if self.b is None and self.c is None and self.d is None else x

    assert spellings_of(Module) == ()
