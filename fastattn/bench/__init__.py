"""Benchmarks: the cases, the providers that are timed on them, honest timing, and the reports.

cases/      what is computed: tensors, visible work, and what the result must be
providers/  who computes it: a table of small classes, one per implementation
truth       the float64 results that each provider is held to before it is timed
timing      interleaved rounds; on GPUs CUDA graphs with the L2 cache flushed between replays
limits      what the machine can do at most, measured in the same run
run         verifies, times, measures memory; one row per provider, case and direction
report/     terminal table, Markdown, plots; compare and docs read what run wrote
"""
