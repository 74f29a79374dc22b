"""Who runs whole models: torch as it is, compiled, frozen, ONNX Runtime, OpenVINO, and fastattn.swap."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastattn
from fastattn.bench.cases.base import Case
from fastattn.bench.cases.model import ModelCase, plain_torch, run_once
from fastattn.bench.providers.base import Inputs, Job, Provider
from fastattn.bench.providers.compiled import compile_fresh, no_compiler

_LEARNING_RATE = 1e-3


class ModelProvider(Provider):
    """A way to run a model. `make` returns what is called with the model's inputs, and a note. keeps_memory: of
    inference, as in Job."""

    suites = frozenset({"model"})
    models: tuple[str, ...] = ("bert", "encoder")
    trains = True
    keeps_memory = False

    def serves(self, case: Case) -> bool:
        return isinstance(case, ModelCase) and case.model in self.models

    def refuses(self, case: Case, direction: str) -> str | None:
        assert isinstance(case, ModelCase)
        if case.model == "bert" and importlib.util.find_spec("transformers") is None:
            return "transformers is not installed"
        return None if self.trains or direction == "forward" else "it is for inference only"

    def make(self, case: ModelCase) -> tuple[Any, str]:
        """The model as this provider runs it."""
        raise NotImplementedError

    def job(self, case: Any, direction: str, inputs: Inputs) -> Job:
        """Inference without gradients, or a training step whose answers are checked with dropout off."""
        assert isinstance(case, ModelCase)
        model, note = self.make(case)
        given = case.inputs()
        if direction == "forward":
            kept = self.keeps_memory
            return Job(lambda: (case.output(model(**given)),), ("out",), keeps_memory=kept, note=note)
        return _training_job(case, model, given, note)


def _training_job(case: ModelCase, model: nn.Module, given: dict[str, Tensor], note: str) -> Job:
    optimizer = torch.optim.SGD(model.parameters(), lr=_LEARNING_RATE)
    grad = case.output_gradient()
    model.train()

    def step() -> tuple[Tensor, ...]:
        optimizer.zero_grad(set_to_none=True)
        out = case.output(model(**given))
        out.backward(grad)
        optimizer.step()
        return (out.detach(),)

    out, grads = run_once(case, model, given, backward=True)
    checked = (out.detach(), *grads.values())
    step()  # what is timed has run before: of a compiled model it compiles here
    return Job(step, ("out", *grads), grad=True, verify=lambda: checked, note=note)


class TransformersEager(ModelProvider):
    """transformers with its attention written out."""

    name = "transformers eager"
    package = "transformers"
    models = ("bert",)

    def make(self, case: ModelCase) -> tuple[Any, str]:
        return case.build("eager"), ""


class TorchModel(ModelProvider):
    """transformers on torch's SDPA, or torch.nn with its fast path on: what a user has without doing anything."""

    name = "torch as it is"

    def make(self, case: ModelCase) -> tuple[Any, str]:
        return case.build(), "transformers sdpa" if case.model == "bert" else "torch.nn, fast path on"


class CompiledModel(ModelProvider):
    """torch.compile of the model as it is."""

    name = "torch.compile"
    compiles = True

    def unavailable_reason(self, device: str) -> str | None:
        return no_compiler(device)

    def make(self, case: ModelCase) -> tuple[Any, str]:
        model = case.build()
        model.compile(dynamic=False)
        return model, ""


class FrozenModel(ModelProvider):
    """torch.compile with freezing: weights are constants, and may be packed."""

    name = "torch.compile (freezing)"
    compiles = True
    trains = False

    def unavailable_reason(self, device: str) -> str | None:
        return no_compiler(device)

    def make(self, case: ModelCase) -> tuple[Any, str]:
        return compile_fresh(case.build(), options={"freezing": True}), ""


class _Exported(ModelProvider):
    """A runtime of its own, for inference on CPUs."""

    trains = False
    keeps_memory = True

    def unavailable_reason(self, device: str) -> str | None:
        if device != "cpu":
            return "it takes part on CPUs"
        return None if importlib.util.find_spec(self.package) else f"{self.package} is not installed"

    def exportable(self, case: ModelCase) -> tuple[nn.Module, dict[str, Tensor]]:
        """The model called by position, and its inputs."""
        given = case.inputs()
        return _Positional(case.build(), tuple(given), case.output).eval(), given


class OnnxRuntime(_Exported):
    """The model exported to ONNX, on ONNX Runtime's CPU provider with torch's number of threads."""

    name = "ONNX Runtime"
    package = "onnxruntime"

    def unavailable_reason(self, device: str) -> str | None:
        missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
        reason = super().unavailable_reason(device)
        return reason or (f"exporting needs {' and '.join(missing)}" if missing else None)

    def make(self, case: ModelCase) -> tuple[Any, str]:
        import onnxruntime

        model, given = self.exportable(case)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "model.onnx"
            with _quiet_export():
                torch.onnx.export(
                    model, tuple(given.values()), str(target), input_names=list(given), dynamo=True, verbose=False
                )
            session = onnxruntime.InferenceSession(str(target), options, providers=["CPUExecutionProvider"])
        names = [node.name for node in session.get_inputs()]
        arrays = {name: given[name].numpy() for name in names}

        def call(**_given: Tensor) -> Tensor:
            return torch.from_numpy(session.run(None, arrays)[0])

        return call, ""


class OpenVino(_Exported):
    """The model converted by OpenVINO, on its CPU plugin in float32 with torch's number of threads."""

    name = "OpenVINO"
    package = "openvino"

    def make(self, case: ModelCase) -> tuple[Any, str]:
        import openvino

        model, given = self.exportable(case)
        with _quiet_export(), torch.no_grad():
            converted = openvino.convert_model(model, example_input=tuple(given.values()))
        settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino.compile_model(converted, "CPU", settings)
        arrays = [tensor.numpy() for tensor in given.values()]

        def call(**_given: Tensor) -> Tensor:
            return torch.from_numpy(compiled(arrays)[0])

        return call, ""


@contextlib.contextmanager
def _quiet_export() -> Iterator[None]:
    """Inside, torch.nn's encoder layers are plain modules, for no exporter knows their fused operator, and neither
    tracing nor exporting talks about what the model does not use."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), plain_torch():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class _Positional(nn.Module):
    """A model called by position that returns its hidden states, as exporters want it."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], output: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.model, self.names, self.output = model, names, output

    def forward(self, *given: Tensor) -> Tensor:
        return self.output(self.model(**dict(zip(self.names, given, strict=True))))


class Swapped(ModelProvider):
    """The model after fastattn.swap; the note says what it took over. In inference whole encoder layers share one
    workspace, which the library keeps."""

    name = "fastattn swap"
    ours = True
    keeps_memory = True

    def make(self, case: ModelCase) -> tuple[Any, str]:
        model = case.build()
        report = fastattn.swap(model)
        swapped = Counter(row.class_name for row in report.rows if row.action == "swapped")
        said = ", ".join(f"{count} {name}" for name, count in swapped.items())
        return model, f"swapped: {said}" if said else "swap found nothing to take over"


MODEL_PROVIDERS: tuple[Provider, ...] = (
    Swapped(),
    TransformersEager(),
    TorchModel(),
    CompiledModel(),
    FrozenModel(),
    OnnxRuntime(),
    OpenVino(),
)
