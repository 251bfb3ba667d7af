"""`python -m userswap` is the command `userswap`."""

from userswap.cli.preload import main

if __name__ == "__main__":
    raise SystemExit(main())
