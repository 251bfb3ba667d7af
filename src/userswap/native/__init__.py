"""Hand-written C, only where Cython can't be: a header of atomics, locks and kernel numbers, and one of sums."""
