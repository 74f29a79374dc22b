"""What a forward asks its attributes for, what it overwrites, and what it would import."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.swap.expression import Call, Input, Op, Own, Spelling, spelling_of, spellings_of

A, B = Call(Own("a"), (Input(0),)), Call(Own("b"), (Input(0),))


class Config:
    form: object = "none"
    gated: object = False


def read(use: str, before: str = "pass") -> dict[tuple[tuple[str, object], ...], Spelling]:
    """The spellings of a forward that returns what `use` says, by their flags."""
    scope = {"nn": nn, "torch": torch, "F": F, "is_torch_npu_available": is_torch_npu_available, "__name__": __name__}
    exec(f"class Module(nn.Module):\n def forward(self, x):\n  {before}\n  return {use}\n", scope)
    return {found.flags: found for found in spellings_of(scope["Module"])}


def is_torch_npu_available() -> bool:
    return False


# ---- dtypes ----------------------------------------------------------------------------------------------------------


class Halves(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if self.weight.dtype in [torch.float16, torch.bfloat16]:
            y = y.to(self.weight.dtype)
        return y


def test_the_dtype_of_an_attribute_has_a_spelling_for_each_that_the_kernels_take() -> None:
    found = {dict(spelling.flags)["weight.dtype"]: spelling for spelling in spellings_of(Halves)}
    cast = Op("to", (A, Op("getattr", (Own("weight"), "dtype"))))
    assert {dtype: each.expression for dtype, each in found.items()} == {
        torch.float32: A,
        torch.float16: cast,
        torch.bfloat16: cast,
    }
    module = Halves()
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        module.weight = nn.Parameter(torch.ones(2, dtype=dtype))
        assert [each for each, spelling in found.items() if spelling.holds_for(module)] == [dtype][: dtype in found]
    module.weight = None
    assert not any(each.holds_for(module) for each in found.values())


@pytest.mark.parametrize(
    "use",
    [
        "self.a(x) if x.dtype in [torch.float16] else self.b(x)",
        "self.a(x) if x.dtype in {torch.float16, torch.bfloat16} else self.b(x)",
        "self.a(x) if self.weight.dtype in {torch.float16, torch.bfloat16} else self.b(x)",
        "self.a(x) if {torch.float16: True}.get(self.weight.dtype) else self.b(x)",
        "self.a(x) if {'a': True}.get(self.kind) else self.b(x)",
        "self.a(x) if self.kind in {'a', 'b'} else self.b(x)",
        "self.a(x) if F in {1, 2} else self.b(x)",
        "self.a(x) if x in {1, 2} else self.b(x)",
        "self.a(x) if self.weight.dtype == x.dtype else self.b(x)",
        "self.a(x) if self.weight.device == torch.float16 else self.b(x)",
    ],
)
def test_what_a_set_or_a_dictionary_would_say_is_not_read(use: str) -> None:
    assert not read(use)


# ---- attributes of attributes, and what is handed on to torch --------------------------------------------------------


def test_a_form_and_a_dimension_have_a_spelling_for_each_that_is_known() -> None:
    forms = read("F.gelu(self.a(x), approximate=self.config.form)")
    assert {flags: each.expression for flags, each in forms.items()} == {
        (("config.form", form),): Op("gelu", (A,), (("approximate", form),)) for form in ("none", "tanh")
    }
    for use in ("x.mean(self.dim, keepdim=True)", "torch.mean(x, -1, keepdim=True)"):
        (found,) = read(use).values()
        assert found.expression == Op("mean", (Input(0), -1), (("keepdim", True),))
    assert set(read("x.chunk(2, dim=self.dim)[0]")) == set(read("x.chunk(2, self.dim)[0]")) == {(("dim", -1),)}


@pytest.mark.parametrize(("value", "holds"), [("tanh", True), ("none", False), (None, False), (b"tanh", False)])
def test_a_form_is_that_string_and_nothing_like_it(value: object, holds: bool) -> None:
    found = read("F.gelu(self.a(x), approximate=self.config.form)")[(("config.form", "tanh"),)]
    module = nn.Module()
    assert not found.holds_for(module)
    module.config = Config()
    module.config.form = value
    assert found.holds_for(module) is holds


@pytest.mark.parametrize("value", [-1.0, True, torch.tensor(-1)])
def test_a_dimension_is_an_int(value: object) -> None:
    (found,) = read("x.mean(self.dim)").values()
    module = nn.Module()
    for module.dim, holds in ((value, False), (-1, True)):
        assert found.holds_for(module) is holds


def test_flags_of_a_config() -> None:
    found = read("self.a(x) if self.config.gated else self.b(x)")
    assert {flags: each.expression for flags, each in found.items()} == {
        (("config.gated", True),): A,
        (("config.gated", False),): B,
    }
    module = nn.Module()
    module.config = Config()
    assert [each.expression for each in found.values() if each.holds_for(module)] == [B]
    module.config.gated = 1
    assert not [each for each in found.values() if each.holds_for(module)]


@pytest.mark.parametrize(
    "use",
    [
        "self.a(x) + self.config.offset",
        "self.net.a(x)",
        "F.linear(x, self.net.weight)",
        "self.a(x) if self.config.kind == 'a' else self.b(x)",
        "self.a(x) if self.config.flags.gated.__class__ else self.b(x)",
    ],
)
def test_nothing_else_is_done_with_attributes_of_attributes(use: str) -> None:
    assert not read(use)


# ---- what is overwritten ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        "F.relu(self.a(x), inplace=True)",
        "F.relu(self.a(x), True)",
        "F.relu(input=self.a(x), inplace=True)",
        "self.a(x).relu_()",
        "torch.relu_(self.a(x))",
        "F.relu_(self.a(x))",
    ],
)
def test_what_a_child_gave_may_be_overwritten(use: str) -> None:
    assert [each.expression for each in read(use).values()] == [Op("relu", (A,))]


@pytest.mark.parametrize(
    ("before", "use"),
    [
        ("pass", "F.relu(x, inplace=True)"),
        ("pass", "self.b(x.relu_())"),
        ("h = self.a(x)", "F.relu(h, inplace=True) * h"),
        ("h = self.a(x)", "h * F.relu(h, inplace=True)"),
        ("h = self.a(x)", "F.silu(h, inplace=True) * F.silu(h, inplace=True)"),
        ("h = self.a(x); h.relu_()", "self.b(h)"),
        ("h = self.a(x); y = self.b(h)", "y * h.relu_()"),
        ("h = self.a(x); y = h.T; h = h.relu_()", "h @ y"),
        ("h = self.a(x); y = h.exp; h = h.relu_()", "y() * h"),
        ("h = self.a(x); p = h.chunk(2, -1); h = h.relu_()", "h * p[0]"),
        ("h = self.a(x); t = (h, h); h = h.relu_()", "self.b(h, t[0])"),
        ("h = self.a(x)", "F.relu(h[0], inplace=True)"),
        ("h = self.a(x).view(-1)", "h.relu_()"),
        ("h, y = self.a(x).chunk(2, -1)", "F.silu(h, inplace=True) * y"),
        ("pass", "F.relu(self.weight, inplace=True) * x"),
        ("pass", "self.a(x).sigmoid_()"),
    ],
)
def test_what_is_read_again_or_belongs_to_others_may_not_be(before: str, use: str) -> None:
    assert not read(use, before)


def test_where_an_attribute_says_whether_it_overwrites_the_option_stays() -> None:
    (found,) = read("F.relu(self.a(x), inplace=self.inplace)").values()
    assert found.expression == Op("relu", (A,), (("inplace", Own("inplace")),))


# ---- what it would import --------------------------------------------------------------------------------------------


def test_an_import_on_a_way_not_taken() -> None:
    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if is_torch_npu_available() and self.weight is not None:
                import torch_npu

                return torch_npu.norm(x, self.weight)
            return self.a(x)

    assert {spelling.nones: spelling.expression for spelling in spellings_of(Other)} == {
        (("weight", False),): A,
        (("weight", True),): A,
    }


@pytest.mark.parametrize(
    "before", ["import math", "from torch.nn import functional as F", "import torch.nn.functional as F"]
)
def test_an_import_on_the_way_is_not_read(before: str) -> None:
    assert not read("F.relu(self.a(x))", before)


def test_a_module_that_is_imported_is_imported_by_the_original_alone() -> None:
    class Imports(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if self.flag:
                import this  # prints

                return this.a(x)
            return self.a(x)

    (found,) = spellings_of(Imports)
    assert found.flags == (("flag", False),) and spelling_of(Imports) is None
