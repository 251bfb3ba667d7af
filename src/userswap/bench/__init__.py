"""Benchmarks: each a module with `measure`, run by `userswap bench NAME`. They use the public API only."""
