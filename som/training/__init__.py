"""Exported by tools/export.py from book/training: one module a chapter."""
