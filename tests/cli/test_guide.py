"""The user guide's Python runs from top to bottom, and the links and commands in it exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastattn.cli.app import app

CHECKOUT = Path(os.environ.get("FASTATTN_CHECKOUT", Path(__file__).resolve().parents[2]))
GUIDE = CHECKOUT / "docs" / "guide.md"

pytestmark = pytest.mark.skipif(not GUIDE.exists(), reason="FASTATTN_CHECKOUT does not name a checkout")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def test_the_python_runs_in_one_go(tmp_path: Path) -> None:
    """In a process of its own: it defines classes and registers an attention."""
    pytest.importorskip("transformers")
    script = tmp_path / "guide.py"
    script.write_text("\n".join(blocks("python")), encoding="utf-8")
    environment = {**os.environ, "MPLBACKEND": "Agg"}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "of the pairs are visible" in done.stdout and "fastattn plan for Sequential" in done.stdout


def test_headings_that_it_links_to_exist() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    headings = {heading.lower().replace(" ", "-") for heading in re.findall(r"^## (.*)$", text, flags=re.MULTILINE)}
    assert set(re.findall(r"\]\(#([a-z-]+)\)", text)) == headings
    for file in re.findall(r"\]\(([a-z./]+\.md)", text):
        assert (GUIDE.parent / file).exists(), file


def test_commands_that_it_names_exist() -> None:
    found = re.findall(r"^fastattn (\w+)(?: (\w+))?", "\n".join(blocks("sh")), flags=re.MULTILINE)
    assert {command for command, _ in found} == {"verify", "bench"}
    for command, part in found:
        arguments = [command, part, "--help"] if command == "bench" else [command, "--help"]
        assert CliRunner().invoke(app, arguments).exit_code == 0, arguments
