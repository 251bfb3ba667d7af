"""Other people's test suites, run plain and under swapped memory: only the difference counts. See `make compat`."""
