"""Bridges to other libraries. Each module imports its library; this package imports none."""
