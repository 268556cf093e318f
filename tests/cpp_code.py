"""C++ that only tests call, `tests/{name}.cpp`, made of the headers of `fast/cpp` as the library's
own code is. Whole steps have attention in them; here it is alone."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch

from clawdemy_infer.fast import cpp


def code(name: str, arrays: int, numbers: int, **defines: object) -> Callable:
    """The function `name` of tests/{name}.cpp."""
    with TemporaryDirectory() as folder:
        for source in (*cpp.FOLDER.glob("*.h"), Path(__file__).with_name(f"{name}.cpp")):
            shutil.copy(source, folder)
        with mock.patch.object(cpp, "FOLDER", Path(folder)):
            return cpp.function(cpp.library(name, **defines), name, arrays, numbers)


def attend_pages(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, table: torch.Tensor,
                 past: Sequence[int], num_new_tokens: Sequence[int],
                 window: int | None = None) -> torch.Tensor:
    """softmax(q kᵀ / sqrt(H)) v for q [M, N, H], the new tokens of each sequence one behind the
    other, over keys and values [blocks, K, block_size, H]: [M, N, H], in fp32 or bf16 as all
    are.

    `table` [B, most] of int32 says which blocks a sequence has, `past[b]` how many tokens it had
    before, `num_new_tokens[b]` how many it brings. A token sees the last `window` of its sequence
    up to itself, or all.
    """
    (_, N, H), (_, K, block_size, _) = q.shape, keys.shape
    assert q.dtype == keys.dtype == values.dtype and table.dtype == torch.int32 and N % K == 0
    assert keys.is_contiguous() and values.is_contiguous() and table.is_contiguous()
    q, out = q.contiguous(), torch.empty(q.shape, dtype=q.dtype)
    past, num_new_tokens = torch.tensor(past), torch.tensor(num_new_tokens)
    run = code("attention", 7, 5, Kept=cpp.TYPES[q.dtype], G=N // K, H=H, K=K)
    run(*cpp.pointers(q, keys, values, table, past, num_new_tokens, out), len(past),
        table.shape[1], block_size, window or cpp.EVERYTHING, torch.get_num_threads())
    return out
