"""The real clock: an executor that runs the model, and so spends the time that it reports."""

import time
from collections.abc import Iterable, Mapping
from math import isfinite
from random import Random

import torch

from clawdemy_infer.batching.plan import Emission, Plan
from clawdemy_infer.batching.request import Request, Sequence
from clawdemy_infer.kv_cache import BlockTables, PagedCache
from clawdemy_infer.model import Decoder, Sampling, sample
from clawdemy_infer.model.generate import prompt_ids
from clawdemy_infer.model.sampling import NOTHING
from clawdemy_infer.model.writing import Writer
from clawdemy_infer.timing import now


class TorchExecutor:
    """Runs `model` on the sequences of `cache`, which counts a step's tokens only when all of it is
    done: a step that breaks off has not happened, and is decided again."""

    def __init__(self, model: Decoder, cache: PagedCache,
                 tables: BlockTables | None = None) -> None:
        self.model, self.cache, self.tables = model, cache, tables or cache.tables
        self.start: float | None = None
        self.generators: dict[Sequence, torch.Generator] = {}
        self.writers: dict[Sequence, Writer] = {}

    def now(self) -> float:
        self.start = self.start or now()
        return now() - self.start

    def wait_until(self, seconds: float) -> None:
        time.sleep(max(0.0, seconds - self.now()))

    def tokens(self, request: Request) -> tuple[int, list[int]]:
        """The ids of its prompt; where only their number is given, drawn at random by the id."""
        V, prompt, tokenizer = self.model.config.shape.V, request.prompt, self.model.tokenizer
        if (isinstance(prompt, str) or request.stop) and tokenizer is None:
            raise ValueError(f"request {request.id!r}: this model has no tokenizer; token ids are "
                             "accepted, and no stop")
        if isinstance(prompt, int):
            random = Random(str(request.id))
            return prompt, [random.randrange(V) for _ in range(prompt)]
        ids = prompt_ids(self.model, prompt)
        if ids and not (0 <= min(ids) and max(ids) < V):
            raise ValueError(f"prompt: request {request.id!r} has ids from {min(ids)} to "
                             f"{max(ids)}; 0 to V-1 = {V - 1} are accepted")
        return len(ids), ids

    def run(self, plan: Plan) -> Mapping[Sequence, Emission]:
        logits, rows = self._logits(plan)
        largest, token = (x.tolist() for x in logits.max(-1))       # as `likeliest`, in fewer calls
        greedy = [i if isfinite(x) else NOTHING for x, i in zip(largest, token, strict=True)]
        chosen = {sequence: [self._choose(sequence, greedy[row], logits[row])]
                  for row, sequence in enumerate(rows)
                  if sequence in plan.num_new_tokens
                  and self.tables.lengths[sequence] == sequence.total}
        return self._write(chosen)

    def forget(self, sequence: Sequence) -> None:
        self.generators.pop(sequence, None)
        self.writers.pop(sequence, None)

    # ---- details ----

    def _logits(self, plan: Plan) -> tuple[torch.Tensor, Iterable[Sequence]]:
        """The logits [B, V] that follow each sequence of the step, and which these are."""
        return self.model.step(self._brought(plan), self.cache), plan.num_new_tokens

    def _brought(self, plan: Plan) -> dict[Sequence, list[int]]:
        lengths = self.tables.lengths
        return {sequence: sequence.ids[lengths[sequence]:lengths[sequence] + count]
                for sequence, count in plan.num_new_tokens.items()}

    def _choose(self, sequence: Sequence, greedy: int, logits: torch.Tensor) -> int:
        """The next token of one sequence, as `model.generate` would choose it."""
        if (sampling := sequence.request.sampling) is None:
            return greedy
        return int(sample(logits[None], sampling, self._generator(sequence)))

    def _generator(self, sequence: Sequence) -> torch.Generator:
        """Its own, so that neighbours change nothing."""
        if sequence not in self.generators:
            sampling = sequence.request.sampling or Sampling()
            self.generators[sequence] = sampling.generator(self.model.device)
        return self.generators[sequence]

    def _write(self, chosen: Mapping[Sequence, list[int]],
               drafted: Mapping[Sequence, list[int]] = {}) -> dict[Sequence, Emission]:
        """What the chosen tokens mean for each sequence, as far as its text goes on."""
        emitted = {}
        for sequence, tokens in chosen.items():
            if sequence not in self.writers:
                request, free = sequence.request, sequence.request.output_tokens is None
                self.writers[sequence] = Writer(
                    sequence.limit, self.model.config.eos_ids if free else (),
                    self.model.tokenizer, request.stop if free else ())
            taken, text = self.writers[sequence].take(tokens)
            emitted[sequence] = Emission(taken, text, self.writers[sequence].reason, len(taken),
                                         len(drafted.get(sequence, ())))
        return emitted
