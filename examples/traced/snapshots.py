"""A program to be traced: a simulation that keeps a snapshot of every tenth step, and goes back to one of them.

Heat spreads in a field of many independent bars, a part of which is computed at each step. Snapshots share with
the field, and with each other, what did not change. `userswap run` is needed: ordinary memory has no snapshots.
"""

import numpy as np

import userswap

BARS, LENGTH, STEPS = 4096, 1024, 60
random = np.random.default_rng(3)
field = np.round(random.standard_normal((BARS, LENGTH)).cumsum(axis=1), 2)
kept = []
for step in range(STEPS):
    if step % 10 == 0:
        kept.append(userswap.snapshot(field))
    first = step * 211 % (BARS - 256)
    part = field[first : first + 256]
    part[:, 1:-1] = np.round((part[:, :-2] + part[:, 1:-1] * 2 + part[:, 2:]) / 4, 2)
    if step == STEPS // 2:
        field[:] = kept[2]  # that went wrong: again from step 20
energy = [float((snapshot[::16] ** 2).sum()) for snapshot in kept]
del kept[::2]
print([round(value) for value in energy], round(float((field**2).sum())))
