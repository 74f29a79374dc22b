"""Blocks of masks, built between the graphs of torch.compile. Importing this imports Dynamo, which takes most of a
second: it is imported where a graph is traced."""

from __future__ import annotations

import torch

from fastattn.masks.lowering import remembered_blocks

blocks_outside = torch.compiler.disable(remembered_blocks)
