"""What a scheduler is told to do: how to batch, how much at once, whose turn, who gives way."""

from dataclasses import dataclass

ACCEPTED = {"batching": ("static", "continuous"), "order": ("fcfs", "priority"),
            "preemption": ("recompute", "swap")}


@dataclass(frozen=True)
class Policy:
    """How requests share the machine. ValueError names a field that is wrong, and what is accepted.

    batching         "static": a batch is formed, padded, and kept until its last sequence has ended
                     "continuous": after every step, whoever has ended leaves and whoever waits
                     joins (Yu et al. 2022, Orca)
    max_batch        most sequences that run at once
    token_budget     most new tokens of a step. Tokens of running sequences come first, and a prompt
                     gets what is left, in chunks (Agrawal et al. 2024, Sarathi-Serve). None: a
                     prompt comes whole, and all who decode wait for it
    order            "fcfs": first come, first served
                     "priority": smaller numbers first, then first come; nobody ages, so a request
                     may wait for as long as smaller numbers keep coming
    preemption       what becomes of the sequence that gives way when no block is free: "recompute"
                     begins it anew, "swap" moves its blocks to the host (Kwon et al. 2023, 4.5)
    prefix_caching   prompts that begin alike share blocks
    gamma            most tokens that are drafted for a decoding sequence, and verified in the same
                     step (Leviathan et al. 2023), as far as budget and blocks are left; 0: none
    """

    batching: str = "continuous"
    max_batch: int = 16
    token_budget: int | None = None
    order: str = "fcfs"
    preemption: str = "recompute"
    prefix_caching: bool = False
    gamma: int = 0

    def __post_init__(self) -> None:
        for name, values in ACCEPTED.items():
            if (value := getattr(self, name)) not in values:
                raise ValueError(f"{name}={value!r}: accepted are {', '.join(values)}")
        if self.max_batch < 1:
            raise ValueError(f"max_batch={self.max_batch}: at least 1")
        if self.token_budget is not None and self.token_budget < self.max_batch:
            raise ValueError(f"token_budget={self.token_budget}: at least max_batch="
                             f"{self.max_batch}, a token for each that decodes")
        if type(self.gamma) is not int or self.gamma < 0:
            raise ValueError(f"gamma={self.gamma}: a whole number, 0 (draft nothing) or more")
        for name in ("token_budget", "prefix_caching", "gamma"):
            if self.batching == "static" and (value := getattr(self, name)):
                raise ValueError(f"{name}={value}: only continuous batching has this, not static")
