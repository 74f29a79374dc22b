"""Pictures: what they show, how they are labelled, and what is said without matplotlib."""

from __future__ import annotations

import sys

import pytest

from fastattn.masks import BigBird, Causal, GlobalTokens, KeyLengths, PerHead, SlidingWindow, Strided

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def test_a_picture_shows_the_tiles_and_says_what_it_shows():
    mask = Causal() & SlidingWindow(100, 0) | GlobalTokens(64)
    axes = mask.plot(300, 640)
    assert axes.get_xlabel() == "key" and axes.get_ylabel() == "query"
    assert axes.get_title().replace("\n", " ") == repr(mask)
    (image,) = axes.get_images()
    tiles = mask.tiles(300, 640)[0, 0].numpy()
    assert (image.get_array() == tiles).all()
    assert axes.get_xlim() == (0, 640) and axes.get_ylim() == (300, 0)
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    shares = [100 * (tiles == state).mean() for state in (0, 1, 2)]
    assert names == [f"{name} {share:.1f} %" for name, share in zip(("empty", "partial", "full"), shares, strict=True)]


def test_it_draws_on_given_axes_and_names_the_head():
    figure, axes = plt.subplots()
    assert PerHead([Causal(), Strided(64)]).plot(200, 200, axes, head=1) is axes
    assert axes.get_title().endswith("(head 1)")
    KeyLengths([3, 5]).plot(10, 10, axes, entry=1)
    assert axes.get_title().endswith("(batch entry 1)")
    figure.canvas.draw()
    with pytest.raises(IndexError, match="head=2 is not one of the 2 that the mask has: pass 0 to 1"):
        PerHead([Causal(), Strided(64)]).plot(200, 200, axes, head=2)


def test_a_long_text_is_broken_into_lines():
    mask = BigBird(64, 3, 1, 2) & Causal() | SlidingWindow(100, 100) & ~GlobalTokens(3) | Strided(1000) & Causal()
    title = mask.plot(64, 64).get_title()
    assert max(map(len, title.split("\n"))) <= 80 and title.replace("\n", " ") == repr(mask)


def test_empty_lengths_are_drawn():
    for shape in ((0, 100), (100, 0), (0, 0)):
        Causal().plot(*shape).figure.canvas.draw()


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match="pip install 'fastattn\\[plot\\]'"):
        Causal().plot(10, 10)
