"""Hand-written C, only where Cython can't be: one header of atomics, locks and kernel numbers."""
