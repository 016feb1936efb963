"""Exported by tools/export.py from book/studies: one module a chapter."""
