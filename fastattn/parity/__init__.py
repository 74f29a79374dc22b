"""Parity: the rule that every backend is held to, random cases, and the runner behind `fastattn verify`."""

from __future__ import annotations

from fastattn.parity.bound import ParityRow, parity
from fastattn.parity.report import VerifyReport
from fastattn.parity.rule import (
    Conditions,
    check_attention,
    check_encoder_layer,
    check_ffn,
    check_gated_ffn,
    check_linear_act,
    check_mask_histogram,
    check_norm,
    failures,
)
from fastattn.parity.run import verify

__all__ = [
    "Conditions",
    "ParityRow",
    "VerifyReport",
    "check_attention",
    "check_encoder_layer",
    "check_ffn",
    "check_gated_ffn",
    "check_linear_act",
    "check_mask_histogram",
    "check_norm",
    "failures",
    "parity",
    "verify",
]
