"""Exported by tools/export.py from book/theory: one module a chapter."""
