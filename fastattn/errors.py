"""The exceptions of the package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_ANOTHER_BACKEND = "Pass backend=None, outside of use_backend, to let fastattn choose another backend."


class NotSupported(RuntimeError):
    """No allowed backend runs this call. `op`, `problem` and `reasons` (backend name to sentences) say why, `remedy`
    what to do."""

    def __init__(
        self, op: str, problem: object, reasons: Mapping[str, Sequence[str]], remedy: str = _ANOTHER_BACKEND
    ) -> None:
        self.op = op
        self.problem = problem
        self.remedy = remedy
        self.reasons = {name: list(why) for name, why in reasons.items()}
        lines = [f"  {name}: {'; '.join(why)}" for name, why in self.reasons.items()]
        super().__init__(
            f"{op} is not supported by {', '.join(self.reasons)}:\n"
            + "\n".join(lines)
            + f"\n  the call: {problem}\n{remedy}"
        )

    def why(self, backend: str | None) -> list[str]:
        """The sentences of one backend, or the whole text where it has none of its own."""
        return self.reasons.get(backend or "") or [str(self)]

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.op, self.problem, self.reasons, self.remedy)
