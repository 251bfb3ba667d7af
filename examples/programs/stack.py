"""Cells counted in a stack of microscope images: SciPy and scikit-image, one process.

The stack is smoothed, its background taken off, split by a threshold, its connected parts labelled and measured.
"""

import hashlib
from argparse import ArgumentParser

import numpy as np
from scipy import ndimage
from skimage import filters, measure, segmentation

CELL = 9


def stack(depth: int, side: int, chance: np.random.Generator) -> np.ndarray:
    """Make a stack of images of round cells over uneven light, with the camera's noise."""
    light = 200 + 150 * np.hypot(*np.meshgrid(np.linspace(-1, 1, side), np.linspace(-1, 1, side)))
    images = np.empty((depth, side, side), dtype=np.uint16)
    for image in images:
        image[:] = light + chance.normal(0, 8, image.shape)
    grid = np.mgrid[-CELL : CELL + 1, -CELL : CELL + 1, -CELL : CELL + 1]
    ball = (900 * np.exp(-(grid**2).sum(axis=0) / (2 * (CELL / 2.5) ** 2))).astype(np.uint16)
    for _ in range(images.size // 60_000):
        z, y, x = (int(chance.integers(0, length - 2 * CELL)) for length in images.shape)
        images[z : z + 2 * CELL + 1, y : y + 2 * CELL + 1, x : x + 2 * CELL + 1] += ball
    return images


def digest(array: np.ndarray) -> str:
    """Return a checksum of all of an array."""
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()[:16]


def main() -> None:
    """Print what came out, step by step."""
    parser = ArgumentParser()
    parser.add_argument("--depth", type=int, default=80)
    parser.add_argument("--side", type=int, default=1024)
    options = parser.parse_args()
    images = stack(options.depth, options.side, np.random.default_rng(5))
    print(f"{options.depth} images of {options.side} x {options.side}: {digest(images)}", flush=True)

    smooth = ndimage.gaussian_filter(images, 1.5, output=np.float32)
    background = ndimage.zoom(ndimage.minimum_filter(smooth[:, ::16, ::16], (1, 5, 5)), (1, 16, 16), order=1)
    smooth -= background[:, : options.side, : options.side]
    del background
    print(f"smoothed, background taken off: {digest(smooth)}", flush=True)

    level = float(filters.threshold_otsu(smooth))
    cells = smooth > level
    labels, count = ndimage.label(cells)
    print(f"{count:,} parts are brighter than {level!r}: {digest(labels)}", flush=True)

    parts = measure.regionprops_table(labels, smooth, properties=("area", "max_intensity"))
    print(f"the largest has {parts['area'].max():,} voxels: {digest(parts['max_intensity'])}", flush=True)

    # Cells that touch each other are parted where they are thinnest, in a quarter of the stack.
    part = slice(0, max(options.depth // 4, 2 * CELL))
    inside = ndimage.distance_transform_edt(cells[part]).astype(np.float32)
    tops = measure.label((inside == ndimage.maximum_filter(inside, 7)) & (inside > 2))
    parted = segmentation.watershed(-inside, tops, mask=cells[part])
    table = measure.regionprops_table(parted, properties=("label", "area", "centroid"))
    print(f"{len(table['label']):,} cells, {table['area'].mean()!r} voxels each: {digest(parted)}")


if __name__ == "__main__":
    main()
