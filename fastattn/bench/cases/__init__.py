"""The cases: see `fastattn.bench.cases.grid` for which of them run when."""
