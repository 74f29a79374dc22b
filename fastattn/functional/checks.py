"""The argument checks that the public functions share. Every error names the argument, its value and the remedy."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import dispatch
from fastattn.reference.ffn import ACTIVATIONS
from fastattn.reference.philox import dropout_threshold

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALVES = (torch.bfloat16, torch.float16)
_LARGEST = torch.finfo(torch.float32).max


def check_tensor(name: str, value: Tensor) -> None:
    """TypeError unless `value` is a plain tensor of a float dtype that the package computes in."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}: pass a tensor")
    if value.is_nested:
        raise TypeError(
            f"{name} is nested: pass a plain tensor, packed or padded, for example {name}.to_padded_tensor(0.0)"
        )
    if value.layout != torch.strided:
        raise TypeError(f"{name} has layout {value.layout}: pass a strided tensor, for example {name}.to_dense()")
    if value.dtype not in FLOATS:
        raise TypeError(
            f"{name} has dtype {value.dtype}: pass float32, bfloat16, float16 or float64, "
            f"for example {name}.to(torch.float32)"
        )


def check_beside(name: str, value: Tensor, main_name: str, main: Tensor, float32_too: bool = True) -> None:
    """`value` is a float tensor on the device of `main`, in its dtype or, where allowed, in float32 beside a half
    dtype."""
    check_tensor(name, value)
    if value.device != main.device:
        check_device(name, value, main_name, main)
    dtype = main.dtype
    if value.dtype == dtype:
        return
    float32_too = float32_too and dtype in HALVES
    if not (float32_too and value.dtype == torch.float32):
        allowed = f"{dtype} or torch.float32" if float32_too else str(dtype)
        raise TypeError(
            f"{name} has dtype {value.dtype} beside {main_name} of {dtype}: pass {allowed}, "
            f"for example {name}.to({dtype})"
        )


def check_device(name: str, value: Tensor, main_name: str, main: Tensor) -> None:
    """ValueError unless both lie on one device."""
    if value.device != main.device:
        raise ValueError(
            f"{name} lies on {value.device} but {main_name} on {main.device}: move it with .to({str(main.device)!r})"
        )


def check_int32(name: str, value: Tensor, main_name: str, main: Tensor) -> None:
    """TypeError unless `value` is an int32 tensor, ValueError unless it lies on the device of `main`."""
    if not isinstance(value, Tensor) or value.dtype != torch.int32:
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        how = f"{name}.to(torch.int32)" if isinstance(value, Tensor) else f"torch.tensor({name}, dtype=torch.int32)"
        raise TypeError(f"{name} is of {kind}: pass an int32 tensor, for example {how}")
    check_device(name, value, main_name, main)


def check_cu_seqlens(name: str, value: Tensor, main_name: str, main: Tensor) -> None:
    """An error unless `value` has the form of bounds of packed sequences; a backend checks its numbers."""
    check_int32(name, value, main_name, main)
    if value.dim() != 1 or value.shape[0] == 0:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}: pass (sequences + 1,), from 0 to the number of tokens"
        )


def check_shape(name: str, value: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """ValueError unless `value` has the expected shape; `meaning` says where that comes from."""
    if value.shape != expected:
        raise ValueError(f"{name} has shape {tuple(value.shape)}: pass {tuple(expected)}, {meaning}")


def check_dropout(dropout_p: float, seed: Tensor | None, main_name: str, main: Tensor) -> Tensor | None:
    """The seed to use: None without dropout, the given one, or a fresh draw. An error for a wrong rate or seed."""
    dropout_p = _as_float("dropout_p", dropout_p)
    if dropout_p == 0.0:
        return None
    if not 0.0 < dropout_p < 1.0 or dropout_threshold(dropout_p) > 65535:
        raise ValueError(
            f"dropout_p={dropout_p} lies outside [0, 1): pass the share of elements to drop, for example 0.1 "
            "(the largest is 65535/65536)"
        )
    if seed is None:
        return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=main.device)
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64:
        kind = str(seed.dtype) if isinstance(seed, Tensor) else type(seed).__name__
        raise TypeError(f"dropout_seed is of {kind}: pass an int64 tensor of one element, or None to draw one")
    if seed.numel() != 1:
        raise ValueError(f"dropout_seed has shape {tuple(seed.shape)}: pass an int64 tensor of one element")
    check_device("dropout_seed", seed, main_name, main)
    return seed


def is_batched(tensor: Tensor) -> bool:
    """Whether vmap batches the tensor, at whichever level of torch.func's transforms: its numbers cannot be read on the
    host then."""
    if torch.compiler.is_compiling():
        return False
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return False


def is_autocast(tensor: Tensor) -> bool:
    """Whether autocast is on for the tensor's device; on the meta device there is none."""
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)


def check_number(name: str, value: float) -> float:
    """`value` as a float; TypeError unless it is a real number of the host, ValueError unless float32 holds it."""
    number = _as_float(name, value)
    if not torch.compiler.is_compiling() and type(number) is float and not abs(number) <= _LARGEST:
        raise ValueError(f"{name}={value!r} is not finite in float32, in which kernels compute: pass a finite number")
    return number


def check_eps(name: str, value: float) -> float:
    """`value` as a float; ValueError where it is negative, and as `check_number`."""
    eps = check_number(name, value)
    if not eps >= 0.0:
        raise ValueError(f"{name}={eps} is negative: pass 0 or a small positive number such as 1e-5")
    return eps


def check_flag(name: str, value: bool) -> None:
    """TypeError unless `value` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}: pass True or False")


def _as_float(name: str, value: float) -> float:
    if type(value) is float or isinstance(value, (torch.SymInt, torch.SymFloat)):
        return value
    if isinstance(value, Tensor):
        raise TypeError(f"{name} is a tensor of shape {tuple(value.shape)}: pass a Python number")
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}: pass a Python number")
    return float(value)


def check_activation(activation: str | None) -> str:
    """The activation's name, "none" for None; ValueError for one that does not exist."""
    name = "none" if activation is None else activation
    if not isinstance(name, str) or name not in ACTIVATIONS:
        known = ", ".join(a for a in ACTIVATIONS if a != "none")
        raise ValueError(f"activation={activation!r} is unknown: pass one of {known}, or None")
    return name


def resolve_backend(backend: str | None) -> str:
    """The backend of a call: its own, or that of `use_backend`, or empty to choose. ValueError for an unknown name."""
    return dispatch.forced if backend is None else dispatch.check_backend_name(backend)
