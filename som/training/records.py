"""Records.

Exported by tools/export.py from book/training/records.md; edit the chapter.
"""

__all__ = [
    "CheckpointError",
    "make_folder",
    "write_atomically",
    "save",
    "as_json",
    "read_metadata",
    "load",
    "source_hash",
    "provenance",
    "write_record",
    "read_record",
    "read_run",
    "mean_ci",
    "begun",
    "make_arms",
    "in_words",
    "Table",
    "iqm",
    "bootstrap_ci",
    "curve_arrays",
    "plot_curves",
]

import datetime
import hashlib
import html
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import struct
import subprocess
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from scipy.special import stdtrit


# %% All or nothing
class CheckpointError(ValueError):
    """A file cannot be written, or is not what it should be; one sentence."""


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, where they are missing.

    Raises:
        CheckpointError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"cannot write into {path}: {error.strerror or error}."
        ) from error


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file so that its name never stands for half of it.

    Args:
        path: the file; missing folders are made, an old file is replaced.
        write: gets an open binary file and writes into it.

    Raises:
        CheckpointError: the file cannot be written; an old one is intact.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    make_folder(path.parent)
    try:
        try:
            with open(unfinished, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        finally:
            for rest in path.parent.glob(f".{path.name}.*.unfinished"):
                rest.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        kept = "; the previous file is intact" if path.is_file() else ""
        raise CheckpointError(
            f"cannot write {path}: {error.strerror or error}{kept}."
        ) from error


# %% One file, no code
def _named_leaves(tree: Any) -> dict[str, Any]:
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"tree" + jax.tree_util.keystr(p): leaf for p, leaf in pairs}


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype


def _numeric(name: str, leaf: Any) -> np.ndarray:
    dtype = _dtype(leaf)
    if getattr(dtype, "kind", "O") not in "biuf":
        raise ValueError(
            f"a checkpoint holds numbers and booleans, not {name} of type "
            f"{dtype} (write a typed PRNG key with jax.random.key_data)."
        )
    return np.asarray(leaf)


def _digest(leaves: dict[str, np.ndarray]) -> Any:
    """One number for all arrays under their names."""
    code = 0
    for name in sorted(leaves):
        array = leaves[name]
        code = zlib.crc32(name.encode(), code)
        for part in array if array.ndim > 2 else [array]:  # copies less
            code = zlib.crc32(np.ascontiguousarray(part).tobytes(), code)
    return np.uint32(code)


def save(path: str | Path, tree: Any, metadata: dict[str, Any]) -> None:
    """Write a pytree and its metadata to one file, atomically.

    Args:
        path: the file; missing folders are made, an old file is replaced.
        tree: pytree whose leaves are numbers, NumPy or JAX arrays.
        metadata: anything JSON can hold.

    Raises:
        CheckpointError: the file cannot be written; an old one is intact.
        ValueError: a leaf is not a number or a boolean.
    """
    leaves = {k: _numeric(k, v) for k, v in _named_leaves(tree).items()}
    leaves["digest"] = _digest(leaves)
    leaves["metadata"] = np.frombuffer(_to_json(metadata), np.uint8)
    write_atomically(
        Path(path), lambda file: np.savez(file, allow_pickle=False, **leaves)
    )


def as_json(value: Any) -> Any:
    """A value as JSON gives it back, with None for what is not finite.

    Args:
        value: dictionaries, lists, tuples, strings, numbers, arrays.

    Raises:
        ValueError: something else.
    """
    if isinstance(value, dict):
        return {str(k): as_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return as_json(value.tolist())
    raise ValueError(f"JSON cannot hold a {type(value).__name__}.")


def _to_json(value: dict[str, Any], indent: int | None = None) -> bytes:
    text = json.dumps(as_json(value), indent=indent, allow_nan=False)
    numbers = r"\[\n\s*([^\[\]{}\"]*?)\n\s*\]"  # strings hold no newline
    text = re.sub(numbers, lambda m: f"[{' '.join(m[1].split())}]", text)
    return (text + "\n").encode()


_UNREADABLE = (
    OSError, ValueError, EOFError, KeyError, IndexError, MemoryError,
    NotImplementedError, RuntimeError, struct.error,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def _read(path: Path, names: Callable[[str], bool]) -> dict[str, np.ndarray]:
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint at {path}.")
    try:
        _check_file(path)
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            stored = [n.removesuffix(".npy") for n in archive.namelist()]
            if "metadata" not in stored:
                raise ValueError("no metadata")
            _check_sizes(archive, os.fstat(file.fileno()).st_size)
            arrays = {}
            for name in filter(names, stored):
                with archive.open(name + ".npy") as entry:
                    arrays[name] = np.lib.format.read_array(
                        entry, allow_pickle=False
                    )
                    entry.read()  # the CRC is checked past the last byte
            return arrays
    except _UNREADABLE as error:
        raise CheckpointError(
            f"{path} is not a complete checkpoint of this package "
            f"({type(error).__name__}: {str(error).splitlines()[0][:80]})."
        ) from error


def _check_file(path: Path) -> None:
    """Refuse what is no file: reading a pipe or a device has no end."""
    if not path.is_file():
        raise ValueError("it is not a file")


def _check_sizes(archive: zipfile.ZipFile, size: int) -> None:
    """Refuse an archive that unpacks to more than it is."""
    entries = archive.infolist()
    if len({entry.filename for entry in entries}) < len(entries):
        raise ValueError("two entries of one name")
    packed = any(e.compress_type != zipfile.ZIP_STORED for e in entries)
    if packed or sum(entry.file_size for entry in entries) > size:
        raise ValueError("entries are compressed, or longer than the file")


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _parse_metadata(path: Path, data: np.ndarray) -> dict[str, Any]:
    try:
        text = data.astype(np.uint8).tobytes().decode()
        metadata = json.loads(text, parse_constant=_no_number)
        if not isinstance(metadata, dict):
            raise ValueError("the metadata is not a JSON object")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not a checkpoint of this package: its metadata "
            "cannot be read."
        ) from error
    return metadata


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata of a checkpoint, without its arrays.

    Args:
        path: a file that `save` wrote.

    Returns:
        The dictionary given to `save` (not-a-number has become None).

    Raises:
        CheckpointError: no such file, or not a checkpoint.
    """
    path = Path(path)
    entry = _read(path, lambda name: name == "metadata")
    return _parse_metadata(path, entry["metadata"])


def load(path: str | Path, like: Any) -> tuple[Any, dict[str, Any]]:
    """Read a pytree with the structure of `like`, and its metadata.

    Args:
        path: a file that `save` wrote.
        like: pytree with the structure, shapes and types to expect; its
            leaves may be arrays or `jax.ShapeDtypeStruct` (values unused).
            A stored number may be wider or narrower, and takes its type.

    Returns:
        The tree, NumPy arrays at its leaves, and the metadata.

    Raises:
        CheckpointError: no such file, not a checkpoint, or one of a tree
            with other names, shapes or kinds of numbers.
    """
    path = Path(path)
    stored = _read(path, lambda name: True)
    metadata = _parse_metadata(path, stored.pop("metadata"))
    digest = stored.pop("digest", None)  # older files have none
    wanted = _named_leaves(like)
    for name in sorted(set(wanted) ^ set(stored)):
        where = "lacks" if name in wanted else "has an unexpected entry"
        raise CheckpointError(
            f"{path} is a checkpoint of something else: it {where} {name}."
        )
    for name, leaf in wanted.items():
        array, dtype = stored[name], _dtype(leaf)
        if (array.shape, array.dtype.kind) != (np.shape(leaf), dtype.kind):
            raise CheckpointError(
                f"{path} is a checkpoint of another size: {name} is "
                f"{array.dtype}{list(array.shape)}, not "
                f"{dtype}{list(np.shape(leaf))}."
            )
    if digest is not None and not np.array_equal(digest, _digest(stored)):
        raise CheckpointError(
            f"{path} is damaged: its arrays are not those that were saved."
        )
    leaves = [
        stored[name].astype(_dtype(leaf), copy=False)
        for name, leaf in wanted.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves), metadata


# %% Where a number comes from
_PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "numpy", "mujoco", "gymnasium",
)  # fmt: skip


def _package_folder() -> Path:
    spec = importlib.util.find_spec("som")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("the package som is not importable.")
    return Path(spec.submodule_search_locations[0])


def source_hash() -> str:
    """Sixteen hexadecimal digits that name the source of `som/**/*.py`."""
    folder, digest = _package_folder(), hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0")
        digest.update(file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _commit() -> str | None:
    root = _package_folder().parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def provenance() -> dict[str, Any]:
    """What is needed to trace a number: code, versions, machine, date.

    Returns:
        A flat dictionary for JSON; what cannot be found out is None.
    """
    return {
        "commit": _commit(),
        "source": source_hash(),
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "device": jax.devices()[0].device_kind,
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(
            timespec="seconds"
        ),
    }


def write_record(path: str | Path, record: dict[str, Any]) -> None:
    """Write a run record as JSON, atomically.

    Args:
        path: the file; missing folders are made, an old file is replaced.
        record: dictionaries, lists, strings, numbers, arrays; a number
            that is not finite is written as null.

    Raises:
        CheckpointError: the file cannot be written; an old one is intact.
    """
    data = _to_json(record, indent=1)
    write_atomically(Path(path), lambda file: file.write(data))


def read_record(path: str | Path) -> dict[str, Any]:
    """Read a run record.

    Args:
        path: a file that `write_record` wrote.

    Returns:
        The record; null has become None.

    Raises:
        CheckpointError: no such file, or not a record.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"there is no record at {path}.")
    try:
        _check_file(path)
        record = json.loads(path.read_bytes(), parse_constant=_no_number)
        if not isinstance(record, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a run record.") from error
    return record


def read_run(path: str | Path) -> dict[str, Any]:
    """Read the record of a run, and see that it is one.

    Args:
        path: the record.json of a run.

    Returns:
        The record, with a curve of evaluations that fit its seeds.

    Raises:
        CheckpointError: no such file, or not the record of a run.
    """
    record = read_record(path)
    wanted = {"algo": str, "env": str, "profile": str, "seeds": list}
    wanted |= {"config": dict, "provenance": dict, "curve": list}
    for name, kind in wanted.items():
        if not isinstance(record.get(name), kind):
            raise CheckpointError(
                f"{path} is not the record of a run: its {name} is missing "
                f"or no {kind.__name__}."
            )
    try:
        for point in record["curve"]:
            _check_point(point, len(record["seeds"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        why = str(error).splitlines()[0][:80]
        raise CheckpointError(
            f"{path} holds an evaluation that is none "
            f"({type(error).__name__}: {why})."
        ) from error
    return record


def _check_point(point: dict[str, Any], seeds: int) -> None:
    """One evaluation: numbers, and as many of each as there are seeds."""
    for name in ("step", "updates", "seconds"):
        if type(point[name]) not in (int, float):
            raise ValueError(f"{name} is no number")
    many = {"returns": point["returns"], **point["metrics"]}
    for name, values in many.items():
        if len(values) != seeds:
            raise ValueError(f"{name} has {len(values)} values")
        for value in values:
            if name == "returns" and not value:
                raise ValueError("an evaluation without episodes")
            np.mean(np.array(value, float))  # a text is not a number


# %% How sure is a mean over five seeds?
def _finite(values: npt.ArrayLike, what: str) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    if array.size == 0:
        raise ValueError(f"{what} needs at least one value, got none.")
    return array


def mean_ci(
    values: npt.ArrayLike, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over seeds with Student's confidence interval.

    Student's t interval, derived in the chapter on records.

    Args:
        values: one number per seed along the first axis, [S, ...].
        level: probability that the interval covers the true mean.

    Returns:
        mean, low and high, each [...]; the bounds are nan for one seed.

    Raises:
        ValueError: no values, or a level outside (0, 1).
    """
    x = _finite(values, "a mean")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; it must be between 0 and 1.")
    count, mean = len(x), np.asarray(x.mean(axis=0))
    if count == 1:
        return mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    error = x.std(axis=0, ddof=1) / np.sqrt(count)
    half = stdtrit(count - 1, (1 + level) / 2) * error
    return mean, np.asarray(mean - half), np.asarray(mean + half)


# %% A record that was begun
def begun(path: str | Path, seeds: Sequence[int]) -> dict[str, Any]:
    """The unfinished record of a study, or a new one.

    Args:
        path: where the unfinished record would lie.
        seeds: of the study.

    Returns:
        `seeds`, `provenance` and the `arms` that were made, by name; none
        if there is no file, or one of other seeds or of another source.
    """
    new = {"seeds": list(seeds), "provenance": provenance(), "arms": {}}
    if not Path(path).exists():
        return new
    old = read_record(path)
    same = old["provenance"]["source"] == source_hash()
    return old if same and old["seeds"] == new["seeds"] else new


def make_arms(
    path: str | Path,
    seeds: Sequence[int],
    arms: dict[str, dict[str, Any]],
    make: Callable[..., dict[str, Any]],
    size: Callable[[dict[str, Any]], int],
    progress: Callable[[int, str], object] | None = None,
) -> dict[str, Any]:
    """Make the arms of a study in turn and write its record.

    Args:
        path: of the record, ending in .json.
        seeds: of the study.
        arms: by name, the settings of each.
        make: called with settings, seeds and a function to be told how much
            of the arm is done; what it returns is kept.
        size: how much an arm is, from its settings.
        progress: told how much of the study is done, and the arm's name.

    Returns:
        The record.
    """
    path, seeds = Path(path), list(seeds)
    kept = path.with_suffix(".unfinished.json")
    record, before = begun(kept, seeds), 0
    for name, arm in arms.items():

        def tell(done: int, before: int = before, name: str = name) -> None:
            if progress:
                progress(before + done, name)

        wanted = as_json(arm)
        if record["arms"].get(name, {}).get("settings") != wanted:
            made = make(wanted, seeds, tell)
            record["arms"][name] = {"settings": wanted} | made
            write_record(kept, record)
        tell(size(wanted))
        before += size(wanted)
    record["arms"] = {name: record["arms"][name] for name in arms}
    write_record(path, record)
    kept.unlink(missing_ok=True)
    return record


# %% Results as a table
def in_words(mean: float, low: float, high: float, form: str = ".0f") -> str:
    """A mean and its interval, such as "310 (295 to 325)"."""
    if np.isnan(low):
        return format(mean, form)
    return f"{mean:{form}} ({low:{form}} to {high:{form}})"


class Table:
    """Results that notebooks show as a table and terminals as columns.

    Args:
        head: names of the columns.
        rows: cells of the rows; what is not a text is put right.

    Raises:
        ValueError: a row of another length than the head.
    """

    def __init__(self, head: Sequence[str], rows: Sequence[Sequence[Any]]):
        self.head, self.rows = tuple(head), [tuple(row) for row in rows]
        for row in self.rows:
            if len(row) != len(self.head):
                raise ValueError(
                    f"the row {row} has {len(row)} cells; {len(self.head)} "
                    "are wanted"
                )

    def _repr_html_(self) -> str:
        def line(cells, kind):
            right = ' style="text-align: right"'
            return "".join(
                f"<{kind}{'' if isinstance(c, str) else right}>"
                f"{html.escape(str(c))}</{kind}>"
                for c in cells
            )

        lines = [line(row, "td") for row in self.rows]
        body = "".join(f"<tr>{text}</tr>" for text in lines)
        head = f"<thead><tr>{line(self.head, 'th')}</tr></thead>"
        return f'<table class="table">{head}<tbody>{body}</tbody></table>'

    def __repr__(self) -> str:
        cells = [[str(c) for c in row] for row in (self.head, *self.rows)]
        wide = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join(
            "  ".join(
                c.ljust(n) if isinstance(kind, str) else c.rjust(n)
                for c, n, kind in zip(row, wide, like, strict=True)
            ).rstrip()
            for row, like in zip(cells, [self.head, *self.rows], strict=True)
        )


# %% The middle half
def iqm(values: npt.ArrayLike) -> float:
    """Interquartile mean of all values, of whatever shape.

    Agarwal et al. (2021).

    Args:
        values: numbers, any shape; with tasks, already normalised.

    Returns:
        The mean of the middle half.

    Raises:
        ValueError: no values.
    """
    x = np.sort(_finite(values, "an interquartile mean"), axis=None)
    cut = x.size // 4
    return float(x[cut : x.size - cut].mean())


def bootstrap_ci(
    values: npt.ArrayLike,
    statistic: Callable[[np.ndarray], float] = iqm,
    level: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Stratified bootstrap interval of a statistic over seeds and tasks.

    Agarwal et al. (2021), percentile method: seeds are redrawn within
    each task.

    Args:
        values: [S] (one task) or [S, T], seeds by tasks.
        statistic: function of an array [S, T].
        level: nominal coverage.
        samples: number of redraws.
        seed: of the redraws.

    Returns:
        The lower and upper bound.

    Raises:
        ValueError: no values, more than two axes, bad level or samples.
    """
    x = _finite(values, "a bootstrap")
    x = x[:, None] if x.ndim == 1 else x
    if x.ndim != 2 or not 0 < level < 1 or samples < 1:
        raise ValueError(
            "a bootstrap wants values [seeds] or [seeds, tasks], a level "
            f"between 0 and 1 and samples > 0, got shape {x.shape}, level "
            f"{level}, samples {samples}."
        )
    rng = np.random.default_rng(seed)
    rows = (rng.integers(len(x), size=x.shape) for _ in range(samples))
    draws = [statistic(np.take_along_axis(x, r, axis=0)) for r in rows]
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


# %% Learning curves
_COLORS = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9",
)  # fmt: skip


def curve_arrays(record: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The learning curve of a run record as two arrays.

    Args:
        record: a run record.

    Returns:
        Environment steps [P] and mean episode returns per seed [S, P].

    Raises:
        ValueError: the record holds no evaluation.
    """
    curve = record.get("curve") or []
    if not curve:
        raise ValueError("the record holds no evaluation yet.")
    steps = np.array([point["step"] for point in curve], dtype=float)
    returns = [
        [np.mean(np.array(seed, dtype=float)) for seed in point["returns"]]
        for point in curve
    ]
    return steps, np.array(returns).T


def _pool(
    records: Sequence[dict[str, Any]],
) -> list[tuple[dict[str, Any], np.ndarray, np.ndarray]]:
    """Records that differ only in their seeds become one.

    A seed counts once: the same seed again starts another entry.
    """
    pooled: dict[str, tuple[dict[str, Any], np.ndarray, np.ndarray]] = {}
    for record in records:
        steps, returns = curve_arrays(record)
        same = [record.get(k) for k in ("algo", "env", "profile", "config")]
        key = json.dumps([same, steps.tolist()], sort_keys=True)
        seeds = list(record["seeds"])
        while key in pooled and set(seeds) & set(pooled[key][0]["seeds"]):
            key += " again"
        if key in pooled:
            seeds = [*pooled[key][0]["seeds"], *seeds]
            returns = np.concatenate([pooled[key][2], returns])
        pooled[key] = ({**record, "seeds": seeds}, steps, returns)
    return list(pooled.values())


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration of several parts, such as agent and loop, as one."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= _flat(value) if isinstance(value, dict) else {name: value}
    return flat


def _label(record: dict[str, Any], others: list[dict[str, Any]]) -> str:
    """Algorithm and profile, and whatever else tells it from the others."""
    label = f"{record['algo']}, {record['profile']}"
    config = _flat(record.get("config") or {})
    rivals = [
        _flat(other.get("config") or {})
        for other in others
        if (other["algo"], other["profile"])
        == (record["algo"], record["profile"])
    ]
    differing = sorted(
        field
        for field, value in config.items()
        if any(rival.get(field) != value for rival in rivals)
    )
    return ", ".join([label, *(f"{f}={config[f]}" for f in differing)])


def plot_curves(
    records: Sequence[dict[str, Any]], path: str | Path | None = None
) -> Figure:
    """Learning curves with mean and 95 % interval over seeds.

    Args:
        records: run records; those that differ only in seeds are pooled.
        path: where to write the picture, if anywhere; its ending says in
            which format (png, svg, pdf).

    Returns:
        The figure, one axes per task.

    Raises:
        ValueError: no record, or one without an evaluation.
        CheckpointError: the picture cannot be written.
    """
    if not records:
        raise ValueError("a plot needs at least one record, got none.")
    pooled = _pool(records)
    tasks = list(dict.fromkeys(record["env"] for record, _, _ in pooled))
    figure = Figure(
        figsize=(7, 3.6 * len(tasks)), facecolor="white", layout="constrained"
    )
    for axes, task in zip(
        figure.subplots(len(tasks), squeeze=False)[:, 0], tasks, strict=True
    ):
        group = [entry for entry in pooled if entry[0]["env"] == task]
        heads = [record for record, _, _ in group]
        for i, (record, steps, returns) in enumerate(group):
            color, count = _COLORS[i % len(_COLORS)], len(returns)
            mean, low, high = mean_ci(returns)
            noun = "seeds" if count > 1 else "seed"
            label = f"{_label(record, heads)}: {count} {noun}"
            if count > 1:
                axes.plot(steps, returns.T, color=color, lw=0.6, alpha=0.5)
                axes.fill_between(
                    steps, low, high, color=color, alpha=0.2, lw=0
                )
            axes.plot(steps, mean, ".-", color=color, lw=1.8, label=label)
        axes.set(xlabel="environment steps", ylabel="return", title=task)
        axes.ticklabel_format(axis="x", style="sci", scilimits=(-3, 5))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small")
    if path is not None:
        target = Path(path)
        kind = target.suffix.lstrip(".") or "png"
        known = figure.canvas.get_supported_filetypes()
        if kind not in known:
            raise ValueError(
                f"{target} ends in .{kind}; a picture is one of "
                f"{', '.join(sorted(known))}."
            )
        write_atomically(
            target, lambda file: figure.savefig(file, format=kind, dpi=150)
        )
    return figure
