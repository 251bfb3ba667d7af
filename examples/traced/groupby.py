"""A program to be traced: a sum, a mean and a maximum by group, as data frames do it, with NumPy alone.

Readings of some thousand sensors come in nearly sorted by time; each sensor reports in bursts.
"""

import numpy as np

READINGS = 6_000_000
random = np.random.default_rng(2)
sensor = np.arange(READINGS) // 500 + random.integers(0, 8, READINGS)
value = np.round(np.cumsum(random.standard_normal(READINGS)), 2)

order = np.argsort(sensor, kind="stable")
groups = sensor[order]
begins = np.flatnonzero(np.diff(groups, prepend=-1))
values = value[order]
count = np.diff(begins, append=READINGS)
total = np.add.reduceat(values, begins)
most = np.maximum.reduceat(values, begins)
again = np.bincount(sensor, weights=value)
print(len(begins), count.max(), most.max(), bool(np.allclose(total, again[groups[begins]])))
