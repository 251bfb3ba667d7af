"""What a program does when it is asked, through its control socket: one function for each kind of message.

Runs in a thread of ours that has the GIL (control.listener), in the middle of somebody else's program: so it imports
little, asks nothing of `threading` (a thread of ours that called it would be listed there), and answers whatever comes.
See docs/control.md for the messages.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from userswap.control.listener import Asked
from userswap.control.places import VERSION
from userswap.errors import ControlError, UserswapError
from userswap.pool import BUDGET, Pool, check_budget, live_pools
from userswap.sizes import parse_size, shown

__all__ = ["answer"]

Message = dict[str, Any]


def answer(asked: Asked) -> None:
    """Carry out a message, and send what came of it."""
    try:
        reply = carry_out(asked)
    except (UserswapError, ValueError, OSError, MemoryError) as error:
        reply = {"error": str(error) or type(error).__name__}
    except Exception as error:
        reply = {"error": f"The program could not do that ({type(error).__name__}: {error})."}
    asked.send(json.dumps(reply).encode() + b"\n")


def carry_out(asked: Asked) -> Message:
    """Do what the message says. Raises ControlError for one that says nothing sensible."""
    message = parsed(asked.line)
    wanted = message.get("do")
    action = ACTIONS.get(wanted) if isinstance(wanted, str) else None
    if action is None:
        raise ControlError(f"There is nothing called {shown(wanted)} to do here, only {', '.join(ACTIONS)}.")
    return action(message, asked)


def parsed(line: bytes) -> Message:
    """A message of ours. Raises ControlError."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict) or "userswap" not in message:
        raise ControlError("This is no message of userswap's: nothing was done.")
    if message["userswap"] != VERSION:
        raise ControlError(
            f"The program speaks version {VERSION} of userswap's messages, and was sent version "
            f"{shown(message['userswap'])}: use the userswap that it runs under."
        )
    return message


def pool_of(message: Message) -> tuple[int, Pool]:
    """The pool that a message is about: the one that it names, else the only one. Raises ControlError."""
    pools = live_pools()
    number = message.get("pool")
    if not pools:
        raise ControlError(f"Process {os.getpid()} has no pool any more.")
    if number is None:
        if len(pools) > 1:
            names = ", ".join(f"{os.getpid()}/{number}" for number in pools)
            raise ControlError(f"Process {os.getpid()} has {len(pools)} pools: say which one, of {names}.")
        return next(iter(pools.items()))
    if type(number) is not int or number not in pools:
        names = ", ".join(f"{os.getpid()}/{number}" for number in pools)
        raise ControlError(f"Process {os.getpid()} has no pool {shown(number)}, only {names}.")
    return number, pools[number]


def text_of(message: Message, key: str) -> str:
    """A text that a message must have. Raises ControlError."""
    text = message.get(key)
    if not isinstance(text, str) or not text or "\0" in text:
        raise ControlError(f"The message says nothing sensible for {key!r}: nothing was done.")
    return text


def figures(number: int, pool: Pool) -> Message:
    """What `ps` shows of a pool."""
    swaps = [asdict(file) for file in pool.swaps()]
    own = {"hard": pool.hard, "budget_reason": pool.budget_reason, "swaps": swaps}
    return {"pool": number, **pool.stats().as_dict(), **own}


def say_all(message: Message, asked: Asked) -> Message:
    """Every pool and its figures."""
    pools = [figures(number, pool) for number, pool in live_pools().items() if not pool.closed]
    return {"pid": os.getpid(), "pools": pools}


def set_values(message: Message, asked: Asked) -> Message:
    """Change settings of a pool: all that are named, or none if one can't be."""
    number, pool = pool_of(message)
    values = message.get("values")
    if not isinstance(values, dict) or not values:
        raise ControlError(f"Say what to set: there {'are' if len(SETTINGS) > 1 else 'is'} {', '.join(SETTINGS)}.")
    changes = []
    for key, value in values.items():
        if key not in SETTINGS:
            raise ControlError(
                f"{shown(key)} can't be set while a program runs; these can: {', '.join(SETTINGS)}. Nothing was set."
            )
        if not isinstance(value, str):
            raise ControlError(f"{key} is to be a text such as 1G: nothing was set.")
        changes.append((key, SETTINGS[key](pool, value)))
    was = {key: getattr(pool, key) for key in values}
    for key, value in changes:
        setattr(pool, key, value)
    return {"pool": number, "was": was, "now": {key: getattr(pool, key) for key in values}, **pool.stats().as_dict()}


def budget(pool: Pool, text: str) -> int:
    """A budget that works. Raises UserswapError."""
    size = parse_size(text, BUDGET)
    check_budget(size)
    return size


def switch(pool: Pool, text: str) -> bool:
    """Yes or no. Raises ControlError."""
    found = {"yes": True, "on": True, "1": True, "no": False, "off": False, "0": False}.get(text.strip().lower())
    if found is None:
        raise ControlError(f"{shown(text)} is neither yes nor no: nothing was set.")
    return found


def swap_on(message: Message, asked: Asked) -> Message:
    """One swap file more."""
    number, pool = pool_of(message)
    return {"pool": number, "swap": asdict(pool.swapon(text_of(message, "spec")))}


def swap_off(message: Message, asked: Asked) -> Message:
    """One swap file less, if its client waits for that to its end."""
    number, pool = pool_of(message)
    path = text_of(message, "path")
    last = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal last
        if asked.gone():
            raise ControlError(f"Stopped: {path} is in use again; what has left it stays where it is now.")
        if time.monotonic() - last >= PROGRESS_PERIOD:
            last = time.monotonic()
            asked.send(json.dumps({"progress": [done, total]}).encode() + b"\n")

    pool.swapoff(path, progress=progress)
    return {"pool": number, "path": path}


PROGRESS_PERIOD = 0.1
SETTINGS: dict[str, Callable[[Pool, str], Any]] = {"ram": budget, "hard": switch}
ACTIONS: dict[str, Callable[[Message, Asked], Message]] = {
    "ps": say_all,
    "set": set_values,
    "swapon": swap_on,
    "swapoff": swap_off,
}
