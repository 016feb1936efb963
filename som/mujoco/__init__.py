"""Exported by tools/export.py from book/mujoco: one module a chapter."""
