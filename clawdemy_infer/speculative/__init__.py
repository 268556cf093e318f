"""Speculative decoding: guess a few tokens cheaply, check them all in one step, and lose nothing of the target's distribution.

In reading order: `drafts` guess, `verification` decides what stands, `rounds` is the loop around them, `theory` says what it
should gain, `adaptive` lets that choose γ, `compare` says what it does, on `prompts`, `prediction` what its parts should cost, and
`beside_transformers` what theirs does; `engine` serves many with it. `trained` is a draft that was trained for its target, by `train_draft`
on `draft_samples`.
"""

from clawdemy_infer.speculative.drafts import Draft, EarlyExit, ModelDraft, PromptLookup, Proposal, SelfDraft, draft_named
from clawdemy_infer.speculative.rounds import Round, Speculation, speculate, speculate_batch
from clawdemy_infer.speculative.verification import Verdict, verify, verify_greedy

__all__ = [
    "Draft", "EarlyExit", "ModelDraft", "PromptLookup", "Proposal", "Round", "SelfDraft", "Speculation", "Verdict", "draft_named",
    "speculate", "speculate_batch", "verify", "verify_greedy",
]
