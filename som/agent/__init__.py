"""Exported by tools/export.py from book/agent: one module a chapter."""
