"""Attention in Triton: forward.py, backward.py, tile.py (what both share), mask.py (the lowered mask on tiles)."""
