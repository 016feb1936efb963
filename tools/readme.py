"""Write what README.md shows of the records: its table, and the picture of nine tasks.

python tools/readme.py            write both
python tools/readme.py --check    exit 1 if the records say something else
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from som.mujoco.locomotion import draw, learning_curves
from som.training.records import mean_ci, read_record

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results: python tools/readme.py -->\n", "<!-- end of results -->\n"
RUN, BALANCE = "HalfCheetah-v4", "InvertedDoublePendulum-v4"
UPRIGHT = 9000  # return of poles that never fall: 9360
HEAD = """\
| `--algo` | HalfCheetah-v4 | 95 % interval | seeds | minutes | pendulum held by |
|---|---:|---:|---:|---:|---:|
"""


def table(folder):
    """Return the table of the records in a folder, the best on the cheetah first."""
    rows = {}
    for path in folder.glob("*.json"):
        for entry in read_record(path)["results"]:
            rows.setdefault(entry["algo"], {})[entry["env"]] = entry
    last = {
        algo: {env: np.array(e["returns"])[:, -1] for env, e in tasks.items()}
        for algo, tasks in rows.items()
    }
    lines = []
    for algo in sorted(rows, key=lambda algo: -last[algo][RUN].mean()):
        mean, low, high = mean_ci(last[algo][RUN])
        minutes = np.median(rows[algo][RUN]["wall_seconds"]) / 60
        held = last[algo][BALANCE] > UPRIGHT
        cells = f"{mean:.0f}", f"{low:.0f} to {high:.0f}", f"{len(last[algo][RUN])}"
        cells += f"{minutes:.0f}" if minutes > 1 else "1", f"{sum(held)} of {len(held)}"
        name = f"**`{algo}`**" if algo == "som" else f"`{algo}`"
        lines.append(f"| {name} | {' | '.join(cells)} |\n")
    return HEAD + "".join(lines)


def main(argv=None, root=ROOT):
    """Write or check the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(argv)
    path = root / "README.md"
    before, _, rest = path.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    new = before + BEGIN + table(root / "book/results/compared") + END + after
    if args.check:
        if new == path.read_text():
            return 0
        print("README.md differs from the records: run `make export`.", file=sys.stderr)
        return 1
    path.write_text(new)
    runs = read_record(root / "book/results/studies/nine-tasks.json")
    picture = Figure()
    draw(picture, learning_curves(runs, "main"))
    picture.savefig(root / "book/_static/nine_tasks.png", dpi=150)
    print("wrote README.md and its picture")
    return 0


if __name__ == "__main__":
    sys.exit(main())
