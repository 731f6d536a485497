"""Memory that nobody needs any more, given back."""

from __future__ import annotations

import ctypes
import gc
import sys
import traceback
from types import TracebackType

import torch


def free() -> None:
    """Give back the memory of every trainer that has no name any more, also after an error: ``del trainer; st.free()``.

    A notebook keeps the last error for its debugger, and with it the frames in which a step failed and all that they hold; those are
    let go.
    """
    error: BaseException | None = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
    while error is not None and error.__traceback__ is not None:
        traceback.clear_frames(error.__traceback__)
        link: TracebackType | None = error.__traceback__
        while link is not None:  # IPython keeps the first link of its own, and each holds the next
            link.tb_next, link = None, link.tb_next
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
    sys.last_traceback = None
    gc.collect()
    give_back()


def give_back() -> None:
    """Return freed memory to the system: glibc and the GPU's allocator keep it otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
