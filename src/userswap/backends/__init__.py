"""Backends: where swapped data is. The codec, the zswap pool, swap files. They know no ids and no addresses."""
