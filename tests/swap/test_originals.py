"""Recipes that stand in for a function of transformers know which one they were written for."""

from __future__ import annotations

import functools
import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType

import pytest

transformers = pytest.importorskip("transformers")

from fastattn.swap.originals import KNOWN, fingerprint, original, unknown  # noqa: E402

# The first and the last version that the table holds.
IS_READ = (5, 20) <= tuple(map(int, re.findall(r"\d+", transformers.__version__)[:2])) <= (5, 24)


def test_the_originals_of_the_versions_that_were_read_are_known() -> None:
    """Of another version this prints what the table would have to hold, once the recipes are right for it."""
    for name in KNOWN:
        original(*name.split(":"))
    others = {name: fingerprint(function) for name, function in unknown.items()}
    print("\n".join(f"{name}: {found}" for name, found in others.items()))
    assert not others or not IS_READ


PLAIN = """
STEP = 1

class Holder:
    factor = 1

def same(function):
    return function

def helper(x):
    return x + STEP

def function(x, by=2):
    y = helper(x)
    return y * by * Holder.factor
"""
SAYS_MORE = '''
STEP = 1

class Holder:
    factor = 1

def same(function):
    return function

def helper(x: int) -> int:
    """One more."""
    return x + STEP

def function(x: int, by: int = 2) -> int:
    """The same."""
    # and more
    y: int = helper(x)
    return y * by * Holder.factor
'''


@pytest.fixture
def function_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], FunctionType]:
    """`function` of a file that holds a source."""
    return functools.partial(_function_of, tmp_path, monkeypatch)


def _function_of(folder: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> FunctionType:
    name = f"read_{len(list(folder.iterdir()))}"
    file = folder / f"{name}.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    function: FunctionType = module.function
    return function


def test_a_fingerprint_is_of_what_is_computed(function_of) -> None:
    def of(source: str) -> str | None:
        return fingerprint(function_of(source))

    plain = of(PLAIN)
    assert plain is not None
    assert of(SAYS_MORE) == plain
    changes = (
        ("by=2", "by=3"),
        ("y * by", "y + by"),
        ("x + STEP", "x - STEP"),
        ("STEP = 1", "STEP = 2"),
        ("factor = 1", "factor = 2"),
        ("def function", "@same\ndef function"),
    )
    for change in changes:
        assert of(PLAIN.replace(*change)) != plain, change


def test_what_another_package_wraps_is_not_the_original(function_of) -> None:
    function = function_of(PLAIN)

    @functools.wraps(function)
    def tripled(x: int) -> int:
        return 3 * int(function(x))

    assert fingerprint(function) is not None
    assert fingerprint(tripled) is None


def test_a_lambda_beside_another_statement_has_no_fingerprint(function_of) -> None:
    """Its lines are not it alone: replaced so, a known function must not end every swap."""
    assert fingerprint(function_of("function = lambda x: x + 1; other = 2")) is None


def test_without_its_source_a_function_has_no_fingerprint() -> None:
    scope: dict[str, FunctionType] = {}
    exec("def function(x):\n    return x", scope)
    assert fingerprint(scope["function"]) is None


AFTER_A_RELEASE = """
import torch, transformers
from fastattn.swap import swap
from fastattn.swap.originals import KNOWN, why_unknown

for name in KNOWN:
    if "LongformerSelfAttention" in name or "models.bert." in name:
        KNOWN[name] = ("of an older release",)

shared = {"vocab_size": 32}
torch.manual_seed(0)
shared |= {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
longformer = transformers.LongformerModel(transformers.LongformerConfig(attention_window=[4], **shared)).eval()
bert = transformers.BertModel(transformers.BertConfig(**shared)).eval()
ids = torch.arange(8)[None] + 2
for model in (longformer, bert):
    expected = model(input_ids=ids).last_hidden_state
    report = swap(model)
    assert torch.allclose(model(input_ids=ids).last_hidden_state, expected, atol=1e-5)
    for row in report.rows:
        if "ttention" in row.class_name:
            print(row.class_name, row.action, row.kernel, row.reason, sep="|")
print(why_unknown(transformers.models.bert.modeling_bert.BertLayer.forward))
"""


@pytest.mark.skipif(not IS_READ, reason="written out, other versions' attention is swapped all the same")
def test_an_original_that_a_release_changed_is_left_alone_and_named() -> None:
    """But for what else the class is: attention that asks the interface, or is written out, needs no original."""
    ran = subprocess.run([sys.executable, "-c", AFTER_A_RELEASE], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    rows = [line.split("|") for line in ran.stdout.splitlines()]
    version = transformers.__version__
    changed = f"transformers {version} has another BertLayer.forward than fastattn knows"
    assert [changed] in rows
    assert ["LongformerSelfAttention", "swapped", "attention", ""] in rows
    assert ["BertSelfAttention", "swapped", "attention", ""] in rows
