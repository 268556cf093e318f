"""A step before it is run and after: a scheduler's plan, and what each sequence gets of it."""

from collections.abc import Mapping
from typing import NamedTuple

from clawdemy_infer.batching.request import Sequence


class Plan(NamedTuple):
    """One step: how many new tokens each sequence brings; `num_lookahead_tokens`, for how many
    drafted ones a decoding sequence has room beyond its own; and of a static batch `padded` =
    (sequences, T, S): T tokens of each of these sequences, ended or not, in a context of S."""

    num_new_tokens: Mapping[Sequence, int]
    num_lookahead_tokens: Mapping[Sequence, int] = {}
    padded: tuple[list[Sequence], int, int] | None = None


class Emission(NamedTuple):
    """What a sequence gets: token ids (None where nobody needs them), their text, and why it ends
    with the last of them, or "". A step brings one token; or several at once, where
    `num_draft_tokens` were drafted: those that were accepted, and one of the model's own, unless
    the reason is "failed" and there was none to choose."""

    ids: list[int] | None = None
    text: str = ""
    reason: str = ""
    num_tokens: int = 1
    num_draft_tokens: int = 0
