"""What has to be set up anew in a forked child: threads and held locks of the parent are gone."""

import os
import weakref
from collections.abc import Callable
from functools import cache, partial

import torch

__all__ = ["after_fork", "keep_torch_single_threaded"]


def after_fork(method: Callable[[], object]) -> None:
    """Has a method called in every child forked from here on, as long as its object lives.

    Args:
        method: bound to the object.
    """
    reference = weakref.WeakMethod(method)
    os.register_at_fork(after_in_child=lambda: (found := reference()) and found())


@cache
def keep_torch_single_threaded() -> None:
    """Gives torch one thread in children forked from here on, as its data loaders do: a parallel
    loop of theirs would wait for ever for OpenMP's threads, which stayed with the parent.
    """
    os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))
