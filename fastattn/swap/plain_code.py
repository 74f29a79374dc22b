"""Which functions may be run on symbols in place of tensors (`fastattn.swap.expression`): those that do no more."""

from __future__ import annotations

import dis
import inspect
import re
import sys
import types

import torch
import torch.nn.functional as F

from fastattn.swap.code import global_named

MAX_FLAGS = 2
"""How many attributes a forward may compare with None, and of how many others the values may be asked."""
_MAX_INSTRUCTIONS = 120

_EFFECTS = [
    "STORE_ATTR",
    "STORE_GLOBAL",
    "STORE_SUBSCR",
    "STORE_SLICE",
    "STORE_DEREF",
    "DELETE_ATTR",
    "DELETE_GLOBAL",
    "DELETE_SUBSCR",
    "DELETE_DEREF",
    "YIELD_VALUE",
    "MAKE_FUNCTION",
    "LOAD_BUILD_CLASS",
    "PUSH_EXC_INFO",
    "IS_OP",  # of a symbol no object is ever the same
]
_REFUSED = {dis.opmap[name] for name in _EFFECTS if name in dis.opmap}  # each Python has some of them
_IMPORTS = ("IMPORT_NAME", "IMPORT_FROM")  # may stand where symbols do not come: if they do, they are refused there
_JUMPS = frozenset(dis.hasjrel) | frozenset(dis.hasjabs)
_BRANCHES = re.compile("JUMP_FORWARD|(POP_)?JUMP(_FORWARD)?_IF_(TRUE|FALSE)(_OR_POP)?")  # on what bool() says
_NONE_TESTS = re.compile("IS_OP|POP_JUMP(_FORWARD)?_IF_(NOT_)?NONE")
_FUNCTIONS = frozenset(
    (
        *(
            "add",
            "chunk",
            "div",
            "dropout",
            "gelu",
            "layer_norm",
            "linear",
            "matmul",
            "mean",
            "mul",
            "multiply",
            "normalize",
            "pow",
        ),
        *("relu", "relu_", "rms_norm", "rsqrt", "sigmoid", "silu", "sqrt", "square", "sub", "tensor_split", "var"),
    )
)  # of torch and torch.nn.functional: without effect but their result
_LOADS = ("LOAD_ATTR", "LOAD_METHOD")


def has_effects(function: types.FunctionType) -> bool:
    """Whether running the function could do more than call what it is given and return: a store outside its own
    variables, code within, an import."""
    code = function.__code__
    instructions = list(dis.get_instructions(function))
    refused = any(
        each.opname in _IMPORTS or (each.opcode in _REFUSED and each.opname != "IS_OP") for each in instructions
    )
    return refused or len(instructions) > _MAX_INSTRUCTIONS or bool(code.co_freevars)


def is_plain(function: types.FunctionType, may_test_own: bool = False) -> bool:
    """No loop, no branch that symbols would not notice, no store outside its own variables, no code within, and of
    torch only known parts touched, one attribute after the other. Other globals, and what it imports, are unknown to
    symbols (_on_symbols).
    """
    code = function.__code__
    instructions = [i for i in dis.get_instructions(function) if i.opname not in ("CACHE", "PRECALL", "EXTENDED_ARG")]
    if len(instructions) > _MAX_INSTRUCTIONS or getattr(code, "co_exceptiontable", False):
        return False
    if code.co_freevars not in ((), ("__class__",)):  # the latter is what super() asks for
        return False
    module: types.ModuleType | None = None  # torch, or a part of it: nothing may be done with it but take an attribute
    for index, instruction in enumerate(instructions):
        is_load = instruction.opname in _LOADS
        if _NONE_TESTS.fullmatch(instruction.opname):
            before = _without_none(instruction, instructions[:index])
            if _tests_an_option(code, before) or (may_test_own and _own_tested(code, before) is not None):
                continue
        if instruction.opcode in _REFUSED or (module is not None and not is_load):
            return False
        if instruction.argval == "__class__" and instructions[index - 1].argval != "super":
            return False  # what a class holds may change
        if instruction.opname == "LOAD_SUPER_ATTR" and instruction.argval != "forward":
            return False
        if instruction.opcode in _JUMPS and not _is_branch(instruction):
            return False
        if module is not None:
            found = getattr(module, instruction.argval, None)
            module = torchs_module(found)
            if module is None and not is_harmless(found, instruction.argval):
                return False
        elif instruction.opname == "LOAD_GLOBAL":
            module = torchs_module(global_named(function, instruction.argval))
        elif is_load and instruction.argval.startswith("__"):
            return False
    return module is None


def _without_none(test: dis.Instruction, before: list[dis.Instruction]) -> list[dis.Instruction]:
    """What stands before a comparison with None, without the None that `is` takes; nothing where it takes another."""
    if test.opname != "IS_OP":
        return before
    has_none = bool(before) and before[-1].opname == "LOAD_CONST" and before[-1].argval is None
    return before[:-1] if has_none else []


def _own_tested(code: types.CodeType, before: list[dis.Instruction]) -> str | None:
    """The attribute of the module that is compared with None; None for anything else."""
    if len(before) < 2 or before[-1].opname != "LOAD_ATTR" or before[-2].argval != code.co_varnames[0]:
        return None
    return str(before[-1].argval) if before[-2].opname.startswith("LOAD_FAST") else None


def cases_of_none(forward: types.FunctionType) -> list[dict[str, bool]]:
    """Which of the attributes that a forward compares with None may be None: every case."""
    instructions = [i for i in dis.get_instructions(forward) if i.opname not in ("CACHE", "PRECALL", "EXTENDED_ARG")]
    names: dict[str, None] = {}
    for index, instruction in enumerate(instructions):
        if _NONE_TESTS.fullmatch(instruction.opname):
            name = _own_tested(forward.__code__, _without_none(instruction, instructions[:index]))
            names |= {} if name is None else {name: None}
    cases: list[dict[str, bool]] = [{}]
    for name in names if len(names) <= MAX_FLAGS else ():
        cases = [{**case, name: is_none} for case in cases for is_none in (False, True)]
    return cases if len(names) <= MAX_FLAGS else []


def _tests_an_option(code: types.CodeType, before: list[dis.Instruction]) -> bool:
    """Whether what is compared with None is options.get(name) or options.get(name, default), of its **options."""
    if not code.co_flags & inspect.CO_VARKEYWORDS:
        return False
    count = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARARGS)
    while len(before) > 1 and before[-2].opname == "LOAD_CONST":
        before = [*before[:-2], before[-1]]
    names = [(each.opname.partition("_")[0], each.argval) for each in before[-3:-1]]
    return (
        before[-1:] != []
        and before[-1].opname.startswith("CALL")
        and names
        == [
            ("LOAD", code.co_varnames[count]),
            ("LOAD", "get"),
        ]
    )


def torchs_module(value: object) -> types.ModuleType | None:
    return value if isinstance(value, types.ModuleType) and _is_torchs(value.__name__) else None


def _is_branch(instruction: dis.Instruction) -> bool:
    return _BRANCHES.fullmatch(instruction.opname) is not None and instruction.argval > instruction.offset


def is_harmless(value: object, name: str) -> bool:
    """A dtype of torch, or a function of it under its own name: numbers may be bound anew, and what was read with them
    would be stale. Or transformers' table of activations."""
    if isinstance(value, torch.dtype) or value is len or (name == TABLE and is_table(value)):
        return True
    return name in _FUNCTIONS and value in (getattr(torch, name, None), getattr(F, name, None))


AVAILABLE = re.compile("is_(torch_)?(npu|xla|mlu|hpu|xpu|musa)_available")
"""What libraries call the question for a package that other devices need: the answer of a process is one."""


def argument_count(function: types.FunctionType) -> int:
    """How many arguments a function must be given."""
    code = function.__code__
    return code.co_argcount + code.co_kwonlyargcount


def _is_torchs(module_name: str) -> bool:
    return module_name == "torch" or module_name.startswith("torch.")


TABLE = "ACT2FN"


def is_table(value: object) -> bool:
    activations = sys.modules.get("transformers.activations")
    return activations is not None and value is activations.ACT2FN
