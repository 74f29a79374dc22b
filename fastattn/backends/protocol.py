"""What a backend offers. Each module `fastattn.backends.<name>` has these names, checked by nothing but tests.

What the operators promise to a backend, and ask of it:
- Arguments are valid and agree in shape, dtype and device; a choice by `not_supported_reasons` came before.
- Attention: q, k, v, out and grad_out have a contiguous last dimension and any other strides, stride 0 included. The
  dense bias is 4-D, each dimension 1 or full, with any strides. The dense mask is expanded to (B, Hq, Sq, Skv). The
  mask's other tensors (`LoweredMask`, its blocks too), those of a bias by distance, sinks, lse and grad_lse are
  contiguous; sinks may have any float dtype. Several batch entries may point at the same blocks.
- A packed batch (`Packed`): q, out and their gradients are (1, Hq, T, D), k and v (1, Hkv, T, D), lse (1, Hq, T).
  Everything else is that of a padded batch of B = cu_seqlens.numel() - 1 entries with Sq = max_len_q and Skv =
  max_len_k, in coordinates within each sequence: masks, biases, dropout's counters. Keys past a sequence's length are
  not there. Rows of q in no sequence, or past max_len_q of theirs, get out 0, lse -inf and gradient 0. cu_seqlens may
  reach past the tensors; nothing outside of them is touched.
- Norm and linear functions and the encoder layer get contiguous tensors only, but for a dense mask, and for weights of
  linear functions: their rows or their columns are contiguous, each behind the end of the one before.
- A backend allocates its results, does not keep its arguments and does not write to them. A result that is not asked
  for is an empty (0,) tensor of the dtype it would have; where nothing is saved for a backward, several calls may share
  one. No two results share memory.
- "Accumulate dtype" is float32, but float64 for float64 inputs.
- Sizes may be 0. Values of device tensors (lengths, ranges, seeds) are not read on the host by a GPU backend.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fastattn.biases.lowered import LoweredBias
from fastattn.masks.lowered import LoweredMask
from fastattn.packed import Packed
from fastattn.problems import Problem


class Backend(Protocol):
    """The module protocol. Activations: none, relu, gelu, gelu_tanh, silu, quick_gelu, relu2."""

    NAME: str

    def unavailable_reason(self) -> str | None:
        """Why this machine cannot run the backend at all, or None. Cheap; the answer does not change."""

    def not_supported_reasons(self, problem: Problem) -> list[str]:
        """Why this problem is refused, one sentence each; empty when it runs."""

    def attention_forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: LoweredMask,
        bias: LoweredBias,
        packed: Packed | None,
        sinks: Tensor | None,
        dropout_seed: Tensor | None,
        scale: float,
        softcap: float,
        dropout_p: float,
    ) -> tuple[Tensor, Tensor]:
        """out (B, Hq, Sq, Dv) in q's dtype, a transposed view of (B, Sq, Hq, Dv) memory; lse (B, Hq, Sq), accumulate
        dtype.

        q (B, Hq, Sq, D), k (B, Hkv, Skv, D), v (B, Hkv, Skv, Dv); softcap 0 is off; dropout_seed int64 of one element.
        """

    def attention_backward(
        self,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        mask: LoweredMask,
        bias: LoweredBias,
        packed: Packed | None,
        sinks: Tensor | None,
        dropout_seed: Tensor | None,
        scale: float,
        softcap: float,
        dropout_p: float,
        bias_requires_grad: bool,
        table_requires_grad: bool,
        slopes_requires_grad: bool,
        sinks_requires_grad: bool,
        deterministic: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """dq, dk, dv as `torch.empty_like` lays them out; dbias, dtable, dslopes of the shapes of the bias' dense,
        table and slopes, and dsinks (Hq,), in the accumulate dtype."""

    def attention_decode(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        cache_lengths: Tensor,
        block_table: Tensor | None,
        mask: LoweredMask,
        bias: LoweredBias,
        sinks: Tensor | None,
        scale: float,
        softcap: float,
    ) -> tuple[Tensor, Tensor]:
        """out and lse as attention_forward, for query i at position cache_lengths[b] - Sq + i; inference only.

        k_cache (B, Hkv, S, D), or with block_table (B, n) pages (pages, page size, Hkv, D); v_cache likewise. Of the
        mask only band_left, band_right (about that position) and intervals are given; the dense bias' last dimension
        is 1 or S, and distances are from that position.
        """

    def norm_forward(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        dropout_seed: Tensor | None,
        kind: str,
        eps: float,
        offset: float,
        dropout_p: float,
        save_statistics: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """y like x; z in the promoted dtype of x and residual, empty where there is neither residual nor dropout;
        mean (rows,), empty for "rms", and rstd (rows,), both empty unless save_statistics. Statistics in the
        accumulate dtype of z. kind is "layer" or "rms"."""

    def norm_backward(
        self,
        grad_y: Tensor,
        grad_z: Tensor | None,
        z: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        dropout_seed: Tensor | None,
        kind: str,
        offset: float,
        dropout_p: float,
        x_dtype: torch.dtype,
        dweight_dtype: torch.dtype | None,
        dbias_dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dx in x_dtype; dresidual in z's dtype, empty where dropout_p is 0 and x_dtype is z's (it then equals dx);
        dweight and dbias (N,), each summed in the accumulate dtype and rounded once to its dtype, empty for None.
        dz = norm'(grad_y) + grad_z, dx = dropout'(dz), dresidual = dz."""

    def linear_act_forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save_pre: bool
    ) -> tuple[Tensor, Tensor]:
        """y = act(x W^T + b) (..., N), and pre = x W^T + b in x's dtype: empty unless save_pre and activation is not
        none."""

    def linear_act_backward(
        self,
        grad_y: Tensor,
        x: Tensor,
        weight: Tensor,
        pre: Tensor,
        activation: str,
        x_requires_grad: bool,
        weight_requires_grad: bool,
        bias_requires_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dx, dweight, dbias in x's dtype."""

    def ffn_forward(
        self,
        x: Tensor,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        dropout_seed: Tensor | None,
        activation: str,
        dropout_p: float,
        save_pre: bool,
    ) -> tuple[Tensor, Tensor]:
        """y = dropout(act(x w1^T + b1)) w2^T + b2 (..., N), and pre (..., H) before the activation, empty unless
        save_pre (for activation none too). Dropout counts rows over all leading dimensions."""

    def ffn_backward(
        self,
        grad_y: Tensor,
        x: Tensor,
        w1: Tensor,
        w2: Tensor,
        pre: Tensor,
        dropout_seed: Tensor | None,
        activation: str,
        dropout_p: float,
        x_requires_grad: bool,
        w1_requires_grad: bool,
        b1_requires_grad: bool,
        w2_requires_grad: bool,
        b2_requires_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """dx, dw1, db1, dw2, db2 in x's dtype."""

    def gated_ffn_forward(
        self,
        x: Tensor,
        w_gate: Tensor,
        b_gate: Tensor | None,
        w_up: Tensor,
        b_up: Tensor | None,
        w_down: Tensor,
        b_down: Tensor | None,
        dropout_seed: Tensor | None,
        activation: str,
        dropout_p: float,
        save_pre: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """y = dropout(act(gate) * up) w_down^T + b_down (..., N); gate and up (..., H), empty unless save_pre."""

    def gated_ffn_backward(
        self,
        grad_y: Tensor,
        x: Tensor,
        w_gate: Tensor,
        w_up: Tensor,
        w_down: Tensor,
        gate: Tensor,
        up: Tensor,
        dropout_seed: Tensor | None,
        activation: str,
        dropout_p: float,
        x_requires_grad: bool,
        w_gate_requires_grad: bool,
        b_gate_requires_grad: bool,
        w_up_requires_grad: bool,
        b_up_requires_grad: bool,
        w_down_requires_grad: bool,
        b_down_requires_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """dx, dw_gate, db_gate, dw_up, db_up, dw_down, db_down in x's dtype."""

    def encoder_layer_forward(
        self,
        x: Tensor,
        wq: Tensor,
        bq: Tensor | None,
        wk: Tensor,
        bk: Tensor | None,
        wv: Tensor,
        bv: Tensor | None,
        wo: Tensor,
        bo: Tensor | None,
        norm1_weight: Tensor | None,
        norm1_bias: Tensor | None,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        norm2_weight: Tensor | None,
        norm2_bias: Tensor | None,
        cu_seqlens: Tensor | None,
        mask: LoweredMask,
        heads: int,
        scale: float,
        activation: str,
        norm_first: bool,
        eps1: float,
        eps2: float,
    ) -> Tensor:
        """y like x, contiguous: `fastattn.reference.encoder_layer`.

        x (B, S, E), or (T, E) with cu_seqlens int32 (B + 1) and no mask. wq, wk, wv, wo (E, E), w1 (F, E), w2 (E, F) in
        x's dtype; norm weights and biases in x's dtype or float32.
        """
