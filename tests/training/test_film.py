"""A film of a policy: complete, or the old one."""

import os

import pytest

from som.training import film


def test_nothing_can_draw(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(film, "_DRAW_NOTHING", "raise SystemExit(1)")
    with pytest.raises(ValueError, match=r"libegl1 and libgl1-mesa-dri.*libosmesa6"):
        film.choose_renderer()
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    with pytest.raises(ValueError, match="MUJOCO_GL=osmesa"):
        film.choose_renderer()


def test_failed_film_leaves_the_old_one(tmp_path, renderer):
    class Broken:
        env_id = "InvertedDoublePendulum-v4"

        def __call__(self, observation):
            raise OSError("No space left on device")

    out = tmp_path / "policy.gif"
    out.write_bytes(b"old")
    with pytest.raises(OSError, match="No space"):
        film.film(Broken(), out, width=16, height=16)
    assert out.read_bytes() == b"old" and os.listdir(tmp_path) == [out.name]
