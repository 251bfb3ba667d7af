"""A program to be traced: two parts of a series sorted in place, then merged."""

import numpy as np

steps = np.random.default_rng(1)
first = np.cumsum(steps.integers(-9, 10, 8_000_000)) / 100
second = np.cumsum(steps.integers(-9, 10, 8_000_000)) / 100
for part in (first, second):
    part.sort()
both = np.concatenate([first, second])
both.sort(kind="stable")  # finds the two runs and merges them
print(both[:: len(both) // 4], bool((both[1:] >= both[:-1]).all()))
