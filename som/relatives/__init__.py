"""Exported by tools/export.py from book/relatives: one module a chapter."""
