"""Attention that a class writes out itself: a product of queries and keys, a softmax, a product with values.

Research code spells it in a hundred ways, over methods, functions and children, so nothing of it is copied or
rewritten: the original forward runs under a function mode in which scores are not computed until something other than
attention is done to them (fastattn/swap/deferred). What the forward turns out to do differently, it does as before.
A query all of whose keys are hidden by -inf gets 0, where the original gives NaN; hidden by a number, what it got.

Time of the original over that of the swapped module, one thread, float32, alternating in one process, median; one core
of an AMD EPYC (Zen 5, AVX-512), a virtual machine, torch 2.13.0, 2026-11-27. Linears and norms are torch's in both:
                                                        inference   training step
    minGPT's, 6 heads of 64, 4 x 128 tokens                  1.15            1.13
                             2 x 512                         2.28            2.08
                             1 x 1,024                       3.25            2.75
    fair-esm's, 20 heads of 16, 2 x 200, no weights asked    1.36            1.37
    vit_pytorch's, 6 heads of 64, 8 x 128                    1.25            1.11
                                  8 x 64                     1.08            1.02
                                  1 x 128                    1.01            1.00
    torchvision's Swin, 128 windows of 49, 3 heads of 32     1.13            left: 0.95
    ViT, SimpleViT of vit_pytorch whole, 2 x 197 tokens      1.02, 1.03      1.09, 1.02
The mode and the deferred tensors take about 85 us a call, 230 in training: calls with few scores are left to the
original, at 6 us a call from the second of the same shapes on (0.92 with 16 tokens of 64 features, 0.98 with 384).
"""

from __future__ import annotations

import dis
import functools
import weakref
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any, ClassVar

import torch
import torch.nn.modules.module as torch_module
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map

from fastattn.functional.checks import resolve_backend
from fastattn.modes import has_function_mode
from fastattn.nn.counting import note_call, note_choice, note_fallback
from fastattn.swap.deferred.steps import deferral
from fastattn.swap.deferred.tensor import (
    PLAIN,
    TELLS_SAVING_HOOKS,
    Deferral,
    Deferred,
    made,
    saving_hooks,
    storage_of,
)
from fastattn.swap.reading import Reading, is_replaced
from fastattn.swap.recipe import Recipe
from fastattn.swap.recipes.sdpa import reached_methods
from fastattn.swap.recipes.sdpa_copies import layers
from fastattn.swap.swapped import Swapped

SMALLEST = {False: 80_000, True: 160_000}
"""Where there are fewer scores they are computed as they were: in inference, and where gradients are kept."""

AS_FAST = "torch is as fast with so few scores"
NO_ATTENTION = "its forward computed no attention that is known"

_PATIENCE = 3
"""Calls in vain after which a module's original forward runs without the mode, but for each _RETRY-th call. With
gradients, or in training, one call in vain is enough, and none is tried again: dropout would be drawn otherwise."""
_RETRY = 32


class WritesOut(Swapped):
    """Base of the swapped classes."""

    fastattn_methods: ClassVar[dict[str, Callable[..., Any]]]
    """The methods of the original that were read."""
    fastattn_stores: ClassVar[bool]
    """Whether they set attributes: those that keep attention weights do."""


_in_vain: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], tuple[int, str]]] = weakref.WeakKeyDictionary()
"""How many calls in a row did not come to attention, and why; by what the calls say beside tensors (`_said`)."""

_too_small: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], int]] = weakref.WeakKeyDictionary()
"""The shapes of calls that had too few scores, and how many calls there were since one was looked at."""

_REMEMBERED = 256


def read(original: type[nn.Module]) -> Reading | None:
    """The reading of a class whose forward, or what that calls, names two products; and no attention of torch's, which
    is another recipe's (either_way). Whether there is a softmax is seen of a module: it may be a child."""
    if any("scaled_dot_product_attention" in code.co_names for code in _all_codes(original)):
        return None
    attributes = attributes_of(original)
    return None if attributes is None else Reading(WritesOut, _recipe, attributes)


def attributes_of(original: type[nn.Module]) -> dict[str, Any] | None:
    """Those of the swapped class; None where two products are not named."""
    methods = reached_methods(original)
    codes = list(_all_codes(original)) if methods else []
    if sum(map(_products, codes)) < 2:
        return None
    stores = any(map(_stores, codes))
    return {"forward": _deferring(methods["forward"]), "fastattn_methods": methods, "fastattn_stores": stores}


def _recipe(swapped: type[Swapped]) -> Recipe:
    return Recipe(swapped, kernels={"attention": "attention"}, misfit=misfit, refuse=refuse)


def misfit(module: nn.Module) -> str | None:
    """Why it is no attention: without a softmax, by code or by a child, or with attention of its own in a child."""
    from fastattn.swap.recipes import recipe_for

    own = module.fastattn_original if isinstance(module, Swapped) else type(module)
    has_softmax = any(not _SOFTMAXES.isdisjoint(code.co_names) for code in _all_codes(own))
    if not has_softmax and not any(isinstance(child, nn.Softmax) for child in module.children()):
        return "it takes no softmax"
    for name, inner in module.named_modules():
        if inner is not module:
            kind = inner.fastattn_original if isinstance(inner, Swapped) else type(inner)
            recipe = recipe_for(kind)
            if recipe is not None and "attention" in recipe.kernels and recipe.misfit(inner) is None:
                return f"its {name} has attention of its own"
    return None


def refuse(module: nn.Module) -> list[str]:
    lying = {parameter.device.type for parameter in module.parameters()} - {"cpu"}
    return (
        [f"attention that a class writes out is taken over on CPUs, and it lies on {', '.join(lying)}"] if lying else []
    )


# ---- the swapped forward ---------------------------------------------------------------------------------------------


def _deferring(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def run(self: WritesOut, *args: Any, **kwargs: Any) -> Any:
        note_call(self)
        reason = _why_not(self, args, kwargs)
        if reason is not None:
            note_fallback(self, reason)
            return self.fastattn_original.forward(self, *args, **kwargs)
        said = _said(self, args, kwargs)
        reason = _why_in_vain(self, said)
        if reason is not None:
            note_fallback(self, reason)
            return forward(self, *args, **kwargs)
        smallest = _smallest(self)
        key = _shapes(args, kwargs) if smallest else ()
        if smallest and self in _too_small and _is_small(_too_small[self], key):
            note_choice(self, AS_FAST)
            return forward(self, *args, **kwargs)
        mode = deferral(self.fastattn_backend, smallest)
        with mode:
            result = forward(self, *args, **kwargs)
        if mode.live and mode.held():
            result = _with_nothing_deferred(self, mode, result)
        if mode.outputs:
            result = _as_products_lie(mode, result)
        _note(self, mode, said, key)
        return result

    return run


def _why_in_vain(module: WritesOut, said: tuple[Any, ...]) -> str | None:
    """Why the original forward runs without the mode: what it did with it before would be done in vain."""
    calls, why = _in_vain[module].get(said, (0, "")) if module in _in_vain else (0, "")
    if torch.is_grad_enabled() or module.training:
        if not calls and module.fastattn_stores:
            return "its forward stores what may be attention weights, which gradients shall reach"
        return why if calls else None
    if calls < _PATIENCE or calls % _RETRY == 0:
        return None
    if may_change(module):
        _in_vain[module][said] = calls + 1, why
    return why


def _smallest(module: WritesOut) -> int:
    """Where a backend is forced, all calls are its. In training a call without gradients may be that of a checkpoint,
    which is run again with them, and whose dropout has to be drawn alike."""
    return 0 if resolve_backend(module.fastattn_backend) else SMALLEST[torch.is_grad_enabled() or module.training]


def _said(module: WritesOut, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What may make a call keep its weights where another does not: its flags, and whether it is one of training."""
    named = ((name, value) for name, value in kwargs.items() if type(value) in _SAID)
    return (module.training, *(value if type(value) in _SAID else ... for value in args), *named)


_SAID = (bool, str, type(None))  # no numbers: a position is another one at every call


def has_none(module: nn.Module) -> bool:
    """Whether a call of the module that was run under the mode came to no attention at all."""
    return any(why == NO_ATTENTION for _, why in _in_vain.get(module, {}).values())


def may_change(module: nn.Module) -> bool:
    """Whether a call may change what is done with the next: not one that a checkpoint runs again, which has to do the
    same. It is watched by hooks of saved tensors, or runs without gradients in training."""
    if torch.is_grad_enabled():
        return saving_hooks() is None
    return not module.training


def _note(module: WritesOut, mode: Deferral, said: tuple[Any, ...], key: tuple[Any, ...]) -> None:
    reason = mode.lost or mode.reason
    if mode.attended and mode.lost is None:
        if module in _in_vain and may_change(module):
            _in_vain[module].pop(said, None)
    elif mode.is_small and reason is None:
        note_choice(module, AS_FAST)
        known = _too_small.setdefault(module, {})
        if len(known) < _REMEMBERED:
            known[key] = 0
    else:
        reason = reason or NO_ATTENTION
        if may_change(module):
            known_calls = _in_vain.setdefault(module, {})
            if said in known_calls or len(known_calls) < _REMEMBERED:
                known_calls[said] = known_calls.get(said, (0, ""))[0] + 1, reason
        note_fallback(module, reason)


def _shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What the size of a module's scores depends on, but for what it holds itself."""
    values = (*args, *kwargs.values()) if kwargs else args
    return (torch.is_grad_enabled(), *(value.shape if isinstance(value, Tensor) else None for value in values))


def _is_small(known: dict[tuple[Any, ...], int], key: tuple[Any, ...]) -> bool:
    """Whether calls of these shapes had few scores; each _RETRY-th is looked at again."""
    calls = known.get(key)
    if calls is None:
        return False
    known[key] = calls + 1
    return (calls + 1) % _RETRY != 0


def _with_nothing_deferred(module: WritesOut, mode: Deferral, result: Any) -> Any:
    """What is returned, or held by the module, is made; so is anything else that is still held somewhere."""
    kept = False

    def make(value: Any) -> Any:
        nonlocal kept
        if isinstance(value, Deferred):
            kept = True
        return made(value)

    result = tree_map(make, result)
    for each in module.modules():
        for holder in (each.__dict__, each._buffers):
            for name, value in list(holder.items()):
                if isinstance(value, Deferred):
                    holder[name] = make(value)
                elif type(value) in (list, tuple, dict) and not name.startswith("_"):
                    found = tree_map(make, value)
                    if kept:
                        holder[name] = found
    if kept or mode.deferred_still():
        mode.lost = mode.lost or "its attention scores or weights are kept"
    mode.make_all()
    return result


def _as_products_lie(mode: Deferral, result: Any) -> Any:
    """Outputs of attention that are returned: whoever takes them may view them in another shape."""

    def lie(value: Any) -> Any:
        is_one = type(value) is Tensor and not value.is_contiguous() and storage_of(value) in mode.outputs
        return value.contiguous() if is_one else value

    return lie(result) if type(result) is Tensor else tree_map(lie, result)


def _why_not(module: WritesOut, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why the original forward runs untouched."""
    if torch.compiler.is_compiling():
        return "torch.compile traces it"
    if torch._C._len_torch_dispatch_stack() or has_function_mode():
        return "a torch mode is on"
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "torch.func or forward-mode derivatives transform it"
    if torch._C._get_tracing_state() is not None:
        return "it is traced"
    if torch._C._is_any_autocast_enabled():
        return "autocast is on"
    if torch.is_grad_enabled() and not TELLS_SAVING_HOOKS:
        return "gradients are kept, and this torch does not tell the hooks of saved tensors"
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            if type(value) not in PLAIN:
                return f"an input is a {type(value).__name__}, not a plain tensor"
            if not value.is_cpu:
                return f"an input lies on {value.device.type}"
    for name, method in module.fastattn_methods.items():
        if is_replaced(module, name, method):
            return f"its {name} was replaced"
    return _why_watched(module)


def _why_watched(module: nn.Module) -> str | None:
    """Hooks that may be handed scores: those of children without parameters, softmax and dropout say."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "there are global module hooks"
    if torch_module._global_backward_hooks or torch_module._global_backward_pre_hooks:
        return "there are global module hooks"
    for name, child in module._modules.items():
        if child is None:
            continue
        if not child._parameters and (
            child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks
        ):
            return f"its {name} has hooks"
        if child._modules:
            reason = _why_watched(child)
            if reason is not None:
                return reason
    return None


# ---- what a forward names --------------------------------------------------------------------------------------------


_PRODUCTS = frozenset({"matmul", "bmm", "baddbmm", "einsum"})
_SOFTMAXES = frozenset({"softmax", "Softmax"})  # nn.Softmax(dim=-1)(scores), as the first BERTs had it


def _products(code: CodeType) -> int:
    """How many products of matrices it names."""
    return sum(
        instruction.opname == "BINARY_MATRIX_MULTIPLY"
        or (instruction.opname == "BINARY_OP" and instruction.argrepr in ("@", "@="))
        or (instruction.opname.startswith("LOAD_") and instruction.argval in _PRODUCTS)
        for instruction in dis.get_instructions(code)
    )


def _stores(code: CodeType) -> bool:
    return any(instruction.opname == "STORE_ATTR" for instruction in dis.get_instructions(code))


def _all_codes(original: type[nn.Module]) -> Iterator[CodeType]:
    """The code of forward, of all that it calls of the class by name, of functions of the same package that these call,
    and of functions inside of them."""
    seen: set[int] = set()
    waiting: list[Any] = _defined(original, "forward")[:1]
    while waiting:
        function = waiting.pop()
        if id(function) in seen:
            continue
        seen.add(id(function))
        waiting += list(layers(function))[1:]
        package = (function.__module__ or "").partition(".")[0]
        codes = [function.__code__]
        while codes:
            code = codes.pop()
            yield code
            codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
            for name in code.co_names:
                waiting += _defined(original, name)[: None if "super" in code.co_names else 1]
                other = function.__globals__.get(name)
                if isinstance(other, FunctionType) and (other.__module__ or "").partition(".")[0] == package:
                    waiting.append(other)


def _defined(original: type[nn.Module], name: str) -> list[FunctionType]:
    """The functions under this name in the class and its bases, which super() reaches."""
    found: list[FunctionType] = []
    for base in original.__mro__[: original.__mro__.index(nn.Module)]:
        each = vars(base).get(name)
        each = each.fget if isinstance(each, property) else getattr(each, "__func__", each)
        if isinstance(each, FunctionType):
            found.append(each)
    return found
