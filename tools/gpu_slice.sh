#!/usr/bin/env bash
# One slice of a long run, on a machine that is lent for minutes and has no network.
#
#   OUT=results tools/gpu_slice.sh RUN WHEELS --env HalfCheetah-v4 --profile paper \
#       --steps 5e6 --seeds 5
#
# RUN is the folder of the run, or what an earlier slice brought home of it; WHEELS
# holds the packages that the machine lacks, beside JAX, Flax and Optax often mujoco,
# glfw, gymnasium and farama-notifications (it may be empty). All other words are
# those of `som train`. LIMIT is the time in seconds for learning (540). In $OUT are
# left: config.json, record.json, policy.npz and packed-SEED.npz. Copied into RUN,
# they are where the next slice goes on. With five seeds these are eight files.
set -euo pipefail
run=$1 wheels=$2
shift 2

if compgen -G "$wheels/*.whl" >/dev/null; then
  site=$(mktemp -d)
  python3 -m pip install --quiet --no-index --no-deps --no-compile \
    --target "$site" "$wheels"/*.whl
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
# Nothing is drawn here, and MuJoCo would look for a library that draws.
export MUJOCO_GL=disable

python3 -u -m som train "$@" --out "$run" --time-limit "${LIMIT:-540}"

mkdir -p "$OUT"
cp "$run"/{config.json,record.json,policy.npz} "$OUT"
if compgen -G "$run/packed-*.npz" >/dev/null; then
  cp "$run"/packed-*.npz "$OUT"
fi
