"""Kinds of readings found by k-means, and how far each reading is from its kind: scikit-learn, one process.

Floating sums depend on how they are split among threads: with one (OMP_NUM_THREADS=1) every run gives the same bits.
"""

import hashlib
from argparse import ArgumentParser

import numpy as np
from sklearn.cluster import KMeans
from sklearn.ensemble import HistGradientBoostingRegressor

SENSORS = 32
KINDS = 12
PIECE = 1 << 18


def readings(rows: int, chance: np.random.Generator) -> np.ndarray:
    """Make readings of a few kinds, noisy, in steps of 1/64 as a converter gives them."""
    data = np.empty((rows, SENSORS), dtype=np.float32)
    centres = chance.normal(0, 6, (KINDS, SENSORS)).astype(np.float32)
    for begin in range(0, rows, PIECE):
        piece = data[begin : begin + PIECE]
        kinds = chance.integers(0, KINDS, len(piece))
        piece[:] = np.rint(centres[kinds] * 64 + chance.standard_normal(piece.shape, np.float32) * 128) / 64
    return data


def digest(array: np.ndarray) -> str:
    """Return a checksum of all of an array."""
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()[:16]


def main() -> None:
    """Print what came out, step by step."""
    parser = ArgumentParser()
    parser.add_argument("--rows", type=int, default=6_000_000)
    rows = parser.parse_args().rows
    chance = np.random.default_rng(2)
    data = readings(rows, chance)
    print(f"{rows:,} readings of {SENSORS} sensors: {digest(data)}", flush=True)

    model = KMeans(KINDS, init="random", n_init=1, max_iter=8, tol=0, random_state=3).fit(data)
    print(f"{KINDS} kinds, inertia {model.inertia_!r}: {digest(model.labels_)}", flush=True)

    distance = np.empty(rows, dtype=np.float32)
    for begin in range(0, rows, PIECE):
        distance[begin : begin + PIECE] = model.transform(data[begin : begin + PIECE]).min(axis=1)
    print(f"the furthest is {distance.max()!r} from its kind: {digest(distance)}", flush=True)

    # What one sensor says, from what the others say: learned from every tenth reading.
    learned = HistGradientBoostingRegressor(max_iter=5, early_stopping=False, random_state=4)
    learned.fit(data[::10, 1:], data[::10, 0])
    guessed = learned.predict(data[: rows // 10, 1:])
    error = float(np.abs(guessed - data[: rows // 10, 0]).mean())
    print(f"the first sensor guessed from the others, off by {error!r}: {digest(guessed)}")


if __name__ == "__main__":
    main()
