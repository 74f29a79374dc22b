"""One call of an operation through a backend, compared with the truth under the parity rule.

`run_probe` runs the call forward and, where inputs require grad, backward with a random output gradient and again with
that gradient times 2^-12. Inputs and output gradients lie in guard bands (`fastattn.parity.guards`). The float64 truth
itself is compared with eager's formulas run in float64, so that a fault in the reference cannot widen the bound unseen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastattn.dispatch import use_backend
from fastattn.parity.bound import ParityRow, agreement, parity, verdict
from fastattn.parity.guards import GuardedTensors, poisoned_outputs, torch_threads

Tensors = Mapping[str, Tensor]

SMALL = 2.0**-12
"""The second factor of the output gradient: it finds kernels whose backward underflows."""


@dataclass(frozen=True)
class Probe:
    """One call of an operation, written as the computations that the rule compares.

    dtype: the tested dtype, which gives u for gradients (outputs are held to their own). fused, truth, eager: from
    named inputs to named outputs. magnitudes: from float64 inputs and output gradients (a missing one is absent) to T
    of every output and every input's gradient. clean: what the truths see of the inputs (the same, but for keys that
    hold NaN because no query may see them). group_dims: as in `parity`, per name. same_layout: the inputs, if dense,
    whose gradient has their strides.
    float32_outputs: statistics that are float32 beside half inputs, whose yardstick is eager run in float32.
    settle: last word on the output gradients (zero where a derivative is undecided). form: from the outputs to
    sentences on what is wrong with their dtype or memory layout.
    """

    dtype: torch.dtype
    fused: Callable[[Tensors], dict[str, Tensor]]
    truth: Callable[[Tensors], dict[str, Tensor]]
    eager: Callable[[Tensors], dict[str, Tensor]]
    magnitudes: Callable[[Tensors, Tensors], dict[str, Tensor]]
    clean: Callable[[Tensors], dict[str, Tensor]] = dict
    group_dims: Callable[[str, Tensor], int] = lambda _name, _tensor: 0
    same_layout: frozenset[str] = frozenset()
    float32_outputs: frozenset[str] = frozenset()
    settle: Callable[[Tensors, dict[str, Tensor]], dict[str, Tensor]] = lambda _inputs, grads: grads
    form: Callable[[Tensors], list[str]] = lambda _outputs: []


@dataclass(frozen=True)
class Conditions:
    """How a call is made, apart from what it computes.

    grad: also check the backward. seed: of the output gradients. poison: uninitialised memory holds NaN. shift:
    elements by which every input is moved off its alignment. without_gradient: outputs that get no gradient. frozen:
    inputs whose gradient is not asked for. strided_gradients: output gradients come with gaps and a permuted layout.
    threads: of the backend's calls; None keeps torch's count.
    """

    grad: bool = True
    seed: int = 0
    poison: bool = True
    shift: int = 0
    without_gradient: frozenset[str] = field(default_factory=frozenset)
    frozen: frozenset[str] = field(default_factory=frozenset)
    strided_gradients: bool = False
    threads: int | None = None

    @contextmanager
    def under_test(self, backend: str | None) -> Iterator[None]:
        """What surrounds every call of the backend, forward and backward."""
        with use_backend(backend), poisoned_outputs(self.poison), torch_threads(self.threads):
            yield


def named(**tensors: Tensor | None) -> dict[str, Tensor]:
    """Those that are given."""
    return {name: t for name, t in tensors.items() if t is not None}


def differentiable(tensors: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    """The same tensors; the floating ones (those named, or all) as leaves that require grad."""
    return {
        name: t.detach().requires_grad_() if t.is_floating_point() and (not names or name in names) else t
        for name, t in tensors.items()
    }


def run_probe(probe: Probe, inputs: Tensors, backend: str | None, conditions: Conditions) -> list[ParityRow]:
    """Runs one probe and returns a row per output, per gradient (twice), and for layout, guards and the truth itself.

    inputs: named tensors; the floating ones that require grad are differentiated. Raises fastattn.NotSupported where
    the backend refuses the call.
    """
    learned = [name for name, t in inputs.items() if t.requires_grad and name not in conditions.frozen]
    wanted = learned if conditions.grad else []
    guards = GuardedTensors(conditions.shift)
    guarded = {name: guards.embed(name, t if name in wanted else t.detach()) for name, t in inputs.items()}
    with conditions.under_test(backend), torch.set_grad_enabled(bool(wanted)):
        outputs = probe.fused(guarded)
    clean = probe.clean({name: t.detach() for name, t in inputs.items()})
    double = {name: _leaf(t.double() if t.is_floating_point() else t, name in wanted) for name, t in clean.items()}
    # Contiguous: torch 2.13 on AMX reads behind the rows of strided bfloat16, and a NaN there is no yardstick.
    tested = {name: _leaf(t.contiguous(), name in wanted) for name, t in clean.items()}
    ref, eager, eager64 = probe.truth(double), probe.eager(tested), probe.eager(double)
    yardstick = dict(eager)
    if probe.float32_outputs and any(t.dtype != torch.float32 for t in eager.values()):
        single = {name: t.detach().float() if t.is_floating_point() else t for name, t in clean.items()}
        yardstick |= {name: t for name, t in probe.eager(single).items() if name in probe.float32_outputs}

    grads = _output_gradients(outputs, double, probe, conditions)
    plain64 = {name: t.detach() for name, t in double.items()}
    magnitudes = probe.magnitudes(plain64, grads)
    rows = [
        parity(n, x, ref[n], yardstick[n], magnitudes[n], group_dims=probe.group_dims(n, x)) for n, x in outputs.items()
    ]
    truths = [(n, ref[n].detach(), eager64[n].detach(), magnitudes[n]) for n in outputs]
    layout = probe.form(outputs)
    for factor, suffix in ((1.0, ""), (SMALL, " * 2^-12")) if wanted else ():
        scaled = {n: g * factor for n, g in grads.items()}
        given = {n: _as_given(guards, n, g, conditions) for n, g in scaled.items()}
        with conditions.under_test(backend):
            got = _backward(outputs, given, guarded, wanted)
        want, base = _backward(ref, scaled, double, wanted), _backward(eager, scaled, tested, wanted)
        for n in wanted:
            shown, size = f"d{n}{suffix}", magnitudes["d" + n] * factor
            if got[n].dtype != inputs[n].dtype:
                layout.append(f"d{n} is {got[n].dtype}, its input {inputs[n].dtype}")
            if n in probe.same_layout and not _same_strides(got[n], guarded[n]):
                layout.append(f"d{n} has strides {got[n].stride()}, {n} {guarded[n].stride()}")
            groups = probe.group_dims(n, got[n])
            rows.append(parity(shown, got[n], want[n], base[n], size, group_dims=groups, dtype=probe.dtype))
        if factor == 1.0:
            want64 = _backward(eager64, scaled, double, wanted)
            truths += [("d" + n, want[n], want64[n], magnitudes["d" + n]) for n in wanted]
    rows.append(agreement(truths))
    rows.append(verdict("layout", "; ".join(layout) or None))
    damaged = guards.damage()
    rows.append(verdict("guards", f"written outside its outputs: {', '.join(damaged)}" if damaged else None))
    return rows


def _same_strides(grad: Tensor, dense: Tensor) -> bool:
    """Whether a gradient lies in memory like its input; an input with gaps or overlaps asks for nothing."""
    dims = [d for d in range(dense.dim()) if dense.size(d) != 1]
    extent = 1
    for d in sorted(dims, key=dense.stride):
        if dense.stride(d) != extent:
            return True
        extent *= dense.size(d)
    return grad.shape != dense.shape or all(grad.stride(d) == dense.stride(d) for d in dims)


def _leaf(tensor: Tensor, requires_grad: bool) -> Tensor:
    return tensor.detach().requires_grad_(requires_grad)


def _output_gradients(outputs: Tensors, double: Tensors, probe: Probe, conditions: Conditions) -> dict[str, Tensor]:
    """A normal random gradient in each output's dtype, but for the outputs that are to get none."""
    generator = torch.Generator().manual_seed(conditions.seed)
    grads = {
        name: torch.randn(out.shape, generator=generator).to(out)
        for name, out in outputs.items()
        if name not in conditions.without_gradient
    }
    return probe.settle({name: t.detach() for name, t in double.items()}, grads)


def _as_given(guards: GuardedTensors, name: str, grad: Tensor, conditions: Conditions) -> Tensor:
    if conditions.strided_gradients and grad.dim() >= 2:
        gapped = grad.new_zeros((*grad.transpose(0, -2).shape[:-1], 2 * grad.size(-1)))
        view = gapped.transpose(0, -2)[..., ::2]
        view.copy_(grad)
        grad = view
    return guards.embed(f"gradient of {name}", grad)


def _backward(outputs: Tensors, grads: Tensors, leaves: Tensors, wanted: Sequence[str]) -> dict[str, Tensor]:
    """Gradients of the wanted leaves; zero where autograd finds no path."""
    pairs = [(outputs[n], g.to(outputs[n].dtype)) for n, g in grads.items() if outputs[n].requires_grad]
    if not pairs:
        return {n: torch.zeros_like(leaves[n]) for n in wanted}
    found = torch.autograd.grad(
        [out for out, _ in pairs],
        [leaves[n] for n in wanted],
        [grad for _, grad in pairs],
        allow_unused=True,
        retain_graph=True,
    )
    return {n: torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(wanted, found, strict=True)}
