"""Times models of other libraries on the CPU, in inference, before and after `fastattn.swap`.

    pip install 'fastattn[cli]' timm open_clip_torch vit-pytorch x-transformers diffusers transformers openai-whisper
    python examples/other_libraries.py

The weights are random. A model and the same one swapped take turns; medians of the process's processor time are
printed, and what the answers differ by. What is not installed is said. `--left` lists the classes that swap left alone.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fastattn

Built = tuple[nn.Module, tuple[Tensor, ...]]


def timm(name: str, size: int = 224) -> Built:
    return importlib.import_module("timm").create_model(name, pretrained=False), (torch.randn(1, 3, size, size),)


def torchvision(name: str) -> Built:
    return importlib.import_module("torchvision.models").get_model(name, weights=None), (torch.randn(1, 3, 224, 224),)


def open_clip(name: str) -> Built:
    model = importlib.import_module("open_clip").create_model(name, pretrained=None)
    return model, (torch.randn(1, 3, 224, 224), torch.randint(1, 1000, (1, 77)))


def vit_pytorch(name: str) -> Built:
    kind = getattr(importlib.import_module("vit_pytorch"), name)
    options = {"image_size": 224, "patch_size": 16, "num_classes": 10, "dim": 384, "depth": 6, "heads": 6}
    return kind(mlp_dim=1536, **options), (torch.randn(1, 3, 224, 224),)


def x_transformers() -> Built:
    library = importlib.import_module("x_transformers")
    layers = library.Decoder(dim=384, depth=6, heads=6, attn_flash=True, rotary_pos_emb=True)
    model = library.TransformerWrapper(num_tokens=1000, max_seq_len=512, attn_layers=layers)
    return model, (torch.randint(0, 1000, (1, 256)),)


def whisper() -> Built:
    """OpenAI's, of the smallest size, given 15 seconds of sound."""
    library = importlib.import_module("whisper.model")
    model = library.Whisper(library.ModelDimensions(80, 750, 384, 6, 4, 51865, 448, 384, 6, 4))
    torch.nn.init.normal_(model.decoder.positional_embedding, std=0.02)  # memory as it was found, otherwise
    return model, (torch.randn(1, 80, 1500), torch.randint(0, 1000, (1, 20)))


def diffusers(name: str, inputs: tuple[Tensor, ...], **options: Any) -> Built:
    return getattr(importlib.import_module("diffusers"), name)(**options), inputs


def dit() -> Built:
    inputs = (torch.randn(1, 4, 32, 32), torch.tensor([10]), torch.tensor([3]))
    options = {"num_attention_heads": 6, "attention_head_dim": 64, "in_channels": 4, "out_channels": 8}
    return diffusers("DiTTransformer2DModel", inputs, num_layers=6, sample_size=32, **options)


def sd3() -> Built:
    inputs = (torch.randn(1, 4, 32, 32), torch.randn(1, 77, 256), torch.randn(1, 128), torch.tensor([10]))
    widths = {"joint_attention_dim": 256, "caption_projection_dim": 384, "pooled_projection_dim": 128}
    options = {"num_layers": 4, "attention_head_dim": 64, "num_attention_heads": 6, "in_channels": 4, "out_channels": 4}
    return diffusers("SD3Transformer2DModel", inputs, sample_size=32, patch_size=2, **options, **widths)


def unet() -> Built:
    """Stable Diffusion's, smaller."""
    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
    blocks["up_block_types"] = ("UpBlock2D", "CrossAttnUpBlock2D")
    options = {"block_out_channels": (128, 256), "layers_per_block": 1, "cross_attention_dim": 256}
    inputs = (torch.randn(1, 4, 32, 32), torch.tensor([10]), torch.randn(1, 77, 256))
    return diffusers("UNet2DConditionModel", inputs, sample_size=32, attention_head_dim=8, **options, **blocks)


def flux() -> Built:
    places = torch.randint(0, 16, (256, 3)).float()
    inputs = (torch.randn(1, 256, 16), torch.randn(1, 77, 256), torch.randn(1, 128), torch.tensor([0.5]), places)
    options = {"num_layers": 2, "num_single_layers": 4, "attention_head_dim": 64, "num_attention_heads": 6}
    widths = {
        "in_channels": 16,
        "joint_attention_dim": 256,
        "pooled_projection_dim": 128,
        "axes_dims_rope": (16, 24, 24),
    }
    return diffusers("FluxTransformer2DModel", (*inputs, torch.zeros(77, 3)), patch_size=1, **options, **widths)


def wan() -> Built:
    inputs = (torch.randn(1, 16, 2, 32, 32), torch.tensor([10]), torch.randn(1, 77, 256))
    options = {"num_attention_heads": 6, "attention_head_dim": 64, "in_channels": 16, "out_channels": 16}
    return diffusers("WanTransformer3DModel", inputs, num_layers=4, text_dim=256, freq_dim=128, ffn_dim=1536, **options)


MODELS: dict[str, Callable[[], Built]] = {
    "timm ViT-S/16": lambda: timm("vit_small_patch16_224"),
    "timm DeiT-III-S/16": lambda: timm("deit3_small_patch16_224"),
    "timm Swin-T": lambda: timm("swin_tiny_patch4_window7_224"),
    "timm EVA-02-S/14": lambda: timm("eva02_small_patch14_224"),
    "timm BEiT-B/16": lambda: timm("beit_base_patch16_224"),
    "timm ConvNeXt-T": lambda: timm("convnext_tiny"),
    "timm MLP-Mixer-B/16": lambda: timm("mixer_b16_224"),
    "timm MaxViT-T": lambda: timm("maxvit_tiny_tf_224"),
    "torchvision ViT-B/16": lambda: torchvision("vit_b_16"),
    "torchvision Swin-T": lambda: torchvision("swin_t"),
    "open_clip ViT-B/32": lambda: open_clip("ViT-B-32"),
    "vit-pytorch ViT, 6 x 384": lambda: vit_pytorch("ViT"),
    "vit-pytorch SimpleViT, 6 x 384": lambda: vit_pytorch("SimpleViT"),
    "x-transformers decoder, 6 x 384": x_transformers,
    "OpenAI Whisper, 4 x 384": whisper,
    "diffusers DiT, 6 x 384": dit,
    "diffusers SD3, 4 x 384": sd3,
    "diffusers UNet of SD, 128 and 256 channels": unet,
    "diffusers Flux, 2 + 4 x 384": flux,
    "diffusers Wan, 4 x 384": wan,
}


def first(result: Any) -> Tensor:
    """The first tensor of what a model returned."""
    while not isinstance(result, Tensor):
        result = next(iter(result.values() if isinstance(result, dict) else result))
    return result


def seconds(run: Callable[[], Any]) -> tuple[float, Tensor]:
    start = time.process_time()
    result = run()
    return time.process_time() - start, first(result)


@torch.no_grad()
def compare(model: nn.Module, inputs: tuple[Tensor, ...], repeats: int) -> tuple[float, float, float, Counter[str]]:
    """Median seconds of the model and of the swapped one, the largest difference of their answers beside the largest
    answer, and the classes that were left alone."""
    times: tuple[list[float], list[float]] = ([], [])
    left: Counter[str] = Counter()
    difference = 0.0
    for turn in range(repeats + 1):  # the first one warms up
        before, original = seconds(lambda: model(*inputs))
        report = fastattn.swap(model)
        after, swapped = seconds(lambda: model(*inputs))
        if turn:
            times[0].append(before)
            times[1].append(after)
        difference = float((swapped - original).abs().max() / original.abs().max().clamp(min=1e-6))
        left = Counter(row.class_name for row in report.rows if row.action == "left")
        report.undo()
    return statistics.median(times[0]), statistics.median(times[1]), difference, left


def main(
    only: Annotated[str, typer.Option(help="Models whose name contains this.")] = "",
    repeats: Annotated[int, typer.Option(min=1, help="Timed turns.")] = 7,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    left: Annotated[bool, typer.Option("--left", help="List the classes that were left alone.")] = False,
) -> None:
    """Times models of other libraries before and after a swap."""
    torch.set_num_threads(threads)
    table = Table("model", "before, ms", "swapped, ms", "times faster", "differ by")
    console = Console()
    for name, build in MODELS.items():
        if only.lower() not in name.lower():
            continue
        torch.manual_seed(0)
        try:
            model, inputs = build()
        except ImportError as error:
            console.print(f"{name}: {error}")
            continue
        for parameter in model.parameters():  # heads that start as zeros would hide every difference
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
        before, after, difference, alone = compare(model.eval(), inputs, repeats)
        if difference > 1e-4:
            raise SystemExit(f"{name}: answers differ by {difference:.1e} of the largest")
        row = (f"{before * 1e3:.0f}", f"{after * 1e3:.0f}", f"{before / after:.2f}", f"{difference:.0e}")
        table.add_row(name, *row)
        if left:
            console.print(f"{name}: {', '.join(f'{count} {kind}' for kind, count in alone.items()) or 'nothing'} left")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
