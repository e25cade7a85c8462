"""One public call as the scheduler sees it: who drives it, and when its wait for a slot ends."""

import math
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from ovfast.errors import CapacityError


def always_wanted() -> float:
    """Of a call that waits as long as it takes."""
    return math.inf


@dataclass(slots=True, eq=False)
class Call:
    """One public call; the slots it holds come free when it has ended.

    Attributes:
        owner: the thread that drives it; None once several have, as then any of them may go on.
        give_up: asked while it waits for a slot and before its prefill: raises where nobody wants
            the answer any more, else returns the seconds after which to ask again at the latest.
        ended: set by the call's last act, however it ends.
    """

    owner: int | None
    give_up: Callable[[], float] = always_wanted
    ended: bool = False


def check_wait_ends(slots: Sequence[Call | None], stuck: AbstractSet[int]) -> None:
    """Checks that a slot can come free.

    Args:
        slots: the call that holds each.
        stuck: threads that wait for a slot.

    Raises:
        CapacityError: each slot is held by a call of a thread that waits itself.
    """
    if all(call is not None and call.owner in stuck for call in slots):
        raise CapacityError(
            f"all {len(slots)} slots are taken, and waiting would never end: a stream that this"
            " thread has left open holds one. Finish or close the stream, or load with a larger"
            " max_batch_size."
        )
