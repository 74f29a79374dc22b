"""The printed table, the JSON, and counting."""

from __future__ import annotations

import io
import json
import logging
import threading

import pytest
import torch
from torch import nn

import fastattn
from fastattn.swap import SwapReport, swap
from fastattn.swap.report import Row


def norms(count: int) -> nn.Sequential:
    return nn.Sequential(*(nn.LayerNorm(4) for _ in range(count)))


def test_layers_that_differ_by_number_share_a_line() -> None:
    rows = [Row(f"layer.{i}.norm", "LayerNorm", "swapped", "layer_norm", calls=2) for i in (0, 1, 2, 5)]
    rows.append(Row("layer.3.norm", "MyNorm", "left", reason="no recipe for class MyNorm"))
    module = nn.LayerNorm(4)
    text = str(SwapReport("Model", rows, applied=True, swapped_modules={row.path: module for row in rows[:4]}))
    assert text.splitlines() == [
        "fastattn swap of Model: 4 modules swapped, 0 fused into them, 1 left alone",
        "path                class      action   kernel       calls  reason",
        "------------------  ---------  -------  ----------  ------  --------------------------",
        "layer.{0-2,5}.norm  LayerNorm  swapped  layer_norm  2 each",
        "layer.3.norm        MyNorm     left                         no recipe for class MyNorm",
    ]


def test_json_holds_every_row(tiny_bert, batch) -> None:
    model = tiny_bert()
    report = swap(model)
    with report.counting(), torch.no_grad():
        model(**batch)
    content = json.loads(report.to_json())
    assert content["model"] == "BertModel"
    assert content["applied"] is True
    assert [row["path"] for row in content["rows"]] == [row.path for row in report.rows]
    assert set(content["rows"][0]) == {"path", "class", "action", "kernel", "reason", "calls", "fallbacks", "choices"}
    assert all(row["calls"] == 1 for row in content["rows"] if row["action"] == "swapped")


def test_rich_prints_the_same_cells(tiny_bert) -> None:
    console_module = pytest.importorskip("rich.console")
    report = swap(tiny_bert())
    report.rows[0].reason = "of class [red]Own[/red]"  # rich would take it for markup
    console = console_module.Console(width=200, file=io.StringIO(), record=True)
    console.print(report)
    text = console.export_text()
    words = ("encoder.layer.{0-1}.attention.self", "dropout_add_layer_norm", "11 modules swapped")
    for word in (*words, report.rows[0].reason):
        assert word in text
        assert word in str(report)


def test_nothing_is_counted_outside_the_block() -> None:
    model = norms(2)
    report = swap(model)
    x = torch.zeros(1, 4)
    model(x)
    assert [row.calls for row in report.rows] == [None, None]
    with report.counting() as same:
        assert same is report
        model(x)
        model(x)
        model[0](x)
    model(x)
    assert [row.calls for row in report.rows] == [3, 2]
    with report.counting():
        model[1](x)
    assert [row.calls for row in report.rows] == [0, 1]
    assert not report.all_called
    assert "0 calls: the module was not reached" in str(report)


def test_two_reports_count_at_once() -> None:
    first, second = norms(1), norms(1)
    one, two = swap(first), swap(second)
    x = torch.zeros(1, 4)
    with one.counting(), two.counting():
        first(x)
        first(x)
        second(x)
    assert (one.rows[0].calls, two.rows[0].calls) == (2, 1)


def test_calls_of_other_threads_count() -> None:
    model = norms(1)
    report = swap(model)
    x = torch.zeros(1, 4)

    def work() -> None:
        for _ in range(200):
            model(x)

    with report.counting():
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert report.rows[0].calls == 800


def test_counting_ends_when_the_block_raises() -> None:
    model = norms(1)
    report = swap(model)
    with pytest.raises(ZeroDivisionError), report.counting():
        model(torch.zeros(1, 4))
        raise ZeroDivisionError
    model(torch.zeros(1, 4))
    assert report.rows[0].calls == 1


def test_fallbacks_are_counted_with_their_reason_and_printed() -> None:
    model = norms(1).double()
    report = swap(model)
    with report.counting():
        model(torch.zeros(1, 4, dtype=torch.float64))
        model(torch.zeros(1, 4, dtype=torch.float64))
    assert report.rows[0].fallbacks == {"the input is float64": 2}
    assert "2 x the input is float64" in str(report)


def test_a_fallback_warns_once() -> None:
    model = norms(2).double()
    swap(model)
    x = torch.zeros(1, 4, dtype=torch.float64)
    with pytest.warns(UserWarning, match="LayerNorm runs original code where the input is float64") as caught:
        model(x)
        model(x)
    assert len(caught) == 1


def test_counting_does_not_recompile_and_compiled_modules_are_not_counted() -> None:
    model = norms(2)
    report = swap(model)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model.compile(backend=backend, fullgraph=True)
    x = torch.zeros(1, 4)
    with torch.no_grad():
        model(x)
        with report.counting():
            model(x)
    assert len(graphs) == 1
    assert [row.calls for row in report.rows] == [None, None]
    assert "-" in str(report).splitlines()[3].split()
    assert not report.all_called


def test_a_swap_that_found_nothing_is_no_plan() -> None:
    model = norms(1)
    swap(model)
    assert str(swap(model)).startswith("fastattn swap of Sequential: 0 modules swapped")


def test_what_torch_runs_by_choice_is_counted_apart() -> None:
    """A small LayerNorm on a CPU, for which torch's kernel is as fast."""
    model = norms(1)
    report = swap(model)
    with report.counting(), torch.no_grad():
        model(torch.zeros(1, 4))
    row = report.rows[0]
    assert (row.calls, row.fallbacks, list(row.choices.values()), report.all_called) == (1, {}, [1], True)
    assert "1 x torch's kernel is as fast: a plain LayerNorm on a CPU, of so few elements" in str(report)


@pytest.mark.parametrize("way", ("strict", "backend", "use_backend"))
def test_a_fallback_is_forbidden(way: str) -> None:
    model = norms(1).double()
    x = torch.zeros(1, 4, dtype=torch.float64)
    report = swap(model, strict=way == "strict", backend="cpu" if way == "backend" else None)
    remedy = "Swap with strict=False" if way == "strict" else "Pass backend=None"
    with fastattn.use_backend("cpu" if way == "use_backend" else None):
        with pytest.raises(fastattn.NotSupported, match=f"(?s)LayerNorm.*the input is float64.*{remedy}"):
            model(x)
        report.undo()
        model(x)


def test_a_fallback_is_logged_and_warned_of_where_it_was_called(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FASTATTN_LOG", "1")
    model = norms(1).double()
    swap(model)
    with caplog.at_level(logging.WARNING, logger="fastattn"), pytest.warns(fastattn.BackendWarning) as caught:
        for _ in range(2):
            model(torch.zeros(1, 4, dtype=torch.float64))
    assert [record.getMessage() for record in caplog.records] == [
        "LayerNorm: original code runs: the input is float64"
    ] * 2
    assert [warning.filename for warning in caught] == [__file__]
