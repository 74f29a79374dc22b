"""Attention in Triton: mask.py (the lowered mask on tiles), tile.py (what forward and backward share), forward, backward."""
