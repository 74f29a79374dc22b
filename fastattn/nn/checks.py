"""May a swapped forward read a child's tensors instead of calling the child? Asked on every call, so checks are cheap.

Every function returns None for yes, or the reason for no. A child is read only when calling it could do nothing but the
plain operation: its type is exactly the expected one, nothing hooks it, its forward is the class's own and its tensors
are plain Parameters that hold data. LoRA layers, quantised, pruned, parametrised, offloaded or sharded children are
called.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import MethodType
from typing import Any, TypeGuard

import torch
import torch.nn.modules.module as torch_module
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fastattn import dispatch
from fastattn.functional.attention import MAX_HEAD_DIM
from fastattn.graphs import constant
from fastattn.nn.fused import original_class, stands_for

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_DROPOUT = 65535 / 65536  # rates are multiples of 1 / 65536, and 1 drops everything


def own_forward(kind: type[nn.Module]) -> object:
    """A class's forward, or None where a function of another module was put in its place."""
    forward: object = kind.forward
    defined_in = getattr(forward, "__globals__", None)
    return forward if defined_in is vars(sys.modules[kind.__module__]) else None


# What the kernels stand for; other libraries replace forwards of torch's own classes.
_FORWARDS: dict[type[nn.Module], object] = {
    kind: own_forward(kind) for kind in (nn.Linear, nn.Dropout, nn.Identity, nn.LayerNorm, nn.GELU, nn.ReLU, nn.SiLU)
}


def is_plain(x: object) -> TypeGuard[Tensor]:
    """A tensor or parameter and no subclass of them."""
    return type(x) is Tensor or type(x) is nn.Parameter or _is_exported(x)


def _is_exported(x: object, kind: type[Tensor] = Tensor) -> bool:
    """torch.export, which runs a module as it is on tensors without data, put x in the place of a plain one. Not for
    ONNX, which has no such operators as ours: there torch's own are wanted."""
    if type(x) is not FakeTensor or not isinstance(x, kind):
        return False
    return torch.compiler.is_exporting() and not torch.onnx.is_in_onnx_export()


def why_not_input(x: object, backend: str | None = None) -> str | None:
    """The kernels take plain float32, bfloat16 and float16 tensors of a CPU or of a CUDA device that they run on.
    backend: the one that the module's calls are forced to."""
    if not is_plain(x):
        return f"the input is a {type(x).__name__}, not a plain tensor"
    if x.is_nested:
        return "the input is a nested tensor"
    if x.layout is not torch.strided:
        return f"the input is {str(x.layout).removeprefix('torch.')}"
    if x.dtype not in FLOATS:
        return f"the input is {str(x.dtype).removeprefix('torch.')}"
    if not (x.is_cpu or x.is_cuda):
        return f"the input lies on {x.device.type}"
    return why_no_kernels(x, backend) or _why_not_transformed()


def why_no_kernels(x: Tensor, backend: str | None) -> str | None:
    """A model may have been swapped before it was moved to a GPU. Its calls run the original code there, but where a
    backend is forced."""
    return _why_none_on_gpus() if x.is_cuda and not (backend or dispatch.forced) else None


@constant
def _why_none_on_gpus() -> str | None:
    return dispatch.why_no_kernels_on_gpus()


def _why_not_transformed() -> str | None:
    """Derivatives of torch.func inside a compiled graph, which the functions refuse."""
    if torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return "torch.func is used inside torch.compile"
    return None


def why_not_unwatched(child: nn.Module) -> str | None:
    """No hook, of the child or global, and no forward put in the place of the class's own may see the call."""
    if child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks:
        return "has hooks"
    if "forward" in child.__dict__ and not holds_its_own_forward(child):
        return "has its forward replaced on the instance"
    kind = original_class(child)
    if kind in _FORWARDS and kind.forward is not _FORWARDS[kind]:
        return "is of a class whose forward was replaced"
    if (
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    ):
        return "is under global module hooks"
    return None


def why_not_helpers(module: nn.Module, helpers: dict[str, Callable[..., Any]]) -> str | None:
    """None where the methods that the original's forward calls are still these: on the module and in its class."""
    for name, method in helpers.items():
        if name in module.__dict__ or getattr(type(module), name) is not method:
            return f"its {name} was replaced"
    return None


def why_not_eps(eps: object) -> str | None:
    """None where the kernels take this eps of a norm."""
    if not isinstance(eps, (int, float)):
        return f"its eps is a {type(eps).__name__}"
    return None if eps >= 0 else f"its eps is {eps!r}"


def holds_its_own_forward(module: nn.Module) -> bool:
    """Whether the forward on the instance is the class's: accelerate leaves it there when it removes its hooks, and
    transformers 4 when it has collected attention weights."""
    forward = module.__dict__.get("forward")
    if not isinstance(forward, MethodType):
        return False
    return forward.__self__ is module and forward.__func__ is type(module).forward


def why_not_parameter(child: nn.Module, name: str, *, optional: bool) -> str | None:
    """The named parameter is registered, exactly an nn.Parameter, and holds data; None is allowed where optional."""
    if name not in child._parameters and not _takes_back(child, name):
        return f"has a computed {name}"
    parameter = child._parameters[name]
    if parameter is None:
        return None if optional else f"has no {name}"
    if (type(parameter) is not nn.Parameter and not _stands_in(parameter, child)) or name in child.__dict__:
        return f"has a {type(getattr(child, name)).__name__} as its {name}"
    if parameter.layout is not torch.strided:
        return f"has a {str(parameter.layout).removeprefix('torch.')} {name}"
    if parameter.is_meta:
        return f"has its {name} on the meta device"
    return None


def _stands_in(parameter: Tensor, child: nn.Module) -> bool:
    """Whether torch itself put it in a parameter's place: torch.export, or nn.DataParallel in a replica."""
    if "_is_replica" in child.__dict__:
        return type(parameter) is Tensor
    return _is_exported(parameter, nn.Parameter)


def _takes_back(child: nn.Module, name: str) -> bool:
    """A replica of nn.DataParallel, which lives for one forward, holds its parameters as plain attributes, copies
    through which gradients pass. They become parameters again, which every reader of them looks for."""
    former = child.__dict__.get("_former_parameters")
    if not former or name not in former:
        return False
    for each in former:
        child.__dict__.pop(each, None)
    child._parameters.update(former)
    return True


def why_not_tensor(name: str, value: object) -> str | None:
    """A module's own weight, read as an attribute: pruning and parametrisation have already made it what it should be.
    None is fine."""
    if value is None:
        return None
    if not is_plain(value):
        return f"its {name} is a {type(value).__name__}"
    if value.layout is not torch.strided:
        return f"its {name} is {str(value.layout).removeprefix('torch.')}"
    return f"its {name} is on the meta device" if value.is_meta else None


def why_not_linear(child: nn.Module) -> str | None:
    """The child is an nn.Linear and nothing else, or stands for it."""
    if not stands_for(child, nn.Linear):
        return f"is a {full_name(child)}"
    return (
        why_not_unwatched(child)
        or why_not_parameter(child, "weight", optional=False)
        or why_not_parameter(child, "bias", optional=True)
        or why_not_shaped(child._parameters["weight"], child._parameters["bias"])
    )


def why_not_shaped(weight: Tensor | None, bias: Tensor | None) -> str | None:
    """Parameters of a linear that were replaced by others may be of any shape that broadcasts."""
    if weight is None or weight.dim() != 2:
        return "has a weight that is no matrix"
    return None if bias is None or bias.shape == weight.shape[:1] else "has a bias that is broadcast"


def why_not_dropout(child: nn.Module) -> str | None:
    """The child is an nn.Dropout and nothing else, with p < 1."""
    if type(child) is not nn.Dropout:
        return f"is a {full_name(child)}"
    if child.p > MAX_DROPOUT:
        return f"has p = {child.p}"
    return why_not_unwatched(child)


def why_not_head_dim(head_dim: int) -> str | None:
    """None where the kernels take heads of this width."""
    return None if head_dim <= MAX_HEAD_DIM else f"the head dim is {head_dim}: the kernels take up to {MAX_HEAD_DIM}"


def full_name(module: nn.Module) -> str:
    """module.qualname of a module's class."""
    return f"{type(module).__module__}.{type(module).__qualname__}"
