"""What to do where memory does not suffice: the same in smaller pieces."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .language_loss_panorama import is_sharded

# What allocators say that raise a plain RuntimeError; those of CUDA, ROCm and XPU raise torch.OutOfMemoryError.
_WORDS = (
    "DefaultCPUAllocator: can't allocate memory",  # Linux, macOS
    "DefaultCPUAllocator: not enough memory",  # Windows
    "MPS backend out of memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator of torch raised this because there was no more memory."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


class InPieces:
    """Runs a module on the rows of a tensor: all at once, until memory does not suffice. From then on in the largest
    pieces, each time half as large, for which it does, with a warning.

    Where there are gradients, what a piece keeps for backward is thrown away and computed once more then, or all pieces
    together would take as much as the whole. Nothing but out-of-memory is caught.

    Attributes:
        size: rows at a time, `None` for all.
    """

    def __init__(self) -> None:
        self.size: int | None = None

    def __call__(
        self, function: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor, module: nn.Module
    ) -> torch.Tensor:
        """`function(rows)`, [N, ...] -> [N, ...].

        Args:
            function: of which each row that comes out depends on the same row that goes in alone.
            module: what it runs.
        """
        if torch.compiler.is_compiling():  # a graph has one shape, and catches nothing
            return function(rows)
        while True:
            size = min(self.size or len(rows), len(rows))
            try:
                if size == len(rows):
                    return function(rows)
                return torch.cat([_run(function, piece) for piece in rows.split(size)])
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                reason = "fewer there are not" if size <= 1 else _indivisible(module)
                if reason is not None:
                    error.add_note(f"Encoding {len(rows)} views, {size} at a time; {reason}. Try a smaller batch.")
                    raise
            # Only here, where the error and with it all that the attempt had computed is gone.
            self.size = (size + 1) // 2
            warnings.warn(
                f"out of memory while encoding {len(rows)} views, {size} at a time: going on with {self.size}, "
                "which gives the same result, more slowly",
                stacklevel=3,
            )


def _run(function: Callable[[torch.Tensor], torch.Tensor], piece: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled():
        return checkpoint(function, piece, use_reentrant=False)
    return function(piece)


def _indivisible(module: nn.Module) -> str | None:
    """Why a module cannot be run in pieces; `None` where it can."""
    if any(is_sharded(part) for part in module.modules()) or any(
        hasattr(parameter, "device_mesh") for parameter in module.parameters()
    ):
        return "weights in shards are gathered at each call, and the other processes make only one"
    if any(isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training for part in module.modules()):
        return "BatchNorm in training takes the statistics of all of them"
    return None
