"""Which functions are copies of each other."""

from __future__ import annotations

from types import FunctionType

from fastattn.swap.code import is_copy


def define(source: str, **names: object) -> FunctionType:
    """The function f of a module of this source."""
    exec(source, names)
    found = names["f"]
    assert isinstance(found, FunctionType)
    return found


ORIGINAL = "def f(x, y=1):\n    return [helper(i) for i in x] + [y]\n\ndef helper(i):\n    return i + K\nK = 2\n"


def test_copies() -> None:
    original = define(ORIGINAL)
    assert is_copy(original, original)
    assert is_copy(define(ORIGINAL), original)
    assert is_copy(
        define("import os\n\n\n" + ORIGINAL.replace("def f(x, y=1)", "def f(x: int, y: int = 1) -> list")), original
    )


def test_others() -> None:
    original = define(ORIGINAL)
    for old, new in (
        ("y=1", "y=2"),
        ("+ [y]", "+ [x]"),
        ("+ [y]", "+ [y, y]"),
        ("y=1", "y=1.0"),
        ("y=1", "y=True"),
        ("K = 2", "K = 2.0"),
        ("i + K", "i - K"),  # of a function that it calls
        ("K = 2", "K = 3"),
        ("helper(i) for", "helper(i + 1) for"),  # in code within its code
    ):
        assert not is_copy(define(ORIGINAL.replace(old, new)), original), (old, new)
    assert not is_copy(len, original)
    assert not is_copy(original, None)


def test_closures_are_compared() -> None:
    def make(factor: object) -> FunctionType:
        def f(x):
            return x * factor

        return f

    assert is_copy(make(2), make(2))
    assert not is_copy(make(2), make(3))
    assert not is_copy(make([]), make([]))  # each has a list of its own


def test_functions_that_call_themselves() -> None:
    source = "def f(n):\n    return n and f(n - 1)"
    assert is_copy(define(source), define(source))


def test_what_cannot_be_compared_is_no_copy() -> None:
    import torch

    def f(x, y=torch.ones(2)):  # noqa: B008
        return x + y

    def g(x, y=torch.ones(2)):  # noqa: B008
        return x + y

    assert is_copy(f, f)
    assert not is_copy(f, g)
