"""The score field of eight modes.

Exported by tools/export.py from book/studies/score_field.md; edit the chapter.
"""

__all__ = [
    "quadrature_score",
    "plane",
    "ESTIMATORS",
    "score_field",
    "relative_error",
    "flow_paths",
    "diffused_density",
    "PLAYER",
    "flow_player",
]

# %% Imports
import base64
import hashlib
import json
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from som.theory.boltzmann import GaussianMixture, box_grid
from som.theory.probability_flow import integrate
from som.theory.score import (
    Energy,
    box_score,
    combined_score,
    idem_score,
)
from som.theory.sde import SDE


# %% Two references
def quadrature_score(
    energy: Energy, a_t: Float[Array, "P 2"], t, sde: SDE, cells: int = 128
) -> Float[Array, "P 2"]:
    """Score of exp(energy) 1[box] diffused to time t, by a sum over cells.

    Args:
        energy: alpha * Q, maps [..., 2] to [...].
        a_t: noisy actions, [P, 2].
        t: diffusion time, scalar; sigma(t)/m(t) no less than a cell.
        sde: forward SDE.
        cells: along each axis of the box.

    Returns:
        Gradient of log p_t, [P, 2].
    """
    side = (2 * jnp.arange(cells) + 1.0) / cells - 1
    energies = energy(box_grid(cells))  # [a_2, a_1]
    weights = jnp.exp(energies - jnp.max(energies))
    m, std = sde.mean(t), sde.std(t)
    logits = -0.5 * ((a_t[..., None] - m * side) / std) ** 2
    across, up = jnp.moveaxis(jax.nn.softmax(logits, -1), 1, 0)  # [P, cells]
    columns, rows = up @ weights, across @ weights.T
    total = jnp.sum(columns * across, -1, keepdims=True)
    means = jnp.stack([(columns * across) @ side, (rows * up) @ side], -1)
    return (m * means / total - a_t) / std**2


# %% All estimators on one grid
def plane(half: float, size: int) -> Float[Array, "P 2"]:
    """Points of a regular grid of [-half, half]^2, row by row."""
    line = jnp.linspace(-half, half, size)
    return jnp.stack(jnp.meshgrid(line, line), -1).reshape(-1, 2)


ESTIMATORS = {
    "idem": idem_score,
    "box": box_score,
    "combined": combined_score,
}


def score_field(
    energy: Energy,
    points: Float[Array, "P 2"],
    t,
    sde: SDE,
    key: jax.Array,
    num_samples: int,
) -> dict[str, Float[Array, "P 2"]]:
    """The score at many points: by quadrature and by every estimator.

    Args:
        energy: alpha * Q, maps [..., 2] to [...].
        points: noisy actions, [P, 2].
        t: diffusion time, scalar.
        sde: forward SDE.
        key: random key; every point has its own guesses.
        num_samples: K, guesses per point.

    Returns:
        Fields [P, 2] by name: "quadrature", "idem", "box", "combined".
    """
    keys = jax.random.split(key, len(points))
    fields = {"quadrature": quadrature_score(energy, points, t, sde)}
    for name, estimator in ESTIMATORS.items():
        fields[name] = jax.vmap(
            lambda a, key, f=estimator: f(energy, a, t, sde, key, num_samples)
        )(points, keys)
    return fields


def relative_error(
    estimate: Float[Array, "P 2"], truth: Float[Array, "P 2"]
) -> Float[Array, ""]:
    """Median over the points of the error's length over the truth's."""
    length = lambda x: jnp.linalg.norm(x, axis=-1)
    return jnp.median(length(estimate - truth) / length(truth))


# %% Watch it
def flow_paths(
    velocity_fn: Callable, a_1: Float[Array, "P 2"], frames: int, steps: int
) -> Float[Array, "F P 2"]:
    """Follow particles from t = 1 to t = 0 and note where they are.

    Args:
        velocity_fn: maps (a [P, 2], t) to [P, 2].
        a_1: particles at t = 1, [P, 2].
        frames: intervals between notes; F = frames + 1.
        steps: Heun steps in each interval.

    Returns:
        Positions at F equally spaced times from 1 to 0, [F, P, 2].
    """
    length = 1.0 / frames

    def segment(a, start):
        def stretched(a, s):  # s from 1 to 0 is t from start down
            return length * velocity_fn(a, start - length * (1 - s))

        a = integrate(stretched, a, steps)
        return a, a

    starts = 1 - length * jnp.arange(frames)
    later = jax.lax.scan(segment, a_1, starts)[1]
    return jnp.concatenate([a_1[None], later])


def diffused_density(
    energy: Energy, half: float, size: int, t, sde: SDE, cells: int = 128
) -> Float[Array, "G G"]:
    """p_t of exp(energy) on the box, on the grid of `plane`, maximum 1."""
    side = (2 * jnp.arange(cells) + 1.0) / cells - 1
    line = jnp.linspace(-half, half, size)
    std = jnp.maximum(sde.std(t), 1.0 / cells)
    gaps = (line[:, None] - sde.mean(t) * side) / std
    kernel = jnp.exp(-0.5 * gaps**2)
    energies = energy(box_grid(cells))
    weights = jnp.exp(energies - jnp.max(energies))
    density = kernel @ weights @ kernel.T
    return density / jnp.max(density)


PLAYER = """<div class="som-flow" id="@ID">
<style>
#@ID {max-width: 30rem; margin: 0 auto; padding: .3rem; color: inherit}
#@ID canvas {display: block; width: 100%; aspect-ratio: 1;
  border: 1px solid #8888}
#@ID p {display: flex; flex-wrap: wrap; gap: .6rem; align-items: center;
  margin: .5rem 0}
#@ID input {flex: 1 1 8rem; min-width: 0}
#@ID select {max-width: 100%}
#@ID output {min-width: 4.2rem; font-variant-numeric: tabular-nums}
@media print {#@ID p {display: none}}
</style>
<canvas width="720" height="720" role="img" aria-label="@LABEL"></canvas>
<p><button type="button">Play</button>
<input type="range" min="0" max="1" step="0.005" value="0"
  aria-label="from noise, t = 1, to action, t = 0">
<output></output></p>
<p><select aria-label="velocity field"></select><span></span></p>
<noscript>The player needs JavaScript; a still picture follows.</noscript>
<script>
(() => {
  const data = @DATA;
  const root = document.getElementById("@ID");
  const find = (name) => root.querySelector(name);
  const [canvas, button, slider, shown, choice, count] =
    ["canvas", "button", "input", "output", "select", "span"].map(find);
  const ink = canvas.getContext("2d"), size = canvas.width;
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const backs = data.backs.map(bytes);
  const flows = data.flows.map((flow) => {
    const at = new Int16Array(bytes(flow.paths).buffer);
    const x = (f, i) => at[2 * (f * data.particles + i)] / 4096;
    const y = (f, i) => at[2 * (f * data.particles + i) + 1] / 4096;
    return {x, y, back: backs[flow.back]};
  });
  for (const [i, flow] of data.flows.entries())
    choice.add(new Option(flow.name, i));
  const pixel = (v) => (v / data.half + 1) / 2 * size;
  const row = (v) => size - pixel(v);
  const hit = (x, y) =>
    data.marks.some(([a, b]) => Math.hypot(x - a, y - b) < data.radius);
  const tile = document.createElement("canvas");
  tile.width = tile.height = data.grid;
  const paint = tile.getContext("2d");
  const image = paint.createImageData(data.grid, data.grid);

  function draw() {
    const flow = flows[choice.value], cells = data.grid ** 2;
    const when = slider.value * (data.frames - 1);
    const f = Math.min(Math.floor(when), data.frames - 2), part = when - f;
    const mix = (read, i, g, w) => (1 - w) * read(g, i) + w * read(g + 1, i);
    for (let c = 0; c < cells; c++) {
      const level = (1 - part) * flow.back[f * cells + c]
        + part * flow.back[(f + 1) * cells + c];
      image.data.set([0, 114, 178, 0.75 * level], 4 * c);
    }
    paint.putImageData(image, 0, 0);
    ink.clearRect(0, 0, size, size);
    ink.save();
    ink.scale(1, -1);
    ink.drawImage(tile, 0, -size, size, size);
    ink.restore();
    ink.strokeStyle = "#888";
    ink.setLineDash([8, 6]);
    ink.strokeRect(pixel(-1), row(1), pixel(1) - pixel(-1), row(-1) - row(1));
    ink.setLineDash([]);
    let hits = 0;
    for (let i = 0; i < data.particles; i++) {
      const x = mix(flow.x, i, f, part), y = mix(flow.y, i, f, part);
      const last = data.frames - 1;
      const good = hit(flow.x(last, i), flow.y(last, i));
      hits += hit(x, y);
      ink.strokeStyle = ink.fillStyle = good ? "#d55e00" : "#999";
      ink.globalAlpha = 0.5;
      ink.beginPath();
      ink.moveTo(pixel(x), row(y));
      for (let g = f; g > f - 3 && g >= 0; g--)
        ink.lineTo(pixel(flow.x(g, i)), row(flow.y(g, i)));
      ink.stroke();
      ink.globalAlpha = 1;
      ink.beginPath();
      ink.arc(pixel(x), row(y), 5, 0, 7);
      ink.fill();
    }
    shown.textContent = "t = " + (1 - slider.value).toFixed(2);
    slider.setAttribute("aria-valuetext", shown.textContent);
    count.textContent = Math.round(100 * hits / data.particles)
      + " % on tall modes";
  }

  let before = null;
  function frame(now) {
    if (before === null) return;
    slider.value = +slider.value + (now - before) / 6000;
    before = slider.value < 1 ? now : null;
    if (before === null) button.textContent = "Play again";
    draw();
    requestAnimationFrame(frame);
  }
  button.onclick = () => {
    const start = before === null;
    if (start && slider.value >= 1) slider.value = 0;
    before = start ? performance.now() : null;
    button.textContent = start ? "Pause" : "Play";
    if (start) requestAnimationFrame(frame);
  };
  slider.oninput = choice.onchange = draw;
  draw();
})();
</script>
</div>
"""


def flow_player(
    flows: dict[str, tuple], marks, radius: float, half: float, label: str
) -> str:
    """A page of HTML that plays particles over a density, without network.

    Args:
        flows: by name, paths [F, P, 2] from t = 1 to 0 and densities
            [F, G, G] in [0, 1] on `plane(half, G)`; shapes shared by all.
        marks: centres of the modes that count as hits, [M, 2].
        radius: distance within which a particle is on a mode.
        half: the picture shows [-half, half]^2.
        label: what the canvas shows, for those who cannot see it.

    Returns:
        HTML, with its own style and script.
    """
    encode = lambda x: base64.b64encode(x.tobytes()).decode()
    backs, listed = [], []
    for name, (paths, densities) in flows.items():
        back = encode(np.uint8(255 * np.sqrt(densities)))
        if back not in backs:
            backs.append(back)
        fixed = np.clip(4096 * np.asarray(paths), -32767, 32767)
        listed.append(
            {
                "name": name,
                "paths": encode(fixed.astype("<i2")),
                "back": backs.index(back),
            }
        )
    frames, particles = np.shape(paths)[:2]
    data = {
        "flows": listed,
        "backs": backs,
        "frames": frames,
        "particles": particles,
        "grid": np.shape(densities)[-1],
        "marks": np.round(marks, 4).tolist(),
        "radius": radius,
        "half": half,
    }
    text = json.dumps(data)
    name = "flow-" + hashlib.sha256(text.encode()).hexdigest()[:8]
    page = PLAYER.replace("@LABEL", label).replace("@ID", name)
    return page.replace("@DATA", text)
