"""The way from a checkout to the Triton kernels in kernels/, beside this package.

A wheel holds that folder itself as fastattn.kernels and leaves this file out. Giving the module a `__path__` makes it a
package in every respect, on any file system, with no link and no import hook.
"""

from __future__ import annotations

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parent.parent / "kernels")]
