"""Faults on purpose.

Exported by tools/export.py from book/training/reliability.md; edit the chapter.
"""

__all__ = [
    "Point",
    "SETTINGS",
    "STEPS",
    "small",
    "same_end",
    "one_sentence",
    "Row",
    "Table",
    "Trials",
    "PLACES",
    "started",
    "reach",
    "KILLS",
    "kill",
    "STATUS",
    "signals",
    "sweeps",
    "on_ray",
    "Spoil",
    "BYTES",
    "Bomb",
    "ARRAYS",
    "ODD",
    "TEXTS",
    "NOT_FILES",
    "SECONDS",
    "files",
    "NUMBERS",
    "numbers",
    "FAULTS",
    "HARMLESS",
    "Endless",
    "Over",
    "Leaking",
    "tasks",
    "DISK",
    "disk",
    "DISKS",
    "growth",
    "speed",
    "long",
    "many",
    "ARMS",
    "Campaign",
    "try_arm",
]

# %% Imports
import ctypes
import errno
import io
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import jax
import numpy as np

from som.training import (
    checkpoints,
    command_line,
    logs,
    loop,
    records,
    runs,
    sweep,
)
from som.training.command_line import STUDIES
from som.training.environments import TaskError
from som.training.policy import load


# %% What is promised, and how it is tried
class Point(gym.Env):
    """Push a point to the origin, in 20 steps; breaks at one, if asked.

    Args:
        fault: what goes wrong, a name of FAULTS; None is nothing.
        at: in which step of this copy.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, fault: str | None = None, at: int = 0):
        self.fault, self.at, self.count = fault, at, 0
        self.kept = np.zeros(2, np.float32)

    def reset(self, *, seed=None, options=None):
        """Begin at random."""
        super().reset(seed=seed)
        self.place, self.time = self.np_random.uniform(-1, 1, 2), 0
        if self.fault == "raises in reset" and self.count >= self.at:
            raise ConnectionError("the simulator is gone")
        return np.float32(self.place), {}

    def step(self, action):
        """Move by a tenth of the action, and lose speed."""
        self.count += 1
        self.time += 1
        self.kept.fill(np.nan)
        x, v = self.place
        v = 0.8 * v + 0.1 * float(action[0])
        self.place = np.array([np.clip(x + v, -2, 2), v])
        ended = self.time >= 20
        info: dict[str, Any] = {}
        result = np.float32(self.place), -float(x * x), False, ended, info
        if self.fault in FAULTS and self.count == self.at:
            return FAULTS[self.fault](self, *result)
        return result


SETTINGS: dict[str, Any] = {
    "width": 8, "depth": 2, "batch_size": 8, "num_samples": 2,
    "num_particles": 2, "num_envs": 2, "warmup": 40, "capacity": 200,
    "chunk_steps": 20, "updates_per_step": 0.2, "evaluations": 4,
    "episodes": 2, "checkpoint_seconds": 1e-9,
}  # fmt: skip
STEPS = 320


def small(out: Path | None, seed: int = 0, env: Any = Point, **options):
    """Train the smallest run; one that was begun goes on."""
    usual = {"steps": STEPS, "seeds": (seed,), "progress": False}
    given: dict[str, Any] = usual | options | SETTINGS
    return runs.train("som", env, out=out, **given)


def same_end(one: Path, two: Path) -> bool:
    """Whether two runs have left the same arrays and the same returns."""
    for name in ("checkpoint.npz", "policy.npz", "policy-best.npz"):
        with np.load(one / name) as a, np.load(two / name) as b:
            names = set(a) - {"metadata"}
            if set(a) != set(b) or any(
                a[k].tobytes() != b[k].tobytes() for k in names
            ):
                return False
    curves = [
        records.read_run(p / "record.json")["curve"] for p in (one, two)
    ]
    first, second = ([(p["step"], p["returns"]) for p in c] for c in curves)
    return first == second


def one_sentence(error: BaseException) -> str:
    """What an error says, "" where that is not one short sentence."""
    text = str(error)
    good = 10 < len(text) < 500 and "\n" not in text
    return text if good else ""


class Row(dict):
    """A line of the record: a fault, how often it was tried and survived."""

    def __init__(self, fault: str):
        super().__init__(fault=fault, tried=0, held=0, said="", failed=[])

    def add(self, held: bool, said: str) -> None:
        """Count a trial; keep what was said first, and what failed."""
        self["tried"] += 1
        self["held"] += bool(held)
        if held:
            self["said"] = self["said"] or said
        elif len(self["failed"]) < 5:
            self["failed"].append(said or "nothing was said")


class Table(dict):
    """Rows by the name of their fault."""

    def __missing__(self, fault: str) -> Row:
        self[fault] = Row(fault)
        return self[fault]


Trials = Iterator[Any]
"""An arm of the study: yields its table after each trial."""


# %% Killed
PLACES = ("elsewhere", "learning", "evaluating", "writing", "resuming")


def _note_places(where) -> None:
    """Let a process note in where.value what it is doing."""
    for module, name, place in (
        (runs, "run_chunk", 1),
        (runs, "evaluate_now", 2),
        (records, "write_atomically", 3),
        (runs, "load_checkpoint", 4),
        (runs, "load_packed", 4),
    ):
        setattr(
            module, name, partial(_noted, getattr(module, name), where, place)
        )


def _noted(function, where, place, *args, **kwargs):
    before, where.value = where.value, place
    try:
        return function(*args, **kwargs)
    finally:
        where.value = before


def _context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _body(job: Callable[..., Any], where, said: Path, args: tuple) -> None:
    """What a process of a trial does."""
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _note_places(where)
    os._exit(job(*args) or 0)


@contextmanager
def started(job: Callable[..., Any], said: Path, *args: Any):
    """A process that does a job, and where it is; killed at the end."""
    context = _context()
    where = context.Value("i", 0, lock=False)
    process = context.Process(target=_body, args=(job, where, said, args))
    process.start()
    try:
        yield process, where
    finally:
        process.kill()
        process.join()


def _apart(job, out: Path, *args: Any) -> tuple[bool, str]:
    """Whether a job is done in a process of its own, and its last word."""
    said = out.with_suffix(".said")
    with started(job, said, out, *args) as (process, _):
        process.join(600)
    words = said.read_text().splitlines()
    return process.exitcode == 0, words[-1] if words else ""


def reach(process, where, place: str, rng: random.Random) -> bool:
    """Wait until a process is at a place, and a little longer."""
    wanted, end = PLACES.index(place), time.monotonic() + 120
    times = rng.randint(1, 3) if place != "resuming" else 1
    for _ in range(times):
        while where.value == wanted and times > 1 and process.is_alive():
            time.sleep(1e-4)
        while where.value != wanted:
            if not process.is_alive() or time.monotonic() > end:
                return False
            time.sleep(1e-4)
    time.sleep(rng.uniform(0, 0.03))
    return process.is_alive()


def _slices(out: Path) -> None:
    """The smallest run in slices of a chunk."""
    while not (out / "record.json").exists() or not runs.is_finished(out):
        small(out, time_limit=1e-9)


def _jobs(out: Path) -> list[sweep.Job]:
    env = f"{__name__}:Point-v0"
    return sweep.plan(["som"], [env], 2, out, STEPS, **SETTINGS)


def _sweep(out: Path) -> None:
    sweep.one_by_one(_jobs(out))


KILLS = (
    ("learning", small), ("writing", small), ("evaluating", small),
    ("resuming", small), ("elsewhere", small), ("writing", _slices),
    ("resuming", _slices), ("writing", _sweep), ("learning", _sweep),
)  # fmt: skip


def kill(trials: int, seed: int) -> Trials:
    """Kill runs with -9; each is resumed to the same end."""
    rng, table = random.Random(seed), Table()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        straight: dict[Any, Path] = {}
        for i in range(trials):
            place, job = KILLS[i % len(KILLS)]
            kind = {small: "", _slices: ", in slices", _sweep: ", in a sweep"}
            out, at = folder / str(i), ""
            for again in range(1 + (i % 3 == 0 or place == "resuming")):
                late = place == "resuming" and not again
                aim = "writing" if late else place
                with started(job, folder / "said", out) as (process, where):
                    reach(process, where, aim, rng)
                    process.kill()
                    process.join()
                    if process.exitcode == -signal.SIGKILL:
                        at = PLACES[where.value] + kind[job]
            job(out)
            if job not in straight:
                straight[job] = folder / f"straight-{len(straight)}"
                job(straight[job])
            ends = [_folders(job, path) for path in (out, straight[job])]
            held = all(map(same_end, *ends)) and at != ""
            table["killed, " + at].add(held, "the same end, to the bit")
            yield table


def _folders(job, out: Path) -> list[Path]:
    return [j.folder for j in _jobs(out)] if job is _sweep else [out]


if "Point-v0" not in gym.registry:
    point: Any = Point
    gym.register("Point-v0", entry_point=point, max_episode_steps=20)


STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}


def _command(out: Path) -> int:
    """The smallest run, from the command line."""
    words = [f"--set={k}={v}" for k, v in SETTINGS.items()]
    words += ["--env", f"{__name__}:Point-v0", "--steps", str(STEPS)]
    return command_line.main(["train", "--out", str(out), *words])


def signals(trials: int, seed: int) -> Trials:
    """Ctrl-C and SIGTERM: a word at once, all saved, the right status."""
    rng, table = random.Random(seed), Table()
    with tempfile.TemporaryDirectory() as name:
        folder, straight = Path(name), Path(name) / "straight"
        _command(straight)
        for i in range(trials):
            kind = list(STATUS)[i % 2]
            place = ("learning", "evaluating", "writing")[i // 2 % 3]
            out, said = folder / str(i), folder / f"said-{i}"
            with started(_command, said, out) as (process, where):
                reach(process, where, place, rng)
                os.kill(process.pid, kind)
                process.join(60)
            words = said.read_text()
            wanted = ["nothing was saved"]
            if (out / "checkpoint.npz").exists():
                wanted = ["stopping:", "goes on from it"]
            held = all(word in words for word in wanted)
            held = held and process.exitcode == STATUS[kind]
            _command(out)
            held = held and same_end(out, straight)
            last = f"status {process.exitcode}: {words.splitlines()[-1]}"
            table[f"{kind.name} while {place}"].add(
                held, last.replace(name, "")
            )
            yield table


def _lost(jobs: list[sweep.Job]) -> str:
    """What a sweep says of the runs that it lost; "" if there are none."""
    try:
        sweep.one_by_one(jobs)
    except ChildProcessError as error:
        return one_sentence(error)
    return ""


def _stuck(bad: sweep.Job):
    """Let one run fail while it learns, until the cause is called off."""
    whole = runs.run_chunk

    def chunk(trainer, buffer):
        if list(trainer.seeds) == bad.config["seeds"] and trainer.chunk > 6:
            raise RuntimeError("the arm is stuck")
        return whole(trainer, buffer)

    runs.run_chunk = chunk
    return partial(setattr, runs, "run_chunk", whole)


def _damaged(bad: sweep.Job):
    """Cut off the checkpoint of one run, until it is put back."""
    sweep.run_one(bad, lambda step, metrics: step > STEPS / 2)
    path = bad.folder / "checkpoint.npz"
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    return partial(path.write_bytes, good)


def sweeps(trials: int, seed: int) -> Trials:
    """One run of a sweep fails; it is named, and the others go on."""
    rng, table = random.Random(seed), Table()
    with tempfile.TemporaryDirectory() as name:
        folder, straight = Path(name), Path(name) / "straight"
        _sweep(straight)
        for i in range(trials):
            fault = (_stuck, _damaged)[i % 2]
            jobs = _jobs(folder / str(i))
            bad = rng.choice(jobs)
            mend = fault(bad)
            said = [_lost(jobs), _lost(jobs)]
            ended = [sweep.has_ended(job) for job in jobs]
            mend()
            named = [bad.name in s and s.count("Error") == 1 for s in said]
            held = all(named) and ended == [job != bad for job in jobs]
            held = held and _lost(jobs) == ""
            ends = [
                _folders(_sweep, path) for path in (folder / str(i), straight)
            ]
            held = held and all(map(same_end, *ends))
            what = "stuck" if fault is _stuck else "with a damaged checkpoint"
            table[f"a run of a sweep {what}"].add(
                held, said[0].replace(name, "")
            )
            yield table


def _on_ray(out: Path) -> None:
    os.environ["SOM_TRIAL"] = str(out)  # inherited by all that Ray starts
    sweep.on_ray(_jobs(out))


def _workers(out: Path) -> list[Any]:
    """Ray's processes that are at work on a run of this trial."""
    import psutil

    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            title = "".join(process.cmdline()[:1])
            ours = process.environ().get("SOM_TRIAL") == str(out)
            if ours and title.startswith("ray::som "):
                found.append(process)
    return found


def on_ray(trials: int, seed: int) -> Trials:
    """Kill Ray's workers and its driver; nothing without Ray."""
    rng, table = random.Random(seed), Table()
    try:
        import psutil
        import ray  # noqa: F401
    except ImportError:
        return
    with tempfile.TemporaryDirectory() as name:
        folder, straight = Path(name), Path(name) / "straight"
        _sweep(straight)
        for i in range(trials):
            out, driver = folder / str(i), i % 2 == 1
            with started(_on_ray, folder / "said", out) as (process, _):
                end = time.monotonic() + 120
                begun = [j.folder / "checkpoint.npz" for j in _jobs(out)]
                while not any(p.exists() for p in begun):
                    time.sleep(0.01)
                    if time.monotonic() > end:
                        break
                time.sleep(rng.uniform(0, 0.1))
                at_work = _workers(out)
                for victim in [process] if driver else at_work[:1]:
                    victim.kill()
                process.join(180)
            held = driver or process.exitcode == 0
            psutil.wait_procs([*at_work, *_workers(out)], 60)
            _sweep(out)
            ends = [_folders(_sweep, path) for path in (out, straight)]
            held = held and all(map(same_end, *ends))
            what = "the driver" if driver else "a worker"
            table[f"{what} of Ray killed"].add(
                held, "the same end, to the bit"
            )
            yield table


# %% Files that are not what they should be
Spoil = Callable[[random.Random, bytes], bytes]


def _flip(rng: random.Random, data: bytes) -> bytes:
    at, new = rng.randrange(len(data)), bytearray(data)
    new[at] ^= 1 << rng.randrange(8)
    return bytes(new)


def _cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def _zeros(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data))
    count = min(rng.randint(1, 4096), len(data) - start)
    return data[:start] + bytes(count) + data[start + count :]


def _twice(rng: random.Random, data: bytes) -> bytes:
    a, b = sorted(rng.randrange(len(data)) for _ in range(2))
    return data[:b] + data[a:b] + data[b:]


def _noise(rng: random.Random, data: bytes) -> bytes:
    return rng.randbytes(rng.randrange(2000))


BYTES: dict[str, Spoil] = {
    "a bit flipped": _flip,
    "cut off": _cut,
    "zeros in it": _zeros,
    "a piece twice": _twice,
    "noise instead": _noise,
}
"""What can happen to any file."""


def _entries(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _zip(entries: dict[str, bytes], how=zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", how) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return file.getvalue()


def _array(value: Any, pickles: bool = False) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(value), None, pickles)
    return file.getvalue()


def _header(shape: str, kind: str = "<f4") -> bytes:
    """The head of an array that is not there."""
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}}}"
    text = text.ljust(117 if len(text) < 117 else len(text)) + "\n"
    return (
        b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()
    )


class Bomb:
    """Unpickled, it would leave a file behind."""

    def __reduce__(self):
        return Path.touch, (Path(tempfile.gettempdir()) / "som-was-here",)


def _whole(change: Callable[[random.Random, np.ndarray], Any]) -> Spoil:
    """A file with one array changed, and checksums that are right."""

    def spoil(rng: random.Random, data: bytes) -> bytes:
        entries = _entries(data)
        names = [n for n in entries if n != "metadata.npy"]
        name = rng.choice(names)
        value = np.lib.format.read_array(io.BytesIO(entries[name]))
        new = change(rng, value)
        entries[name] = new if isinstance(new, bytes) else _array(new)
        return _zip(entries)

    return spoil


def _infect(rng: random.Random, value: np.ndarray) -> np.ndarray:
    new = np.array(value, np.float32)
    if value.dtype.kind != "f" or not new.size:
        return np.zeros(7, np.float64)  # another shape
    new.flat[rng.randrange(new.size)] = rng.choice([np.nan, np.inf])
    return new


def _swapped(rng: random.Random, data: bytes) -> bytes:
    entries = _entries(data)
    one, two = rng.sample([n for n in entries if n != "metadata.npy"], 2)
    entries[one], entries[two] = entries[two], entries[one]
    return _zip(entries)


def _missing(rng: random.Random, data: bytes) -> bytes:
    entries = _entries(data)
    del entries[rng.choice(list(entries))]
    return _zip(entries)


def _outside(rng: random.Random, data: bytes) -> bytes:
    name = rng.choice(["../../evil", "/evil", "tree/../../evil"])
    return _zip(_entries(data) | {f"{name}.npy": _array(np.zeros(3))})


def _bomb(rng: random.Random, data: bytes) -> bytes:
    entries = _entries(data)
    big = _header(f"({3 * 10**7},)") + bytes(12 * 10**7)
    name = rng.choice(list(entries))
    return _zip(entries | {name: big}, zipfile.ZIP_DEFLATED)


def _huge(rng: random.Random, value: np.ndarray) -> bytes:
    count = 10 ** rng.randint(9, 17)
    shape = rng.choice([f"({count},)", f"({count}, {count})", "(-1,)"])
    head = _header(shape, rng.choice(["<f4", "<f8", "|O", "|V0", "<U99"]))
    return head + value.tobytes()[: rng.randrange(9)]


def _headed(rng: random.Random, value: np.ndarray) -> bytes:
    return _header("(" + "1, " * rng.randint(10**3, 2 * 10**4) + ")")


def _words(rng: random.Random, data: bytes) -> bytes:
    """Its metadata changed, with the rest as it was."""
    entries = _entries(data)
    old = np.lib.format.read_array(io.BytesIO(entries["metadata.npy"]))
    new = _json(rng, old.tobytes())
    entries["metadata.npy"] = _array(np.frombuffer(new, np.uint8))
    return _zip(entries)


ARRAYS: dict[str, Spoil] = {
    "two members swapped": _swapped,
    "a member missing": _missing,
    "a name outside the folder": _outside,
    "a zip bomb": _bomb,
    "a huge array": _whole(_huge),
    "a long header": _whole(_headed),
    "another shape": _whole(lambda rng, x: np.zeros((*x.shape, 2), x.dtype)),
    "another type": _whole(lambda rng, x: x.astype(rng.choice(["S3", "c8"]))),
    "a pickle": _whole(lambda rng, x: _array([Bomb()], pickles=True)),
    "not a number": _whole(_infect),
    "other metadata": _words,
}
"""What can be done to an archive of arrays."""

ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1.5, 10**6, 10**30, -(10**12), 1e308, "", "no",
    "x" * 10**5, [], [[]], {}, [None], {"a": 1}, "../../etc", [10**9] * 3,
)  # fmt: skip


def _json(rng: random.Random, data: bytes) -> bytes:
    """One value of a JSON object changed, taken away, or moved."""
    value = json.loads(data)
    places: list[tuple[Any, Any]] = []
    todo = [value]
    while todo:
        here = todo.pop()
        keys = here if isinstance(here, dict) else range(len(here))
        for key in keys:
            places.append((here, key))
            if isinstance(here[key], dict | list):
                todo.append(here[key])
    here, key = rng.choice(places)
    if rng.random() < 0.2:
        del here[key]
    else:
        here[key] = rng.choice(ODD)
    return json.dumps(value).encode()


TEXTS: dict[str, Spoil] = {
    "a value of another kind": _json,
    "NaN": lambda rng, data: data.replace(b"1", b"NaN", 1),
    "a list instead": lambda rng, data: b"[" + data + b"]",
    "very deep": lambda rng, data: b'{"a":' * rng.randint(10**3, 10**5),
    "a very long number": lambda rng, data: b'{"a": ' + b"9" * 10**5 + b"}",
    "not UTF-8": lambda rng, data: data[:9] + b"\xff\xfe" + data[9:],
}
"""What can be done to a text."""


def _link(target: str) -> Callable[[Path], None]:
    return lambda path: os.symlink(target, path)


NOT_FILES: dict[str, Callable[[Path], None]] = {
    "a link to nothing": _link("/nonexistent/file"),
    "a link to itself": lambda path: os.symlink(path, path),
    "a link to an endless device": _link("/dev/zero"),
    "a pipe": os.mkfifo,
    "a folder": os.mkdir,
}
"""What may stand where a file is expected."""


def _peak(reset: bool = False) -> float:
    """The most memory that this process has held, in MB; 0 if unknown."""
    with suppress(OSError):
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1e3
    return 0.0


def _readers(folder: Path) -> dict[str, tuple[Path, Callable[[], Any]]]:
    """The good files, and how each is read."""
    out, other = folder / "run", folder / "config"
    small(out, env=f"{__name__}:Point-v0")
    other.mkdir()
    shutil.copy(out / "config.json", other)
    trainer = loop.Trainer(runs.read_config(out))
    empty = trainer.state

    def checkpoint():
        trainer.state, trainer.chunk = empty, 0
        buffer = checkpoints.load_checkpoint(trainer, out / "checkpoint.npz")
        return jax.tree.map(np.asarray, (trainer.state, buffer))

    def policy():
        return jax.tree.map(np.asarray, load(out / "policy.npz").state)

    def record():
        logs.curves(out)
        return None

    def config():
        runs.read_config(other)
        return None

    return {
        "policy": (out / "policy.npz", policy),
        "checkpoint": (out / "checkpoint.npz", checkpoint),
        "record": (out / "record.json", record),
        "config": (other / "config.json", config),
    }


SECONDS = 1.0  # of processor time that a refusal may take


def _read_spoiled(path: Path, read, good) -> tuple[bool, str, float, float]:
    """Whether a file is refused well, what is said, seconds and MB."""
    folder, said = set(os.listdir(path.parent)), ""
    before, start = _peak(True), time.process_time()  # others work here
    try:
        held = jax.tree.all(jax.tree.map(np.array_equal, read(), good))
        said = "" if held else "it was read as something else"
    except ValueError as error:
        said = one_sentence(error)
        held = said != ""
    except Exception as error:
        held, said = False, f"{type(error).__name__}: {error}"[:300]
    took, more = time.process_time() - start, _peak() - before
    touched = set(os.listdir(path.parent)) != folder
    fast = took < SECONDS or not said  # what is accepted may be compiled for
    held = held and fast and more < 200 and not touched
    return held, said, took, more


def files(trials: int, seed: int) -> Trials:
    """Spoil policies, checkpoints, records and configurations."""
    rng, table = random.Random(seed), Table()
    trap = Path(tempfile.gettempdir()) / "som-was-here"
    with tempfile.TemporaryDirectory() as name:
        readers = _readers(Path(name))
        cases = []
        for kind, (path, read) in readers.items():
            own = ARRAYS if path.suffix == ".npz" else TEXTS
            ways: dict[str, Any] = BYTES | own | NOT_FILES
            data, good = path.read_bytes(), read()
            cases += [
                (kind, path, read, good, data, *w) for w in ways.items()
            ]
        for i in range(trials):
            kind, path, read, good, data, way, spoil = cases[i % len(cases)]
            path.unlink()
            if way in NOT_FILES:
                spoil(path)
            else:
                path.write_bytes(spoil(rng, data))
            held, said, took, more = _read_spoiled(path, read, good)
            held = held and not trap.exists()
            row = table[f"{kind}: {way}"]
            row.add(held, said.replace(name, ""))
            row["seconds"] = max(row.get("seconds", 0), round(took, 3))
            row["MB"] = max(row.get("MB", 0), round(more, 1))
            path.rmdir() if way == "a folder" else path.unlink()
            path.write_bytes(data)
            if i % 50 == 49:
                yield table
    yield table


# %% Numbers that are none
def _spoil_tree(tree, value: float, rng: random.Random):
    """A tree of arrays with one number replaced."""
    leaves, shape = jax.tree.flatten(tree)
    floats = [i for i, x in enumerate(leaves) if x.dtype == np.float32]
    i = rng.choice(floats)
    flat = np.array(leaves[i])
    flat.flat[rng.randrange(flat.size)] = value
    leaves[i] = jax.numpy.asarray(flat)
    return jax.tree.unflatten(shape, leaves)


def _into(field: str):
    def spoil(trainer, buffer, value, rng):
        new = _spoil_tree(getattr(trainer.state, field), value, rng)
        trainer.state = trainer.state._replace(**{field: new})
        return buffer

    return spoil


def _into_replay(trainer, buffer, value, rng):
    row = rng.randrange(min(int(buffer.added[0]), trainer.loop.capacity))
    column = rng.randrange(buffer.rows.shape[-1])
    return buffer._replace(rows=buffer.rows.at[0, row, column].set(value))


def _into_rows(trainer, buffer, value, rng):
    trainer.rows = np.array(trainer.rows)
    trainer.rows.flat[rng.randrange(trainer.rows.size)] = value
    return buffer


def _into_observation(trainer, buffer, value, rng):
    trainer.observation = np.array(trainer.observation)
    trainer.observation.flat[0] = value
    return buffer


def _into_action(trainer, buffer, value, rng):
    """A policy whose last layer has overflowed."""
    spoil = partial(jax.numpy.full_like, fill_value=value)
    new = jax.tree.map(spoil, trainer.state.target_policy)
    trainer.state = trainer.state._replace(target_policy=new)
    return buffer


NUMBERS: dict[str, Any] = {
    "the policy": _into("policy"),
    "the critic": _into("critic"),
    "an optimizer": _into("critic_opt"),
    "all that acts": _into_action,
    "the replay": _into_replay,
    "the last experience": _into_rows,
    "an observation": _into_observation,
}


def numbers(trials: int, seed: int) -> Trials:
    """Put what is no number where numbers are kept."""
    rng, table = random.Random(seed), Table()
    whole = runs.run_chunk
    with tempfile.TemporaryDirectory() as name:
        straight = Path(name) / "straight"
        small(straight)
        for i in range(trials):
            place = list(NUMBERS)[i % len(NUMBERS)]
            value = (math.nan, math.inf, -math.inf)[i // len(NUMBERS) % 3]
            at, out = rng.randint(3, 14), Path(name) / str(i)

            def chunk(trainer, buffer, place=place, value=value, at=at):
                if trainer.chunk == at:
                    buffer = NUMBERS[place](trainer, buffer, value, rng)
                return whole(trainer, buffer)

            runs.run_chunk = chunk
            held, said = False, "it went on"
            try:
                small(out)
            except (FloatingPointError, TaskError) as error:
                said = one_sentence(error)
                held = "checkpoint" in said
            except Exception as error:
                said = f"{type(error).__name__}: {error}"[:300]
            finally:
                runs.run_chunk = whole
            kept = records.read_metadata(out / "checkpoint.npz")["chunk"]
            small(out)
            held = held and kept == at and same_end(out, straight)
            table[f"{place}: {value}"].add(held, said.replace(name, ""))
            yield table


# %% Tasks that misbehave
def _raise(error: BaseException):
    def fault(env, *result):
        raise error

    return fault


def _fill_memory(env, *result):
    env.leak = np.ones((10**6, 10**6))


def _chdir(env, *result):
    os.chdir(tempfile.gettempdir())
    return result


def _reuse(env, observation, *rest):
    env.kept = observation  # the next step writes over it
    return observation, *rest


FAULTS: dict[str, Callable[..., Any]] = {
    "raises": _raise(RuntimeError("the arm is stuck")),
    "leaves Python": _raise(SystemExit(3)),
    "raises in reset": lambda env, *result: result,
    "needs all memory": _fill_memory,
    "another shape": lambda env, s, *rest: (np.zeros(3), *rest),
    "words": lambda env, s, *rest: ("hello", *rest),
    "objects": lambda env, s, *rest: (np.array([None, 1]), *rest),
    "NaN": lambda env, s, *rest: (s * np.nan, *rest),
    "an infinite reward": lambda env, s, r, *rest: (s, np.inf, *rest),
    "no reward": lambda env, s, r, *rest: (s, None, *rest),
    "four values": lambda env, *result: result[:4],
    "nothing": lambda env, *result: None,
    "an end that is none": lambda env, s, r, e, *rest: (s, r, "no", *rest),
}
"""What ends a run, by name."""

HARMLESS: dict[str, Callable[..., Any]] = {
    "goes to another folder": _chdir,
    "writes over its observation": _reuse,
    "wide numbers": lambda env, s, *rest: (np.float64(s), *rest),
}
"""What must change nothing."""

FAULTS |= HARMLESS | {"leaks": lambda env, *result: result}


class Endless(Point):
    """Never ends an episode."""

    def step(self, action):
        """As Point, without its end."""
        observation, reward, *_ = super().step(action)
        return observation, reward, False, False, {}


class Over(Point):
    """Ends every episode at once."""

    def step(self, action):
        """As Point, and the end."""
        observation, reward, *_ = super().step(action)
        return observation, reward, True, False, {}


class Leaking(Point):
    """Keeps 32 MB of every step, once it is told to."""

    leaks = False

    def step(self, action):
        """As Point."""
        if Leaking.leaks:
            self.hoard = [*getattr(self, "hoard", ()), np.empty(2**22)]
        return super().step(action)


def _leak(out: Path, at: int) -> None:
    """Train until a task has filled the memory."""
    import resource

    size = resource.RLIMIT_AS
    _, most_of_all = resource.getrlimit(size)

    def begin(step, metrics, trainer):
        if trainer.chunk == at:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most = pages * resource.getpagesize() + 2**28
            resource.setrlimit(size, (most, most_of_all))
            Leaking.leaks = True

    try:
        small(out, env=_named(Leaking), progress=begin)
    except TaskError as error:
        print(one_sentence(error))


def tasks(trials: int, seed: int) -> Trials:
    """Let the task fail in every way that we could think of."""
    rng, table = random.Random(seed), Table()
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as name:
        straight = Path(name) / "straight"
        small(straight, env=_named(Point))
        for odd, env in (("never ends", Endless), ("ends at once", Over)):
            run = small(None, env=env)
            held = len(run.record["curve"]) > 0
            table[f"the task: {odd}"].add(held, "harmless")
        for i in range(trials):
            fault = list(FAULTS)[i % len(FAULTS)]
            at, out = rng.randint(40, 140), Path(name) / str(i)
            if fault == "leaks":
                _, said = _apart(_leak, out, at // 10)
                said = said if "point" in said else "the process was ended"
                held = (out / "checkpoint.npz").exists()
                small(out, env=_named(Point))
                held = held and same_end(out, straight)
                table[f"the task: {fault}"].add(held, said.replace(name, ""))
                yield table
                continue
            os.chdir(name)
            held, said = fault in HARMLESS, "harmless"
            try:
                small(Path(str(i)), env=_named(Point, fault, at))
            except TaskError as error:
                said = one_sentence(error)
                held = fault not in HARMLESS and "point" in said
            except BaseException as error:
                held, said = False, f"{type(error).__name__}: {error}"[:300]
            os.chdir(here)
            if not (out / "config.json").exists():
                held, said = False, f"nothing is kept ({said})"
            else:
                small(out, env=_named(Point))
                held = held and same_end(out, straight)
            table[f"the task: {fault}"].add(held, said.replace(name, ""))
            yield table


def _named(kind, *args):
    """A factory; all of them have one name, so that a run can go on."""

    def point():
        return kind(*args)

    point.__qualname__ = "point"
    return point


# %% The disk
def _tmpfs(folder: Path, options: str) -> None:
    """Mount a disk in memory that only this process sees."""
    libc = ctypes.CDLL(None, use_errno=True)
    flags = 0x00020000 if os.getuid() == 0 else 0x10020000
    if libc.unshare(flags):  # CLONE_NEWNS, and CLONE_NEWUSER
        raise OSError(ctypes.get_errno(), "no namespace")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    words = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    subprocess.run(words, check=True)


def _full(folder: Path) -> None:
    """Fill a disk to the last byte."""
    with suppress(OSError), open(folder / "other", "wb") as file:
        while True:
            file.write(bytes(4096))
            file.flush()


def _on_disk(kind: str, folder: Path, straight: Path, at: int) -> int:
    """Train on a disk that fails in a chunk, then on a good one."""
    out, said = folder / "run", ""
    folder.mkdir()
    try:
        _tmpfs(folder, "size=4m")
    except (OSError, subprocess.CalledProcessError):
        print("no disk")
        return 0

    def fail(step, metrics, trainer):
        if trainer.chunk == at and kind == "full":
            _full(folder)
        elif trainer.chunk == at:
            subprocess.run(["umount", "-l", str(folder)], check=True)

    try:
        small(out, progress=fail)
    except (records.CheckpointError, OSError) as error:
        said = one_sentence(error)
    if kind == "full":
        (folder / "other").unlink()
        small(out)
    print(said)
    return int(not same_end(out, straight))


def _hold(out: Path) -> int:
    """Hold a folder until killed."""
    with runs.alone(out):
        (out / "held").touch()
        time.sleep(600)
    return 0


DISK = (
    "full", "gone", "read-only", "removed", "slow", "two processes",
    "a lock whose owner was killed", "the clock set back",
)  # fmt: skip


def disk(trials: int, seed: int) -> Trials:
    """Fail the disk in every way that we could think of."""
    rng, table = random.Random(seed), Table()
    with tempfile.TemporaryDirectory() as name:
        straight = Path(name) / "straight"
        small(straight)
        for i in range(trials):
            kind, at = DISK[i % len(DISK)], rng.randint(3, 12)
            folder = Path(name) / str(i)
            if kind in ("full", "gone"):
                held, said = _mounted(kind, folder, straight, at)
            else:
                held, said = DISKS[kind](folder, at)
                held = held and same_end(folder, straight)
            if said != "no disk":
                table[f"the disk: {kind}" if i % len(DISK) < 5 else kind].add(
                    held, said.replace(name, "")
                )
            yield table


def _mounted(kind, folder, straight, at) -> tuple[bool, str]:
    on_disk = partial(_on_disk, kind)
    held, words = _apart(on_disk, folder, straight, at)
    if words == "no disk":
        return False, words  # here nobody may mount one
    return held and (kind == "gone" or words != ""), words or "it went on"


def _removed(out: Path, at: int) -> tuple[bool, str]:
    def remove(step, metrics, trainer):
        if trainer.chunk == at:
            shutil.rmtree(out)

    small(out, progress=remove)
    return (out / "config.json").exists(), "it was made again"


def _slow(out: Path, at: int) -> tuple[bool, str]:
    whole: Any = os.fsync

    def wait(file):
        time.sleep(0.02)
        whole(file)

    os.fsync = wait
    try:
        small(out)
    finally:
        os.fsync = whole
    return True, "it went on"


def _two(out: Path, at: int) -> tuple[bool, str]:
    said = []

    def second(step, metrics, trainer):
        if trainer.chunk == at:
            for call in (small, runs.resume):
                with suppress(TypeError):
                    try:
                        call(out)
                    except runs.InUse as error:
                        said.append(one_sentence(error))

    small(out, progress=second)
    return len(said) == 2 and all(said), said[0] if said else "both went on"


def _stale(out: Path, at: int) -> tuple[bool, str]:
    out.mkdir()
    held = False
    with started(_hold, out.with_suffix(".said"), out) as (process, _):
        while not (out / "held").exists() and process.is_alive():
            time.sleep(1e-3)
        try:
            small(out)
        except runs.InUse:
            held = True
    small(out)  # the owner is dead
    return held, "refused while its owner lived, and not after"


def _clock(out: Path, at: int) -> tuple[bool, str]:
    whole, back = time.time, [0.0]

    def set_back(step, metrics, trainer):
        back[0] += 3600.0
        return trainer.chunk == at

    time.time = lambda: whole() - back[0]
    try:
        small(out, progress=set_back)
        small(out)
    finally:
        time.time = whole
    return True, "it went on"


def _read_only(out: Path, at: int) -> tuple[bool, str]:
    whole, said = os.replace, ""

    def fail(one, two):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    refuse: Any = fail

    def turn(step, metrics, trainer):
        if trainer.chunk == at:
            os.replace = refuse

    try:
        small(out, progress=turn)
    except records.CheckpointError as error:
        said = one_sentence(error)
    finally:
        os.replace = whole
    small(out)
    return said != "", said


DISKS = dict(
    zip(DISK[2:], (_read_only, _removed, _slow, _two, _stale, _clock))
)


# %% Time
def _memory() -> float:
    """The memory that this process holds now, in MB; 0 if unknown."""
    with suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
    return 0.0


def _long(out: Path, seconds: float, minutes_file: Path) -> None:
    """One long run; notes (seconds, MB, steps, CPU seconds) as it goes."""
    start = time.monotonic()
    notes: list[tuple[float, ...]] = []

    def note(step, metrics, trainer):
        now = time.monotonic() - start
        if now > len(notes) * seconds / 120:
            notes.append((now, _memory(), step, time.process_time()))
            minutes_file.write_text(json.dumps(notes))
        return now > seconds

    often = {"evaluations": 10**6, "checkpoint_seconds": 20.0}
    settings = SETTINGS | often
    runs.train("som", Point, 10**9, (0,), out=out, progress=note, **settings)


def _many(out: Path, count: int, notes_file: Path) -> None:
    """Many runs in one process; notes (runs, MB, files, maps, threads)."""
    notes: list[tuple[float, ...]] = []
    for i in range(count):
        small(out / str(i), seed=i)
        shutil.rmtree(out / str(i))
        files = len(os.listdir("/proc/self/fd"))
        maps, threads = runs.memory_maps(), threading.active_count()
        notes.append((i + 1, _memory(), files, maps, threads))
        notes_file.write_text(json.dumps(notes))


def growth(notes: Any, after: float = 1 / 3) -> float:
    """By how much the memory grew after the first part; 0.01 is 1 %."""
    memory = np.array([note[1] for note in notes])
    first = memory[int(len(memory) * after)]
    return float(memory[-3:].mean() / first - 1)


def speed(notes: Any) -> np.ndarray:
    """Steps per second of processor time between two notes."""
    _, _, steps, cpu = np.array(notes).T
    return np.diff(steps) / np.diff(cpu)


def long(minutes: float, seed: int) -> Trials:
    """One long run, in a process of its own."""
    yield from _timed("one long run", _long, 60 * minutes)


def many(count: int, seed: int) -> Trials:
    """Many runs, one after the other, in a process of their own."""
    yield from _timed("runs in one process", _many, count)


def _timed(what: str, job, amount: float) -> Trials:
    table = Table()
    with tempfile.TemporaryDirectory() as name:
        out, notes, said = (Path(name) / n for n in ("out", "notes", "said"))
        with started(job, said, out, amount, notes) as (process, _):
            while process.is_alive():
                process.join(5)
                yield table
        kept = json.loads(notes.read_text())
        more = growth(kept)
        held = process.exitcode == 0 and more <= 0.05
        words = f"{100 * more:+.1f} % memory after the first third"
        table[what].add(held, words)
        table[what]["notes"] = kept[:: max(1, len(kept) // 100)]
        yield table


# %% The study
ARMS: dict[str, Callable[[Any, int], Trials]] = {
    "long": long, "many": many, "kill": kill, "files": files,
    "numbers": numbers, "tasks": tasks, "disk": disk,
    "signals": signals, "sweeps": sweeps, "ray": on_ray,
}  # fmt: skip
"""Functions of a number of trials (of minutes, for long) and a seed."""


class Campaign:
    """A study of faults: every arm is so many trials.

    Arms that an earlier record has beside these stay in it, each with the
    source and the date that it was made by.

    Args:
        arms: by name, how many `trials`; minutes for the arm long.
    """

    most_seeds = 1

    def __init__(self, arms: dict[str, dict[str, Any]]):
        self.arms = arms

    def total(self, steps: int | None) -> int:
        """Trials of all arms together."""
        return sum(steps or arm["trials"] for arm in self.arms.values())

    def run(
        self, path, seeds, steps=None, progress=None, processes=1
    ) -> dict[str, Any]:
        """Try every fault and write the record.

        Args:
            path: of the record, ending in .json.
            seeds: the first is the seed of the faults.
            steps: trials, in the place of each arm's own.
            progress: told the trials made so far, and the arm's name.
            processes: in how many to try, an arm in each.

        Returns:
            The record.
        """
        path = Path(path)
        kept = path.with_suffix(".unfinished.json")
        record = records.begun(kept, list(seeds)[:1])
        made_by = {k: record["provenance"][k] for k in ("source", "date")}
        arms = {
            name: steps or arm["trials"] for name, arm in self.arms.items()
        }
        todo = {
            name: trials
            for name, trials in arms.items()
            if record["arms"].get(name, {}).get("trials") != trials
        }
        done = sum(arms.values()) - sum(todo.values())
        for name, made in _try_all(todo, record["seeds"][0], processes):
            record["arms"][name] = made_by | made
            records.write_record(kept, record)
            done += made["trials"]
            if progress:
                progress(done, name)
        made = {name: record["arms"][name] for name in arms}
        record["arms"] = _earlier(path) | made
        records.write_record(path, record)
        kept.unlink()
        return record


def _earlier(path: Path) -> dict[str, Any]:
    """The arms of an earlier record, with what each was made by."""
    if not path.exists():
        return {}
    old = records.read_record(path)
    made_by = {k: old["provenance"][k] for k in ("source", "date")}
    return {name: made_by | arm for name, arm in old["arms"].items()}


def try_arm(name: str, trials: int, seed: int) -> dict[str, Any]:
    """Make the trials of one arm: how many, how long, and the faults."""
    start = time.monotonic()
    *_, table = ARMS[name](trials, seed)
    return {
        "trials": trials,
        "seconds": time.monotonic() - start,
        "faults": list(table.values()),
    }


def _try_all(todo: dict[str, int], seed: int, processes: int):
    """Yield the arms as they are done."""
    if processes == 1:
        for name, trials in todo.items():
            yield name, try_arm(name, trials, seed)
        return
    with ProcessPoolExecutor(processes, _context()) as pool:
        jobs = {
            pool.submit(try_arm, name, trials, seed): name
            for name, trials in todo.items()
        }
        for job in as_completed(jobs):
            yield jobs[job], job.result()


STUDIES["reliability"] = Campaign(
    {
        "long": {"trials": 25}, "many": {"trials": 300},
        "kill": {"trials": 50}, "files": {"trials": 10_000},
        "numbers": {"trials": 21}, "tasks": {"trials": 17},
        "disk": {"trials": 8}, "signals": {"trials": 6},
        "sweeps": {"trials": 4}, "ray": {"trials": 4},
    }
)  # fmt: skip
