"""`userswap bench devices`: swap files beside the kernel's, on the same disk in the same memory."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from userswap.cli.lab_programs import positive, progress, reported, table, writer
from userswap.cli.main import Parser
from userswap.errors import UsageError

if TYPE_CHECKING:
    from userswap.bench import seal
    from userswap.bench.devices import Results

__all__ = ["prepare_devices"]

MIB = 1 << 20


def prepare_devices(arguments: list[str]) -> Callable[[], int]:
    """Return the measurement of swap files. Raises UserswapError."""
    from userswap.bench import devices, seal
    from userswap.bench.data import KINDS

    parser = Parser(
        prog="userswap bench devices",
        description="Swap in and out, in order and anywhere, through a swap file: userswap's and the kernel's.",
    )
    parser.add_argument("--rounds", type=int, default=1, help="medians are over this many (default 1)")
    parser.add_argument("--quick", action="store_true", help="smaller arrays, a minute or two")
    parser.add_argument("--data", help=f"how well it compresses (default {','.join(KINDS)})")
    parser.add_argument("--swap", metavar="DIR", help="where swap files are made (default: as for a pool)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    options = parser.parse_args(arguments)
    kinds = options.data.split(",") if options.data else list(KINDS)
    if not set(kinds) <= KINDS.keys():
        raise UsageError(f"--data {options.data}: there are {', '.join(KINDS)}.")
    wanted = replace(
        devices.QUICK if options.quick else devices.FULL,
        data=kinds, rounds=positive(options.rounds), directory=options.swap,
    )  # fmt: skip
    put = writer(options.json)

    def work() -> None:
        results = devices.measure(wanted, list(devices.CONTENDERS), progress)
        progress("what checksums and encryption cost")
        costs = seal.measure(str(results.place), 64, 3)
        progress("")
        show(results, costs)
        put({**results.as_json(), "ns_for_each_folio": {cost.what: cost.ns for cost in costs}})

    return reported(work)


def show(results: "Results", costs: "list[seal.Cost]") -> None:
    """Print the tables, and what was aimed at."""
    from userswap.bench.device_program import PHASES, Phase
    from userswap.bench.devices import CONTENDERS, Case
    from userswap.sizes import format_size

    options = results.options

    def figure(name: str, case: Case, of: Callable[[Phase], float], form: str) -> str:
        found = results.median(name, case, of)
        return "" if found is None else format(found, form)

    def times(name: str, case: Case) -> str:
        found = results.times(name, case)
        return "" if found is None else f"{found:.2f}x"

    cases = [Case(data, phase) for data in options.data for phase in PHASES]
    names = list(CONTENDERS)
    ours = names[1:]
    table(
        f"MB/s of array memory: {format_size(options.size)} in {format_size(options.ram)}, swap files in "
        f"{results.place}, {options.rounds} round{'s'[: options.rounds > 1]}",
        ["", *names, *(f"{name}\nby kernel" for name in ours)],
        [
            [
                f"{case.data} {PHASES[case.phase]}",
                *(figure(name, case, lambda one: one.bytes / one.seconds / 1e6, ",.0f") for name in names),
                *(times(name, case) for name in ours),
            ]
            for case in cases
        ],
        "encrypt: userswap with --encrypt. swapoff: everything moves to RAM, where there is room for it.",
    )
    table(
        "Processor seconds for each GB of array memory",
        ["", *names],
        [
            [
                f"{case.data} {PHASES[case.phase]}",
                *(figure(name, case, lambda one: one.cpu_seconds / one.bytes * 1e9, ".2f") for name in names),
            ]
            for case in cases
        ],
        "All threads of the process, and kswapd.",
    )

    def latency(name: str, case: Case) -> str:
        found = [figure(name, case, of, ".0f") for of in (lambda one: one.p50_us, lambda one: one.p99_us)]
        return " / ".join(filter(None, found))

    anywhere = [case for case in cases if case.phase == "read anywhere"]
    table(
        "µs for a touch anywhere",
        ["", *names],
        [[case.data, *(latency(name, case) for name in names)] for case in anywhere],
        "Half of them took less / 99 of 100 did.",
    )
    for name, why in results.not_run.items():
        print(f"Not run: {CONTENDERS[name]}: {why}.")
    print("Of a folio of 64 KiB, ns: " + ", ".join(f"{cost.what} {cost.ns:,.0f}" for cost in costs) + ".")
    for verdict in results.verdicts():
        print(
            f"{'Met' if verdict.met else 'Missed'}: {verdict.what}: {verdict.times:.2f}x the kernel's, "
            f"{verdict.bar:g}x aimed at."
        )
    machine = results.machine
    print(
        f"Every byte was right. {machine.processor}, {machine.processors} processors, Linux {machine.kernel}, load "
        f"{machine.load_before:.1f} before."
    )
