"""`userswap bench seal`: what checksums and encryption cost, beside the swap file."""

from collections.abc import Callable

from userswap.cli.main import Parser

__all__ = ["prepare_seal"]


def prepare_seal(arguments: list[str]) -> Callable[[], int]:
    """Return the measurement. Raises UserswapError."""
    parser = Parser(prog="userswap bench seal", description="What sealing and encrypting a folio costs.")
    parser.add_argument("--swap", metavar="DIR", help="where the swap file would be (default: as for a pool)")
    parser.add_argument("--quick", action="store_true", help="in a second or two")
    options = parser.parse_args(arguments)

    def run() -> int:
        from userswap.bench import seal

        costs = seal.measure(options.swap, 64 if options.quick else 512, 3 if options.quick else 7)
        for cost in costs:
            print(f"{cost.what:28} {cost.ns:9,.0f} ns a folio {cost.gb_per_second:8.2f} GB/s")
        by = {cost.what.partition(" (")[0]: cost.ns for cost in costs}
        for one, file in (("encrypt", "write to the file"), ("decrypt", "read from the file")):
            if one in by:
                print(f"To {one} takes {by[one] / by[file]:.1%} of what it takes to {file}.")
        return 0

    return run
