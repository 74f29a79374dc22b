"""The short way of small CPU calls, and which calls it answered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from fastattn.functional import direct


class Taken:
    """The module of the short way, which notes the calls that it answered."""

    def __init__(self, module: Any) -> None:
        self._module, self.answered = module, list[str]()

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            result = getattr(self._module, name)(*args)
            if result is not None:
                self.answered.append(name.removeprefix("direct_"))
            return result

        return call


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the functions that answered; "" stands for none of them."""
    module = Taken(direct._opened())
    monkeypatch.setattr(direct, "_opened", lambda: module)
    yield module.answered
