"""The packed suite under pytest-benchmark; see conftest.py."""

from __future__ import annotations

from collections.abc import Callable


def test_packed(timed: Callable[[], None]) -> None:
    timed()
