"""Blocks of masks, built between the graphs of torch.compile. Importing this imports Dynamo, which takes most of a
second: it is imported where a graph is traced."""

from __future__ import annotations

import inspect

import torch

from fastattn.masks.lowering import remembered_blocks

_REASON = "a mask needs blocks, whose building reads values: pass mask.lower(...), called before the graph"
_says_why = "reason" in inspect.signature(torch.compiler.disable).parameters  # not in torch 2.7

blocks_outside = torch.compiler.disable(remembered_blocks, **({"reason": _REASON} if _says_why else {}))
