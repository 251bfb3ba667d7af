"""The control socket: how `userswap ps`, `set`, `swapon` and `swapoff` speak with programs that run."""
