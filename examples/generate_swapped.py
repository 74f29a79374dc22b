"""Generates text with a causal language model of transformers on the CPU, before and after `fastattn.swap`.

    pip install 'fastattn[cli]' transformers && python examples/generate_swapped.py --model llama --dtype bfloat16

The weights are random: what the model says means nothing, what it costs does not depend on that. Reading is one
forward pass over the prompts, generating adds tokens to them one at a time over the cache. The model and the same one
swapped take turns; medians are printed. In float32 both must choose the same tokens, in halves their logits must agree
as well as rounding allows. With --prepack the swapped one's weights are kept packed (`fastattn.prepack`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from enum import Enum
from typing import Annotated

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fastattn

VOCABULARY = 8192
TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}


class Model(str, Enum):
    llama = "llama"
    gpt2 = "gpt2"


class DType(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def build(model: Model, layers: int, width: int, dtype: torch.dtype) -> nn.Module:
    """A model with heads of 64, four of them to each head of keys in the Llama."""
    torch.manual_seed(0)
    heads = width // 64
    if model is Model.gpt2:
        config = transformers.GPT2Config(n_layer=layers, n_embd=width, n_head=heads, **TOKENS)
        return transformers.GPT2LMHeadModel(config).eval().to(dtype)
    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        **TOKENS,
    )
    return transformers.LlamaForCausalLM(config).eval().to(dtype)


def kept(model: nn.Module) -> fastattn.Prepacked:
    """Packed weights belong to the model's memory: they are there whenever it is swapped again."""
    report = fastattn.swap(model)
    handle = fastattn.prepack(model)
    report.undo()
    return handle


def compare(model: nn.Module, work: Callable[[], Tensor], repeats: int) -> tuple[float, float, Tensor, Tensor]:
    """Median seconds of the model and of the swapped one, in turns, and what both gave."""
    times: tuple[list[float], list[float]] = ([], [])
    results: list[Tensor] = [torch.empty(0), torch.empty(0)]
    for turn in range(repeats + 1):  # the first one warms up
        for which in (0, 1):
            report = fastattn.swap(model) if which else None
            start = time.perf_counter()
            results[which] = work()
            if turn:
                times[which].append(time.perf_counter() - start)
            if report is not None:
                report.undo()
    return statistics.median(times[0]), statistics.median(times[1]), results[0], results[1]


def main(
    model: Annotated[Model, typer.Option(help="The kind of model.")] = Model.llama,
    dtype: Annotated[DType, typer.Option(help="The dtype of weights and states.")] = DType.float32,
    layers: Annotated[int, typer.Option(min=1, help="Layers of the model.")] = 8,
    width: Annotated[int, typer.Option(min=64, help="Features of a token, a multiple of 64.")] = 1024,
    prompt: Annotated[int, typer.Option(min=2, help="Tokens of a prompt.")] = 128,
    new: Annotated[int, typer.Option(min=1, help="Tokens to generate for each prompt.")] = 32,
    batch: Annotated[list[int], typer.Option(min=1, help="Prompts at once; several may be given.")] = [1, 4],  # noqa: B006
    repeats: Annotated[int, typer.Option(min=1, help="Timed turns.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = torch.get_num_threads(),
    prepack: Annotated[bool, typer.Option("--prepack", help="Keep the swapped model's weights packed.")] = False,
) -> None:
    """Times reading and generating with a random model, before and after a swap."""
    torch.set_num_threads(threads)
    network = build(model, layers, width, getattr(torch, dtype.value))
    handle = kept(network) if prepack else None
    size = sum(p.numel() for p in network.parameters()) / 1e6
    table = Table(title=f"{model.value}, {size:.0f} million parameters, {dtype.value}, {threads} threads")
    for column in ("prompts x tokens", "work", "before, ms", "swapped, ms", "times faster"):
        table.add_column(column, justify="left" if column == "work" else "right")
    worst = 0.0
    for count in batch:
        ids = torch.randint(2, VOCABULARY, (count, prompt))
        mask = torch.ones_like(ids)

        def read(ids: Tensor = ids, mask: Tensor = mask) -> Tensor:
            with torch.inference_mode():
                return network(input_ids=ids, attention_mask=mask).logits

        def generate(ids: Tensor = ids, mask: Tensor = mask) -> Tensor:
            return network.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)

        for name, work in (("read", read), (f"generate {new}", generate)):
            before, after, original, swapped = compare(network, work, repeats)
            if name == "read":
                worst = max(worst, float((swapped - original).abs().max() / original.abs().max()))
            elif dtype is DType.float32 and not torch.equal(original, swapped):
                raise SystemExit("the swapped model chose other tokens")
            row = (f"{count} x {prompt}", name, f"{before * 1e3:.0f}", f"{after * 1e3:.0f}", f"{before / after:.2f}")
            table.add_row(*row)
    console = Console()
    console.print(table)
    console.print(f"logits differ by {worst:.1e} of the largest")
    if handle is not None:
        console.print(f"{handle.bytes / 2**20:.0f} MiB were kept packed")
    if worst > {DType.float32: 1e-4, DType.bfloat16: 5e-2, DType.float16: 1e-2}[dtype]:
        raise SystemExit("the swapped model's logits differ by more than rounding")


if __name__ == "__main__":
    typer.run(main)
