"""What a forward computes, read off it by running it once on symbols.

    class MLP(nn.Module):                                  spelling_of(MLP).expression is
        def forward(self, x):                                  Call(Own("down"), (Op("mul", (
            gate = F.silu(self.gate(x))                            Op("silu", (Call(Own("gate"), (Input(0),)),)),
            return self.down(gate * self.up(x))                    Call(Own("up"), (Input(0),)))),))

Names of variables, order of statements and helper methods leave no trace, so that one pattern knows the copies of a
block that libraries of models hold by the hundred. A forward is read only where the symbols see all that it does: it
takes a fixed number of tensors, has no loop, no code within it and no assignment to an attribute or a global, uses no
global but torch on its way, branches on nothing but flags of the module, dtypes of its tensors and which of its
attributes are None, and every operation that it does is part of what it returns. Any other is not read. A forward that
branches (`if self.with_scale:`) has a spelling for each of the cases with which it can be read, and so has one that
takes a dimension or a form of gelu from an attribute (`approximate=self.config.gelu_approximate`). What it would do on
devices that these kernels do not run on is not asked: a question for one of them by name (`x.device.type == "mps"`) is
answered with no, as it is of inputs on a CPU or a GPU of CUDA. An operation that overwrites what a child has given, and
nothing else reads, is as one that does not.
"""

from __future__ import annotations

import builtins
import dis
import inspect
import operator
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fastattn.swap.code import global_named
from fastattn.swap.plain_code import (
    AVAILABLE,
    MAX_FLAGS,
    TABLE,
    argument_count,
    cases_of_none,
    is_harmless,
    is_plain,
    is_table,
    torchs_module,
)

MAX_INPUTS = 2


@dataclass(frozen=True)
class Input:
    """The tensor that the forward is given at this position."""

    index: int


@dataclass(frozen=True)
class Own:
    """An attribute of the module: a child, a parameter or a number."""

    name: str


@dataclass(frozen=True)
class Call:
    """A child of the module called."""

    child: Own
    inputs: tuple[Any, ...]


@dataclass(frozen=True)
class Op:
    """An operation of torch: x.pow(2), torch.pow(x, 2) and x ** 2 are all Op("pow", (x, 2))."""

    name: str
    operands: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...] = ()


Expression = Input | Own | Call | Op
Value = bool | int | str | torch.dtype
"""What an attribute may be asked for."""


@dataclass(frozen=True)
class Spelling:
    """What was read of a class."""

    expression: Expression
    inputs: tuple[str, ...]
    """The names of the tensors that the forward takes."""
    methods: dict[str, types.FunctionType]
    """The methods that were read through: `forward` and its helpers."""
    flags: tuple[tuple[str, Value], ...] = ()
    """The attributes whose values the forward depends on, by paths with dots, and those with which it is this
    expression."""
    nones: tuple[tuple[str, bool], ...] = ()
    """The attributes that it compares with None, and whether they are."""
    bases: tuple[type[nn.Module], ...] = ()
    """The classes whose forward it calls as super().forward(...), which was read through."""

    def holds_for(self, module: nn.Module, seen: dict[str, Any] | None = None) -> bool:
        """Whether the module's flags have these values, of these types: anything else may change what it is. What was
        `seen` of its attributes in this call is not looked up again."""
        seen = {} if seen is None else seen
        for name, is_none in self.nones:
            if (_held(module, name, seen) is None) is not is_none:
                return False
        for path, value in self.flags:
            held = _held(module, path, seen)
            if held is not value and (type(value) not in (int, str) or type(held) is not type(value) or held != value):
                return False
        return True


def _held(module: Any, path: str, seen: dict[str, Any]) -> Any:
    if path in seen:
        return seen[path]
    for name in path.split("."):
        module = getattr(module, name, None)
    seen[path] = module
    return module


def spelling_of(
    module_class: type[nn.Module], *, without_options: bool = False, texts: dict[str, str] | None = None
) -> Spelling | None:
    """What `module_class.forward` returns, as an expression; None where it cannot be read, or branches."""
    found = spellings_of(module_class, without_options=without_options, texts=texts)
    return found[0] if len(found) == 1 and not found[0].flags and not found[0].nones else None


def spellings_of(
    module_class: type[nn.Module], *, without_options: bool = False, texts: dict[str, str] | None = None
) -> tuple[Spelling, ...]:
    """What `module_class.forward` returns, for each value of its flags with which it can be read. `without_options`
    reads one that takes *args and **options, too: as what it is when it is given none. `texts` are what attributes of
    these names are taken to hold: torch's functions take no symbol for a string."""
    forward = inspect.getattr_static(module_class, "forward", None)
    names = argument_names(forward, without_options=without_options)
    if not isinstance(forward, types.FunctionType) or not 1 <= len(names) <= MAX_INPUTS or not is_plain(forward, True):
        return ()
    found: list[Spelling] = []
    open_cases: list[tuple[dict[str, Value], dict[str, bool]]] = [({}, nones) for nones in cases_of_none(forward)]
    while open_cases:
        flags, nones = open_cases.pop()
        absent = {name: None for name, is_none in nones.items() if is_none}
        try:
            spelling = _read(module_class, forward, names, flags, {**(texts or {}), **absent})
        except _Undecided as question:
            if len(flags) < MAX_FLAGS:
                open_cases += [({**flags, question.path: value}, nones) for value in question.answers]
            continue
        if spelling is not None:
            found.append(replace(spelling, nones=tuple(nones.items())))
    return tuple(reversed(found))  # those of what is there before those of what is None: more modules are such


def _read(
    module_class: type[nn.Module],
    forward: types.FunctionType,
    names: tuple[str, ...],
    flags: dict[str, Value],
    texts: dict[str, str | None],
) -> Spelling | None:
    """One way through the forward. Raises _Undecided where it depends on a value that is not given."""
    reader = _Reader(module_class, flags, texts)
    try:
        inputs = tuple(reader.symbol(Input(index)) for index in range(len(names)))
        result = _on_symbols(forward, reader)(_Module(reader), *inputs)
    except _Undecided:
        raise
    except Exception:
        # Whatever a forward does that symbols cannot follow means the same: it is not one that can be read.
        return None
    if not _is_symbol(result):
        return None
    expression: Expression = _expression(result)
    found = set(parts(expression))
    if not reader.done <= found or not {Input(index) for index in range(len(names))} <= found:
        return None
    if any(isinstance(part, Own) and "." in part.name for part in found):
        return None  # what an attribute holds may be asked, and nothing else done with it
    methods = {"forward": forward, **reader.methods}
    return Spelling(expression, names, methods, tuple(sorted(flags.items())), bases=tuple(reader.bases))


def argument_names(method: object, *, without_options: bool = False) -> tuple[str, ...]:
    """What a method takes after self, all by position or name and none with a default; else nothing."""
    if not isinstance(method, types.FunctionType) or method.__defaults__ or method.__kwdefaults__:
        return ()
    code = method.__code__
    variable = 0 if without_options else code.co_flags & _VARIABLE_ARGUMENTS
    others = code.co_posonlyargcount or code.co_kwonlyargcount or variable
    return () if others else code.co_varnames[1 : code.co_argcount]


_VARIABLE_ARGUMENTS = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS


def parts(expression: Any) -> Iterator[Any]:
    """An expression and all within it."""
    yield expression
    inner: tuple[Any, ...] = ()
    if isinstance(expression, Call):
        inner = expression.inputs
    elif isinstance(expression, Op):
        inner = (*expression.operands, *(value for _, value in expression.options))
    elif isinstance(expression, tuple):
        inner = expression
    for part in inner:
        yield from parts(part)


# ---- symbols ---------------------------------------------------------------------------------------------------------

_READ_THROUGH = (nn.LayerNorm, nn.RMSNorm)
"""The classes whose forward may be called as super().forward."""


def _on_symbols(function: types.FunctionType, reader: _Reader) -> types.FunctionType:
    """The function, with globals that only a way through it may touch that is not read, with a table of activations
    that may be asked for what an attribute of the module names, with a super() that knows forward alone, and without a
    way to import."""
    scope: dict[str, Any] = {}
    if any(each.opname == "IMPORT_NAME" for each in dis.get_instructions(function)):
        scope["__builtins__"] = {**vars(builtins), "__import__": _Unknown()}
    if "__class__" in function.__code__.co_freevars:
        (cell,) = function.__closure__ or ()
        scope["super"] = lambda *given: _Super(reader, cell.cell_contents, given)
    for instruction in dis.get_instructions(function):
        if instruction.opname == "LOAD_GLOBAL":
            name, value = instruction.argval, global_named(function, instruction.argval)
            if name in scope:
                continue
            if "super" in scope and value is cell.cell_contents:
                scope[name] = value  # of super(Class, self)
                continue
            if name == TABLE and is_table(value):
                scope[name] = _Table()
            elif AVAILABLE.fullmatch(name) and isinstance(value, types.FunctionType) and not argument_count(value):
                scope[name] = value
            elif torchs_module(value) is None and not is_harmless(value, name):
                scope[name] = _Unknown()
    if not scope:
        return function
    own = {**function.__globals__, **scope}
    return types.FunctionType(function.__code__, own, function.__name__, None, function.__closure__)


class _Unreadable(Exception):
    """Raised where a forward asks a symbol for what only a tensor could say."""


class _Unknown:
    """Stands for a global that is not torch's: nothing can be done with it."""

    def _refuse(self, *args: Any, **options: Any) -> Any:
        raise _Unreadable("a global")

    __call__ = __getattr__ = __getitem__ = __bool__ = __iter__ = __len__ = __index__ = __float__ = __int__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __neg__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __pow__ = _refuse
    __hash__ = _refuse  # of which a set would say that it has it not


class _Undecided(Exception):
    """Raised where a forward depends on an attribute whose value this reading does not know; one that is none of the
    answers is not read."""

    def __init__(self, path: str, answers: tuple[Value, ...] = (False, True)) -> None:
        super().__init__(path)
        self.path, self.answers = path, answers


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ANSWERS: dict[str, tuple[Value, ...]] = {"approximate": ("none", "tanh"), "dim": (-1,)}
"""What the options of torch are taken to be where an attribute is handed on to them."""
_PLACES_OF_DIM = {"mean": 1, "var": 1}
"""Of the operations that take it by position."""
_COUNTS_OF_PIECES = {"chunk": "chunks", "tensor_split": "indices_or_sections"}
"""Of the operations that cut a tensor, what torch calls the number of pieces; 2 of both are halves, or an error where
the length is odd, which a product of them would be, too."""
_OVERWRITING = {"relu_": "relu"}


class _Reader:
    """One reading: makes symbols, and remembers every operation done on them."""

    def __init__(self, module_class: type[nn.Module], flags: dict[str, Value], texts: dict[str, str | None]) -> None:
        self.module_class = module_class
        self.flags = flags
        self.texts = texts
        self.done: set[Expression] = set()
        self.methods: dict[str, types.FunctionType] = {}
        self.bases: list[type[nn.Module]] = []

    def symbol(self, expression: Expression) -> _Symbol:
        return _Symbol(self, expression)

    def operation(self, name: str, operands: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if options.get("out") is not None:
            raise _Unreadable("out")
        overwrites = name in _OVERWRITING or options.get("inplace") is True
        name = _OVERWRITING.get(name, name)
        kept = {key: value for key, value in options.items() if not (key == "inplace" and type(value) is bool)}
        if "axis" in kept:  # another name that torch has for it
            kept["dim"] = kept.pop("axis")
        if name in _COUNTS_OF_PIECES:
            operands, kept = _pieces_of(name, operands, kept)
            name = "chunk"
        _ask(name, operands, kept)
        if overwrites:
            _overwrite(operands)
        else:
            _use((*operands, *kept.values()))
        pairs = tuple(sorted((key, _expression(value)) for key, value in kept.items()))
        op = Op(name, tuple(_expression(operand) for operand in operands), pairs)
        self.done.add(op)
        return _Pieces(self.symbol(op), operands[1]) if name == "chunk" else self.symbol(op)

    def call_of(self, name: str, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """self.name(...): a method of the class is read through, anything else is taken for a child."""
        method = inspect.getattr_static(self.module_class, name, None)
        if method is None:
            if options or "." in name:
                raise _Unreadable(name)
            _use(inputs)
            call = Call(Own(name), tuple(_expression(each) for each in inputs))
            self.done.add(call)
            return self.symbol(call)
        if not isinstance(method, types.FunctionType) or not is_plain(method) or self.methods:
            raise _Unreadable(name)
        if options or len(argument_names(method)) != len(inputs):
            raise _Unreadable(name)
        self.methods[name] = method
        return _on_symbols(method, self)(_Module(self), *inputs)

    def forward_above(self, owner: type, inputs: tuple[Any, ...]) -> Any:
        """super().forward(...) in a method of `owner`, read through."""
        classes = self.module_class.__mro__
        base = next(each for each in classes[classes.index(owner) + 1 :] if "forward" in vars(each))
        method = vars(base)["forward"]
        if base not in _READ_THROUGH or not isinstance(method, types.FunctionType) or not is_plain(method):
            raise _Unreadable("super().forward")
        if len(argument_names(method)) != len(inputs):
            raise _Unreadable("super().forward")
        self.bases.append(base)
        return _on_symbols(method, self)(_Module(self), *inputs)

    def attribute(self, name: str) -> Any:
        """self.name: a method may be called, a property could do anything."""
        if name in self.texts:
            return self.texts[name]
        if type(self.flags.get(name)) in (int, str):
            return self.flags[name]
        static = inspect.getattr_static(self.module_class, name, None)
        if hasattr(type(static), "__get__") and not isinstance(static, types.FunctionType):
            raise _Unreadable(name)
        return _Attribute(self, Own(name))


class _Module:
    """Stands for the module: its attributes are symbols."""

    def __init__(self, reader: _Reader) -> None:
        self.__dict__["_reader"] = reader

    def __getattr__(self, name: str) -> Any:
        reader: _Reader = self.__dict__["_reader"]
        return reader.attribute(name)

    def __setattr__(self, name: str, value: object) -> None:
        raise _Unreadable(name)


class _Super:
    """Stands for super() in a method of `owner`."""

    def __init__(self, reader: _Reader, owner: type, given: tuple[Any, ...]) -> None:
        if given and not (len(given) == 2 and given[0] is owner and isinstance(given[1], _Module)):
            raise _Unreadable("super")
        self.__dict__.update(_reader=reader, _owner=owner)

    def __setattr__(self, name: str, value: object) -> None:
        raise _Unreadable(name)

    def forward(self, *inputs: Any) -> Any:
        reader: _Reader = self.__dict__["_reader"]
        return reader.forward_above(self.__dict__["_owner"], inputs)


def _operator(name: str, reflected: bool = False) -> Callable[..., Any]:
    """The method of a symbol for an operator of Python."""

    def method(self: _Symbol, *others: Any) -> _Symbol:
        operands = (*others, self) if reflected else (self, *others)
        reader: _Reader = self.__dict__["_reader"]
        return reader.operation(name, operands, {})

    return method


class _Symbol:
    """Stands for a tensor, or for a number that an attribute holds."""

    def __init__(self, reader: _Reader, expression: Expression) -> None:
        self.__dict__.update(_reader=reader, _expression=expression)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], kinds: Any, args: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        first = next(arg for arg in args if _is_symbol(arg))
        return first.__dict__["_reader"].operation(function.__name__, args, options or {})

    def __getattr__(self, name: str) -> Any:
        # Protocols, methods that write into their tensor, and what a tensor does not have.
        writes = name.endswith("_") and name not in _OVERWRITING
        if name.startswith("__") or writes or not hasattr(torch.Tensor, name):
            raise _Unreadable(name)
        return _Method(self, name)

    def __setattr__(self, name: str, value: object) -> None:
        raise _Unreadable(name)

    def __bool__(self) -> bool:
        raise _Unreadable("bool")

    __iter__ = __len__ = __index__ = __float__ = __int__ = __contains__ = __bool__
    __iadd__ = __isub__ = __imul__ = __itruediv__ = __ipow__ = __imatmul__ = __bool__
    __eq__ = __ne__ = __hash__ = __bool__  # type: ignore[assignment]

    __add__, __radd__ = _operator("add"), _operator("add", reflected=True)
    __sub__, __rsub__ = _operator("sub"), _operator("sub", reflected=True)
    __mul__, __rmul__ = _operator("mul"), _operator("mul", reflected=True)
    __truediv__, __rtruediv__ = _operator("div"), _operator("div", reflected=True)
    __pow__, __neg__, __getitem__ = _operator("pow"), _operator("neg"), _operator("getitem")
    __matmul__ = _operator("matmul")


class _Attribute(_Symbol):
    """An attribute of the module: a value in an operation, a child or a method when called. Or an attribute of that,
    which may be asked for its value alone."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or hasattr(torch.Tensor, name):
            return super().__getattr__(name)
        reader, path = self.__dict__["_reader"], f"{self.__dict__['_expression'].name}.{name}"
        return reader.flags[path] if type(reader.flags.get(path)) in (int, str) else _Attribute(reader, Own(path))

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        reader, own = self.__dict__["_reader"], self.__dict__["_expression"]
        return reader.call_of(own.name, inputs, options)

    def __bool__(self) -> bool:
        reader, own = self.__dict__["_reader"], self.__dict__["_expression"]
        if own.name not in reader.flags:
            raise _Undecided(own.name)
        return bool(reader.flags[own.name])


class _Method(_Symbol):
    """x.name: an operation when called, else the attribute (x.dtype)."""

    def __init__(self, base: _Symbol, name: str) -> None:
        super().__init__(base.__dict__["_reader"], Op("getattr", (base.__dict__["_expression"], name)))
        self.__dict__.update(_base=base, _name=name)

    def __eq__(self, other: object) -> bool:  # type: ignore[override]
        """x.device.type == "mps": the swapped forwards take x on a CPU or a GPU of CUDA alone. Or
        self.weight.dtype == torch.float16."""
        match self.__dict__["_expression"]:
            case Op("getattr", (Op("getattr", (_, "device")), "type")) if other in _OTHER_DEVICES:
                return False
            case Op("getattr", (Own(name), "dtype")) if isinstance(other, torch.dtype):
                known, path = self.__dict__["_reader"].flags, f"{name}.dtype"
                if path not in known:
                    raise _Undecided(path, _DTYPES)
                return known[path] is other
        raise _Unreadable("==")

    def __ne__(self, other: object) -> bool:  # type: ignore[override]
        return not self == other

    __hash__ = _Symbol.__bool__

    def __call__(self, *operands: Any, **options: Any) -> Any:
        base, name = self.__dict__["_base"], self.__dict__["_name"]
        return self.__dict__["_reader"].operation(name, (base, *operands), options)


_OTHER_DEVICES = ("mps", "npu", "xla", "mlu", "hpu", "xpu")


class _Table:
    """Stands for ACT2FN: ACT2FN[self.name](x) is Op("ACT2FN", (Own("name"), x))."""

    def __getitem__(self, key: Any) -> Callable[[Any], Any]:
        if type(key) is not _Attribute:
            raise _Unreadable(TABLE)
        reader: _Reader = key.__dict__["_reader"]
        return lambda x: reader.operation(TABLE, (key, x), {})


class _Pieces:
    """x.chunk(n, ...): n symbols to take apart."""

    def __init__(self, whole: _Symbol, count: int) -> None:
        self.whole, self.count = whole, count

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(self.count))

    def __getitem__(self, index: int) -> Any:
        return self.whole[operator.index(index)]


def _pieces_of(name: str, operands: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The tensor and the number of its pieces, and the dimension by name, however they were given."""
    rest = {key: value for key, value in options.items() if key != _COUNTS_OF_PIECES[name]}
    given = [*operands, options[_COUNTS_OF_PIECES[name]]] if len(rest) < len(options) else list(operands)
    if len(given) == 3:
        rest["dim"] = given.pop()
    if len(given) != 2 or type(given[1]) is not int or not rest.keys() <= {"dim"}:
        raise _Unreadable(name)
    return tuple(given), rest


def _is_symbol(value: object) -> bool:
    return isinstance(value, _Symbol)


def _ask(name: str, operands: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Asks for the value of an attribute that stands for one of `_ANSWERS`."""
    place = _PLACES_OF_DIM.get(name, len(operands))
    given = options if place >= len(operands) else {**options, "dim": operands[place]}
    for key, answers in _ANSWERS.items():
        if isinstance(given.get(key), _Attribute):
            raise _Undecided(given[key].__dict__["_expression"].name, answers)


def _use(values: Any) -> None:
    """Notes that what these symbols stand for is read; it must be what it was."""
    for value in values:
        if isinstance(value, (tuple, list)):
            _use(value)
        elif _is_symbol(value):
            if value.__dict__.get("_overwritten"):
                raise _Unreadable("what was overwritten")
            value.__dict__["_used"] = True
            if isinstance(value, _Method):
                _use((value.__dict__["_base"],))  # of which it may be a view


def _overwrite(operands: tuple[Any, ...]) -> None:
    """Notes that an operation leaves its result in its operand: in what a child gave, for nothing but this."""
    first = operands[0] if operands else None
    if not _is_symbol(first) or not isinstance(first.__dict__["_expression"], Call) or first.__dict__.get("_used"):
        raise _Unreadable("an operand that is overwritten")
    _use(operands)
    first.__dict__["_overwritten"] = True


def _expression(value: Any) -> Any:
    """What a symbol stands for; constants stand for themselves."""
    if _is_symbol(value):
        return value.__dict__["_expression"]
    if isinstance(value, (bool, int, float, str, torch.dtype, type(None))):
        return value
    if isinstance(value, (tuple, list)):
        return tuple(_expression(each) for each in value)
    if isinstance(value, slice):
        return Op("slice", tuple(_expression(each) for each in (value.start, value.stop, value.step)))
    raise _Unreadable(type(value).__name__)
