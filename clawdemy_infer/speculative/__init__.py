"""Speculative decoding: draft tokens cheaply, and lose nothing of the target's distribution."""

from clawdemy_infer.speculative.drafts import Draft, ModelDraft, PromptLookup, Proposal
from clawdemy_infer.speculative.rounds import Round, Speculation, speculate, speculate_batch
from clawdemy_infer.speculative.verification import Verdict, verify, verify_greedy

__all__ = ["Draft", "ModelDraft", "PromptLookup", "Proposal", "Round", "Speculation", "Verdict",
           "speculate", "speculate_batch", "verify", "verify_greedy"]
