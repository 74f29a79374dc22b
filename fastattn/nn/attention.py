"""MultiheadAttention: torch.nn's, on fastattn.attention and fastattn.linear_act."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.functional import attention, linear_act
from fastattn.functional.plain import AS_FAST, on_torch, torch_is_as_fast
from fastattn.nn.attention_masks import AttentionMasks, read_masks, why_not_masks
from fastattn.nn.attention_weights import attention_by_weights, kernel_and_weights
from fastattn.nn.checks import why_not_head_dim, why_not_input, why_not_tensor
from fastattn.nn.counting import note_call, note_choice, note_fallback
from fastattn.nn.fused import Fused
from fastattn.ops.library import tracks_gradients

_WEIGHTS = "the attention weights are asked for (need_weights=True)"
_FEW_SCORES = 2**17
"""Up to so many scores torch's forward takes 0.45 to 0.84 of our time for output and weights in inference; of more
0.8 to 1.7 times as long (one core of an Intel Xeon with AMX, float32, heads of 32 to 64, 2026-11-29)."""


class _Parameters(NamedTuple):
    """The module's tensors, each read once per call: reading a parametrised one computes it. in_proj: the packed
    weight, or those of query, key and value."""

    in_proj: tuple[Tensor, ...]
    in_proj_bias: Tensor | None
    bias_k: Tensor | None
    bias_v: Tensor | None
    out_proj: Tensor
    out_proj_bias: Tensor | None


class MultiheadAttention(Fused, nn.MultiheadAttention):
    """nn.MultiheadAttention: arguments, attributes, initialisation and state_dict are torch's, and so are the results.

        q, k, v = query W_q^T + b_q, key W_k^T + b_k, value W_v^T + b_v, each split into H heads of D = E / H
        weights = dropout(softmax(q k^T / sqrt(D) + masks));    output = concat(weights v) W_o^T + b_o

    Shapes, for batch B, queries L, keys S and width E: query (L, B, E), key (S, B, kdim) and value (S, B, vdim), with
    batch_first (B, L, E) and so on, without a batch (L, E) and so on; float32, bfloat16 or float16. attn_mask (L, S)
    or (B*H, L, S) and key_padding_mask (B, S): bool, where True is *not* attended to, or float, which is added.
    Returns (output, weights): output in query's shape, contiguous; weights after dropout, (B, L, S) averaged over the
    heads or (B, H, L, S), without B for unbatched input; None with need_weights=False, the fastest way.

    One difference is by design. A query that sees no key gets attention 0, so that its output is the bias of out_proj,
    weights 0 and gradient 0, whatever hides the keys and in every mode; torch.nn gives NaN, or 0, by mode.

    is_causal=True says that attn_mask, which must be given, is the causal one. As in torch the mask is then not read,
    unless key_padding_mask is given too or need_weights is set.

    What the kernels do not take (float64, nested tensors, tensor subclasses, heads wider than 256) runs torch's
    forward, counted, and so does what torch refuses too, for its error. Weights are formed in torch operations; under
    dropout, and where nothing is differentiated, so is the attention, which is counted as well.
    """

    fastattn_original = nn.MultiheadAttention

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        note_call(self)
        reason = None
        if "attention" not in self.fastattn_off:
            own = self._read_parameters()
            reason = self._why_not(own, query, key, value, key_padding_mask, attn_mask, is_causal)
            if reason is None and self._torch_weighs_as_fast(query, key, key_padding_mask, need_weights, attn_mask):
                reason = _WEIGHTS
            if reason is None:
                causal = is_causal and key_padding_mask is None and not need_weights
                return self._attend(
                    own, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, causal
                )
        result: tuple[Tensor, Tensor | None] = super().forward(
            query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )
        if reason is not None:  # noted only now: of arguments that are wrong, torch's error is all there is to say
            note_fallback(self, reason)
        return result

    def _attend(
        self,
        own: _Parameters,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average_attn_weights: bool,
        causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = self._project(own, query, key, value)
        len_k = k.shape[2]
        k, v = self._append(own, k, v)
        masks = read_masks(
            attn_mask, key_padding_mask, heads=self.num_heads, causal=causal, extra_keys=k.shape[2] - len_k
        )
        dropout_p = self.dropout if self.training else 0.0
        weights = None
        if not need_weights:
            context = self._context(q, k, v, masks, dropout_p)
        elif dropout_p == 0.0 and tracks_gradients(q, k, v, masks.bias):
            context, weights = kernel_and_weights(q, k, v, masks, average_attn_weights, self.fastattn_backend)
        else:
            note_fallback(self, _WEIGHTS)
            context, weights = attention_by_weights(q, k, v, masks, average_attn_weights, dropout_p)
        output = self._linear(self._joined(context, query), own.out_proj, own.out_proj_bias)
        if weights is not None and query.dim() == 2:
            weights = weights.squeeze(0)
        return output, weights

    def _context(self, q: Tensor, k: Tensor, v: Tensor, masks: AttentionMasks, dropout_p: float) -> Tensor:
        mask, causal, backend = masks.visible(), masks.causal, self.fastattn_backend
        is_plain = (mask is None or causal) and masks.bias is None and dropout_p == 0.0
        if is_plain and torch_is_as_fast(q, k, v, causal, None, backend):
            note_choice(self, AS_FAST)
            return on_torch(q, k, v, causal, None)
        return attention(q, k, v, mask=mask, bias=masks.bias, dropout_p=dropout_p, backend=backend)

    # ---- projections -------------------------------------------------------------------------------------------------

    def _project(self, own: _Parameters, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """q (B, H, L, D), k and v (B, H, S, D): views of the projections, one product for inputs that are one
        tensor."""
        packed = len(own.in_proj) == 1
        inputs: list[tuple[Tensor, int]] = []
        for x in (query, key, value):
            if packed and inputs and inputs[-1][0] is x:
                inputs[-1] = (x, inputs[-1][1] + 1)
            else:
                inputs.append((x, 1))
        counts = [count for _, count in inputs]
        weights = _split(own.in_proj[0], counts, self.embed_dim) if packed else own.in_proj
        biases: Sequence[Tensor | None] = [None] * len(counts)
        if own.in_proj_bias is not None:
            biases = _split(own.in_proj_bias, counts, self.embed_dim)
        heads = []
        for (x, count), weight, bias in zip(inputs, weights, biases, strict=True):
            heads += self._heads(self._linear(x, weight, bias), count)
        return heads

    def _heads(self, x: Tensor, count: int) -> list[Tensor]:
        """`count` projections that lie side by side in the last dimension, each as a view (B, H, length, D)."""
        if x.dim() == 2:
            x = x.unsqueeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        if count == 1:
            return [x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)]
        x = x.unflatten(-1, (count, self.num_heads, self.head_dim))
        return [part.transpose(1, 2) for part in x.unbind(2)]

    def _joined(self, context: Tensor, query: Tensor) -> Tensor:
        """(B, H, L, D) -> query's shape; a view of what the kernel wrote, but for the order of L and B."""
        context = context.transpose(1, 2).flatten(2)
        if query.dim() == 2:
            return context.squeeze(0)
        return context if self.batch_first else context.transpose(0, 1)

    def _append(self, own: _Parameters, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The learned key and value of add_bias_kv, and the zeros of add_zero_attn, behind the others."""
        keys, values = [k], [v]
        batch, heads, _, dim = k.shape
        if own.bias_k is not None and own.bias_v is not None:
            keys.append(own.bias_k.view(1, heads, 1, dim).expand(batch, -1, -1, -1))
            values.append(own.bias_v.view(1, heads, 1, dim).expand(batch, -1, -1, -1))
        if self.add_zero_attn:
            zero = k.new_zeros(batch, heads, 1, dim)
            keys.append(zero)
            values.append(zero)
        return (k, v) if len(keys) == 1 else (torch.cat(keys, dim=2), torch.cat(values, dim=2))

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if "linears" in self.fastattn_off:
            return F.linear(x, weight, bias)
        return linear_act(x, weight, bias, backend=self.fastattn_backend)

    # ---- what the kernels can take -----------------------------------------------------------------------------------

    def _read_parameters(self) -> _Parameters:
        """By attribute, as torch reads them: what prunes or parametrises them is heeded, and out_proj is not called."""
        same, out_proj = self._qkv_same_embed_dim, self.out_proj
        in_proj = (self.in_proj_weight,) if same else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        return _Parameters(in_proj, self.in_proj_bias, self.bias_k, self.bias_v, out_proj.weight, out_proj.bias)

    def _why_not(
        self,
        own: _Parameters,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> str | None:
        """None where the kernels run this call."""
        reason = (
            why_not_input(query, self.fastattn_backend)
            or why_not_input(key, self.fastattn_backend)
            or why_not_input(value, self.fastattn_backend)
            or self._why_not_parameters(own, query)
            or self._why_not_shapes(query, key, value)
        )
        if reason is not None:
            return reason
        if is_causal and attn_mask is None:
            return "is_causal=True comes without an attn_mask"
        if self.training and self.dropout >= 1.0:
            return f"dropout is {self.dropout}"
        batch, len_q = self._batch_and_length(query)
        sizes = (batch, self.num_heads, len_q, self._batch_and_length(key)[1])
        return why_not_masks(attn_mask, key_padding_mask, query, sizes)

    def _torch_weighs_as_fast(
        self,
        query: Tensor,
        key: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
    ) -> bool:
        """Whether torch's forward gives output and weights faster: few scores on a CPU, in inference, without masks."""
        if not need_weights or attn_mask is not None or key_padding_mask is not None or not query.is_cpu:
            return False
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        (batch, len_q), (_, len_k) = self._batch_and_length(query), self._batch_and_length(key)
        return batch * self.num_heads * len_q * len_k <= _FEW_SCORES

    def _why_not_parameters(self, own: _Parameters, query: Tensor) -> str | None:
        autocast = torch.is_autocast_enabled(query.device.type)
        if any(weight is None for weight in (*own.in_proj, own.out_proj)):
            return "it has no in_proj_weight, or no out_proj.weight"
        tensors = [("in-projection weight", weight) for weight in own.in_proj]
        tensors += [(name, getattr(own, name)) for name in _Parameters._fields[1:]]
        for name, tensor in tensors:
            if tensor is None:
                continue
            reason = why_not_tensor(name, tensor)
            if reason is not None:
                return reason
            if tensor.device != query.device:
                return f"its {name} lies on {tensor.device.type}, the input on {query.device.type}"
            if tensor.dtype != query.dtype and not autocast:
                return f"its {name} has another dtype than the input"
        if (own.bias_k is None) != (own.bias_v is None):
            return "it has one of bias_k and bias_v"
        return why_not_head_dim(self.head_dim)

    def _why_not_shapes(self, query: Tensor, key: Tensor, value: Tensor) -> str | None:
        dims = query.dim()
        if dims not in (2, 3) or key.dim() != dims or value.dim() != dims:
            return "query, key and value are not all of 3 dimensions, or all of 2"
        widths = (self.embed_dim, self.kdim, self.vdim)
        fits = (query.shape[-1], key.shape[-1], value.shape[-1]) == widths and key.shape[:-1] == value.shape[:-1]
        if not fits or self._batch_and_length(query)[0] != self._batch_and_length(key)[0]:
            return "the shapes of query, key and value do not fit"
        if (key.dtype, key.device) != (query.dtype, query.device) or value.dtype != key.dtype:
            return "query, key and value differ in dtype or device"
        return None

    def _batch_and_length(self, x: Tensor) -> tuple[int, int]:
        if x.dim() == 2:
            return 1, x.shape[0]
        return (x.shape[0], x.shape[1]) if self.batch_first else (x.shape[1], x.shape[0])


def _split(tensor: Tensor, counts: list[int], rows: int) -> Sequence[Tensor]:
    """Consecutive blocks of counts[i] * rows rows, views; the tensor itself where there is one."""
    return [tensor] if len(counts) == 1 else tensor.split([count * rows for count in counts])
