"""The score field: references agree, estimators are ranked, the player is whole."""

import json
import re
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from som.studies.score_field import (
    diffused_density,
    flow_paths,
    flow_player,
    plane,
    quadrature_score,
    relative_error,
    score_field,
)
from som.theory.boltzmann import GaussianMixture, eight_gaussians
from som.theory.sde import VP

SDE = VP(0.1, 6.0)
MIXTURE = eight_gaussians()
INSIDE = GaussianMixture(0.6 * MIXTURE.means, MIXTURE.weights, 0.1)


@pytest.mark.parametrize("t", [0.1, 1.0])
def test_quadrature_is_the_closed_form_inside_the_box(t):
    points = plane(0.9, 7)
    closed = INSIDE.score(points, SDE.mean(t), SDE.std(t))
    by_cells = quadrature_score(INSIDE.log_prob, points, t, SDE)
    np.testing.assert_allclose(by_cells, closed, rtol=2e-3, atol=2e-3)


def test_quadrature_knows_a_linear_energy_in_an_asymmetric_box():
    # Two axes, two slopes: a swap of a_1 and a_2 would show.
    def energy(a):
        return 3 * a[..., 0] - a[..., 1]

    def one_axis(x, slope, t):
        side = np.linspace(-1, 1, 20_001)
        m, std = float(SDE.mean(t)), float(SDE.std(t))
        w = np.exp(slope * side - 0.5 * ((x - m * side) / std) ** 2)
        return (m * (w * side).sum() / w.sum() - x) / std**2

    got = quadrature_score(energy, jnp.array([[0.2, -0.7]]), 0.4, SDE)[0]
    want = [one_axis(0.2, 3.0, 0.4), one_axis(-0.7, -1.0, 0.4)]
    np.testing.assert_allclose(got, want, rtol=2e-3)


def test_plane_runs_row_by_row():
    points = plane(1.0, 3)
    np.testing.assert_allclose(points[:3], [[-1, -1], [0, -1], [1, -1]])


def test_fields_and_their_errors():
    key = jax.random.PRNGKey(0)
    fields = score_field(MIXTURE.log_prob, plane(0.8, 9), 0.6, SDE, key, 64)
    truth = fields["quadrature"]
    errors = {k: float(relative_error(v, truth)) for k, v in fields.items()}
    assert errors["quadrature"] == 0
    assert errors["combined"] < 0.05 < 1 < errors["idem"]
    assert errors["combined"] < errors["box"] < 0.3
    assert float(relative_error(1.5 * truth, truth)) == pytest.approx(0.5)


def test_flow_paths_of_a_flow_that_is_known():
    # da/dt = 2 t a: a(t) = a_1 exp(t^2 - 1), the velocity depends on t.
    a_1 = jnp.array([[1.0, -2.0], [0.5, 3.0]])
    paths = flow_paths(lambda a, t: 2 * t * a, a_1, 5, 8)
    t = np.linspace(1, 0, 6)[:, None, None]
    np.testing.assert_allclose(paths, a_1 * np.exp(t**2 - 1), rtol=1e-3)


def test_density_is_the_mixtures():
    t, points = 0.3, plane(1.5, 15)
    log_p = INSIDE.log_prob(points, SDE.mean(t), SDE.std(t))
    p = np.exp(log_p - log_p.max()).reshape(15, 15)
    got = diffused_density(INSIDE.log_prob, 1.5, 15, t, SDE)
    np.testing.assert_allclose(got, p, rtol=1e-2, atol=1e-4)


class Page(HTMLParser):
    """Collect tags and attributes, and see that what opens is closed."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag != "input":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_player_is_one_whole_page_without_network():
    paths = np.random.default_rng(0).normal(size=(4, 5, 2))
    backs = np.linspace(0, 1, 4 * 9).reshape(4, 3, 3)
    flows = {"one": (paths, backs), "two": (2 * paths, backs)}
    page = flow_player(flows, np.eye(2), 0.25, 2.5, "particles")
    parser = Page()
    parser.feed(page)
    parser.close()
    assert not parser.open
    tags = [tag for tag, _ in parser.seen]
    assert tags.count("canvas") == tags.count("input") == tags.count("button") == 1
    attributes = [a for _, a in parser.seen]
    assert not any({"src", "href"} & set(a) for a in attributes)
    assert not re.search(r"https?:|import\(|fetch\(", page)
    assert "@" not in re.sub(r"@media", "", page)
    data = json.loads(re.search(r"const data = (.*);", page)[1])
    assert len(data["backs"]) == 1  # shared
    assert (data["frames"], data["particles"], data["grid"]) == (4, 5, 3)
    assert flow_player(flows, np.eye(2), 0.25, 2.5, "particles") == page
