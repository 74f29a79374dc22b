"""The table of providers. To add one: a small class with a name, its suites and `prepare`, and a line here."""

from __future__ import annotations

from fastattn.bench.providers.base import Provider
from fastattn.bench.providers.compiled import Compiled, Flex
from fastattn.bench.providers.models import MODEL_PROVIDERS
from fastattn.bench.providers.ours import OurDecode, OurHopper, Ours
from fastattn.bench.providers.packed import NestedSdpa, OurPacked, PackedFlashAttention3, PackedFlex, PaddedSdpa
from fastattn.bench.providers.peers import FlashAttention3, Liger
from fastattn.bench.providers.torch_eager import Eager, Sdpa, TorchNorm
from fastattn.dispatch import NAMES

_SDPA = {"math": "math", "flash": "flash", "mem_efficient": "memory-efficient", "cudnn": "cuDNN"}

PROVIDERS: tuple[Provider, ...] = (
    *(Ours(backend) for backend in NAMES),
    OurHopper(),
    *(OurPacked(backend) for backend in NAMES),
    *(OurDecode(backend) for backend in NAMES),
    Eager(),
    TorchNorm(),
    *(Sdpa(backend, name) for backend, name in _SDPA.items()),
    *(PaddedSdpa(backend, name) for backend, name in _SDPA.items()),
    NestedSdpa(),
    Compiled(),
    Flex(),
    PackedFlex(),
    FlashAttention3(),
    PackedFlashAttention3(),
    Liger(),
    *MODEL_PROVIDERS,
)

__all__ = ["PROVIDERS", "Provider"]
