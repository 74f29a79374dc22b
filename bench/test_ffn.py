"""The ffn suite under pytest-benchmark; see conftest.py."""

from __future__ import annotations

from collections.abc import Callable


def test_ffn(timed: Callable[[], None]) -> None:
    timed()
