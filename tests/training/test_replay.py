"""The ring buffer: packing, order, uniformity, and writes that copy nothing."""

from collections import deque
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from som.agent.critic import Transition
from som.training.replay import Replay, add, draw, init, pack, unpack


def numbered(start, count, width=5):
    """Rows that hold their own number, count of them."""
    numbers = jnp.arange(start, start + count, dtype=jnp.float32)
    return jnp.repeat(numbers[:, None], width, 1)


@pytest.mark.parametrize("lead", [(), (4,), (2, 3)])
def test_unpack_undoes_pack(lead):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.normal(size=(*lead, *shape)).astype(np.float32)

    batch = Transition(draw(7), draw(3), draw(), draw() > 0, draw(7))
    rows = pack(batch)
    assert rows.shape == (*lead, 2 * 7 + 3 + 2) and rows.dtype == np.float32
    for name, part in unpack(jnp.asarray(rows), 3)._asdict().items():
        np.testing.assert_array_equal(part, getattr(batch, name))


def test_a_guide_travels_with_its_row():
    s, a = np.ones((4, 3), np.float32), np.zeros((4, 2), np.float32)
    one = np.ones(4, np.float32)
    batch = Transition(s, a, one, 0 * one, 2 * s, a + 5)
    rows = pack(batch)
    assert rows.shape == init(4, 3, 2, guided=True).rows[:4].shape
    back = unpack(jnp.asarray(rows), 2, guided=True)
    for part, kept in zip(back, batch, strict=True):
        np.testing.assert_array_equal(part, kept)


def test_pack_takes_the_widths_of_the_equation():
    assert init(10, 376, 17).rows.shape == (10, 771)


@pytest.mark.parametrize("count", [1, 3, 7])
def test_ring_holds_what_a_deque_holds(count):
    buffer, last = init(7, 1, 1), deque(maxlen=7)
    for start in range(0, 30, count):
        buffer = add(buffer, numbered(start, count))
        last.extend(range(start, start + count))
        held = np.asarray(buffer.rows[: min(int(buffer.added), 7), 0])
        assert sorted(held) == list(last)
        places = [int(k) % 7 for k in held]
        assert places == list(range(len(held)))


def test_add_refuses_more_rows_than_it_holds():
    with pytest.raises(ValueError, match="8 rows are given to a buffer of 7"):
        add(init(7, 1, 1), numbered(0, 8))


def test_init_refuses_an_empty_ring():
    with pytest.raises(ValueError, match="capacity is 0; at least 1 is wanted"):
        init(0, 1, 1)


def test_donated_add_writes_in_place():
    store = jax.jit(add, donate_argnums=0)
    buffer, rows = init(20_000, 10, 2), numbered(0, 5, 24)
    memory = store.lower(buffer, rows).compile().memory_analysis()
    size = buffer.rows.nbytes
    assert memory.alias_size_in_bytes >= size > 100 * memory.temp_size_in_bytes
    address = buffer.rows.unsafe_buffer_pointer()
    after = store(buffer, rows)
    assert after.rows.unsafe_buffer_pointer() == address
    assert buffer.rows.is_deleted() and int(after.added) == 5


def test_draw_is_uniform_over_the_filled_rows():
    buffer = add(init(80, 1, 1), numbered(1000, 50))
    places = jax.jit(jax.vmap(partial(draw, num=100), (None, 0)))
    drawn = places(buffer, jax.random.split(jax.random.key(0), 100))
    numbers = np.asarray(buffer.rows[drawn, 0]).astype(int).ravel() - 1000
    assert numbers.min() >= 0
    counts = np.bincount(numbers, minlength=50)
    assert len(counts) == 50
    assert 0.001 < stats.chisquare(counts).pvalue < 0.999


def test_draws_with_replacement():
    buffer = add(init(4, 1, 1), numbered(0, 2))
    drawn = buffer.rows[draw(buffer, jax.random.key(0), 50)]
    assert drawn.shape == (50, 5)
    assert set(np.asarray(drawn[:, 0])) == {0.0, 1.0}


def test_draw_reaches_every_row_of_a_full_ring():
    buffer = add(add(init(5, 1, 1), numbered(0, 4)), numbered(4, 4))
    drawn = buffer.rows[draw(buffer, jax.random.key(0), 200), 0]
    assert set(np.asarray(drawn)) == {3.0, 4.0, 5.0, 6.0, 7.0}


def test_seeds_side_by_side_are_seeds_alone():
    rows = jnp.stack([numbered(0, 6), numbered(100, 6)])
    one = init(4, 1, 1)
    both = jax.tree.map(lambda x: jnp.stack([x, x]), one)
    keys = jax.random.split(jax.random.key(0), 2)
    places = partial(draw, num=9)
    both = jax.vmap(add)(both, rows[:, :3])
    both = jax.vmap(add)(both, rows[:, 3:])
    drawn = jax.vmap(places)(both, keys)
    for i in range(2):
        alone = add(add(one, rows[i, :3]), rows[i, 3:])
        assert isinstance(alone, Replay)
        np.testing.assert_array_equal(alone.rows, both.rows[i])
        np.testing.assert_array_equal(places(alone, keys[i]), drawn[i])
