"""`userswap lab replay`: what a recorded program asked of the swap map, asked of every design."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from userswap.cli.lab_programs import chosen_designs, positive, progress, reported, table, writer
from userswap.cli.main import Parser

if TYPE_CHECKING:
    from userswap.lab.replay import Replay
    from userswap.lab.trace import Trace

__all__ = ["prepare_replay"]

RARE = 200  # a kind of event with less than one in so many has no column


def prepare_replay(arguments: list[str]) -> Callable[[], int]:
    """Return the replay of a trace. Raises UserswapError."""
    from userswap.lab.replay import replay
    from userswap.lab.trace import find, shipped

    parser = Parser(
        prog="userswap lab replay",
        description="Replay a recorded program under every design of the swap map.",
        epilog=f"Traces that come with userswap: {', '.join(shipped())}.",
    )
    parser.add_argument("trace", help="a file that userswap run --trace made, or the name of a trace below")
    parser.add_argument("--designs", metavar="NAME,...", help="only these (default: all)")
    parser.add_argument("--rounds", type=int, default=9, help="medians are over this many (default %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    options = parser.parse_args(arguments)
    designs, rounds = chosen_designs(options.designs), positive(options.rounds)
    trace = find(options.trace)
    put = writer(options.json)

    def work() -> None:
        report = replay(trace, designs, rounds, progress)
        progress("")
        show_replay(trace, report, rounds)
        put(replay_figures(trace, report, rounds))

    return reported(work)


def replay_figures(trace: "Trace", report: "Replay", rounds: int) -> dict[str, Any]:
    """What --json writes. Times are ns an event, sizes bytes."""
    from userswap.lab.replay import spread

    designs: dict[str, Any] = {}
    for name, result in report.designs.items():
        designs[name] = (
            {"refused": result.refused}
            if result.refused
            else {
                "ns_per_event": spread(result.total),
                "ns_by_kind": {kind: spread(values) for kind, values in result.kinds.items()},
                "peak_metadata_bytes": result.peak_metadata,
                "bytes_per_id": result.bytes_per_id,
            }
        )
    return {
        "program": trace.program,
        "budget_bytes": trace.budget_bytes,
        "folio_bytes": trace.folio_bytes,
        "cut": trace.cut,
        "events": len(trace.kinds),
        "counts": report.counts,
        "peak_ids": report.peak_ids,
        "live_at_end": report.live_at_end,
        "slots": report.slots,
        "rounds": rounds,
        "replays_per_round": report.repeats,
        "designs": designs,
    }


def show_replay(trace: "Trace", report: "Replay", rounds: int) -> None:
    """Print the table."""
    from userswap.lab.replay import spread
    from userswap.sizes import format_size

    # What is rare takes what the first of its kind takes: that is in the --json file only.
    kinds = [kind for kind, number in report.counts.items() if kind != "more" and number * RARE > len(trace.kinds)]
    rows: list[list[str]] = []
    refusals = ""
    for name, result in report.designs.items():
        if result.refused:
            rows.append([name, "can't"])
            refusals += f"{name} can't: {result.refused}. "
            continue
        total = spread(result.total)
        rows.append(
            [
                name,
                f"{total['median']:.1f}",
                f"{total['least']:.1f}..{total['most']:.1f}",
                *(f"{spread(result.kinds[kind])['median']:.1f}" for kind in kinds),
                f"{result.peak_metadata / 1024:,.0f}",
                f"{result.bytes_per_id:.1f}",
            ]
        )
    columns = ["design", "ns/event", "spread", *kinds, "peak KiB", "bytes/id"]
    what = ", ".join(f"{number:,} {kind}" for kind, number in report.counts.items())
    took = int(trace.times[-1]) / 1e9 if len(trace.times) else 0
    title = (
        f"{trace.program} in {format_size(trace.budget_bytes)}: {len(trace.kinds):,} events in {took:.1f} s, "
        f"at most {report.peak_ids:,} swap ids"
    )
    cut = "The recording was cut: the program went on. " if trace.cut else ""
    table(
        title,
        columns,
        rows,
        (
            f"{cut}{refusals}{what}. ns an event, medians of {rounds} rounds of {report.repeats} replays by one "
            "thread; every entry that was found was checked."
        ),
    )
