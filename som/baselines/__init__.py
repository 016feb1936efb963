"""Exported by tools/export.py from book/baselines: one module a chapter."""
