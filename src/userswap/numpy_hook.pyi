from collections.abc import Callable
from typing import ParamSpec, TypeVar

from userswap._core import Core

P = ParamSpec("P")
R = TypeVar("R")

def new_handler(core: Core) -> object: ...
def call_with_handler(
    handler: object, tiers: int, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs
) -> R: ...
def install(core: Core | None, least_bytes: int) -> None: ...
