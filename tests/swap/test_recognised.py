"""Classes that are recognised by their forwards: found again by name, made once, left where that would be noticed."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

from fastattn.swap import plan, recognised, swap

SOURCE = """
from torch import nn


class Outer:
    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.act, self.down = nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)

        def forward(self, x):
            return self.down(self.act(self.up(x)))
"""
LOAD = """
import sys, torch
module, x, expected = torch.load(sys.argv[1], weights_only=False)
assert torch.equal(module(x), expected)
print(type(module).__module__, type(module).__name__)
"""


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)

    def forward(self, x):
        return self.down(self.act(self.up(x)))


def test_a_class_of_the_user_is_found_again_in_another_process(
    fresh_process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "users_blocks.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    import users_blocks

    module, x = users_blocks.Outer.MLP().eval(), torch.randn(3, 8)
    swap(module, strict=True)
    torch.save((module, x, module(x)), tmp_path / "module.pt")
    done = fresh_process(LOAD, "module.pt", cwd=tmp_path)
    assert done.stdout.split() == ["fastattn.swap.recognised", "MLP"], done.stderr
    (tmp_path / "users_blocks.py").write_text(SOURCE.replace("self.down(self", "1 + self.down(self"))
    done = fresh_process(LOAD, "module.pt", cwd=tmp_path)
    assert "install the version it was saved with" in done.stderr


def test_one_class_for_all_modules_and_copies() -> None:
    first, second = MLP(), MLP()
    for module in (first, second):
        swap(module)
    assert type(first) is type(second) is type(copy.deepcopy(first)) is type(pickle.loads(pickle.dumps(first)))
    assert type(first).__name__ == "MLP"
    assert issubclass(type(first), MLP)


def test_other_names_are_no_attributes() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'anything'"):
        getattr(recognised, "anything")  # noqa: B009


def test_a_subclass_with_the_same_forward_is_recognised_by_itself() -> None:
    class Derived(MLP):
        pass

    class Changed(MLP):
        def forward(self, x):
            return super().forward(x) * 2

    assert [row.action for row in plan(Derived()).rows] == ["swap"]
    (row,) = plan(Changed()).rows
    assert (row.action, row.reason) == ("left", "only the exact class MLP is swapped, this is a subclass of it")


def test_classes_that_would_notice_are_left() -> None:
    class Registry(nn.Module):
        found: ClassVar[list[type]] = []

        def __init_subclass__(cls) -> None:
            Registry.found.append(cls)

    class Registered(Registry):
        __init__, forward = MLP.__init__, MLP.forward

    class Wrapped(MLP):
        def __call__(self, *args):
            return super().__call__(*args) + 1

    class Meta(type):
        pass

    class OfMeta(MLP, metaclass=Meta):
        pass

    before = list(Registry.found)
    for module_class in (Registered, Wrapped, OfMeta):
        module = module_class.__new__(module_class)
        nn.Module.__init__(module)
        module.up, module.act, module.down = nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)
        assert not [row for row in plan(module).rows if row.action == "swap"], module_class
    assert Registry.found == before
