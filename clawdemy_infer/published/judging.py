"""A row, judged: what was predicted without its source, what its source published, or why the two cannot be compared.

    impossible      does not fit into the memory, or is faster than every byte once at the data sheet's bandwidth and every FLOP at its peak
    inexpressible   no prediction, and the reason: a quality, a share that depends on the text, a figure that the source leaves out
    ok              predicted by figures that were fitted on other sources only
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache

from clawdemy_infer.arithmetic import Capacity
from clawdemy_infer.published.fitting import Figures, Stack, fit
from clawdemy_infer.published.plans import GENERATED, Plan, kv_format, plan
from clawdemy_infer.published.rows import Run, read
from clawdemy_infer.published.shapes import bytes_per_weight, shape_of

TOLERANCE = 0.02
"""How far a row may be beyond a bound before it is called impossible: data sheets and file sizes are rounded."""

NOT_LEARNT_FROM = ("speculative", "failure", "negative_control", "predicted_reference", "attention_kernel")
"""Categories that are judged and teach nothing: what was published because it went wrong, what is no run, comparisons of kernels."""

INEXPRESSIBLE = {
    "wikitext2_ppl": "a quality: it depends on the weights, not on how many there are",
    "acceptance_alpha": "a property of two models and a text",
    "kv_memory_used_pct": "a property of an allocator and of the lengths of its requests",
}


@dataclass(frozen=True)
class Judged:
    """One row of the verdict. Values in the row's own unit; seconds of the prediction by cause; `ratio` is predicted over published."""

    id: str
    category: str
    source: str
    status: str
    reason: str = ""
    predicted: float | None = None
    published: float | None = None
    ratio: float | None = None
    metric: str = ""
    unit: str = ""
    group: str = ""
    model: str = ""
    hardware: str = ""
    software: str = ""
    fits: bool | None = None
    binds: str | None = None
    terms: dict[str, float] | None = None
    fraction_of_bound: float | None = None
    generated: float | None = None

    @property
    def error(self) -> float:
        return abs(self.ratio - 1)

    def as_dict(self) -> dict:
        return asdict(self)


# ---- figures that a row's own source had no part in ----


def teaches(run: Run) -> bool:
    """Whether a row may be learnt from: a time that can be put as a plan, fits, and beats no bound."""
    if run.problem or run.draft_model or run.gamma or any(word in run.category for word in NOT_LEARNT_FROM):
        return False
    try:
        made = plan(run)
    except ValueError:
        return False
    return not _impossible(run, made)


class Evidence:
    """The rows that figures are fitted on, those of `data/published_runs.csv` unless others are given."""

    def __init__(self, runs: list[Run] | None = None):
        self.runs = [run for run in (read() if runs is None else runs) if teaches(run)]
        self.plans = [plan(run) for run in self.runs]
        self.seconds = [made.seconds(run.value) for run, made in zip(self.runs, self.plans, strict=True)]
        self.groups = [run.group for run in self.runs]
        self.without = cache(self._without)

    def _without(self, group: str | None) -> Figures:
        """The figures fitted on every row but those of one source."""
        return self.fitted(lambda run: run.group != group)

    def fitted(self, taken: Callable[[Run], bool]) -> Figures:
        """The figures fitted on the rows that `taken` accepts."""
        of = [index for index, run in enumerate(self.runs) if taken(run)]
        return fit([self.plans[i] for i in of], [self.seconds[i] for i in of], [self.groups[i] for i in of])

    def figures(self, run: Run) -> Figures:
        """Those for judging `run`. Sources that none of the rows is from share one fit, on all of them."""
        return self.without(run.group if run.group in self.groups else None)


# ---- the verdict ----


def judge(run: Run, figures: Figures) -> Judged:
    """The verdict on `run`, predicted with `figures`."""
    def verdict(status: str, reason: str = "", **found) -> Judged:
        return Judged(run.id, run.category, run.source, status, reason, published=run.value, metric=run.metric, unit=run.unit,
                      group=run.group, model=run.model, hardware=run.hardware, software=run.software, generated=run.gen_len, **found)

    def ok(predicted: float, reason: str = "", **found) -> Judged:
        return verdict("ok", reason, predicted=predicted, ratio=predicted / run.value, **found)

    if run.problem or run.metric in INEXPRESSIBLE:
        return verdict("inexpressible", run.problem or INEXPRESSIBLE[run.metric])
    try:
        if run.metric == "kv_KiB_per_token":
            return ok(shape_of(run).kv_bytes_per_token(kv_format(run)) / 1024)
        if run.metric == "spec_speedup":
            return ok(speedup(run), "by Leviathan et al. 2023, theorem 3.8; a draft step costs what its share of the weights says")
        made = plan(run)
        needs = capacity(run)
    except ValueError as why:
        return verdict("inexpressible", str(why))
    found = {"fits": None if needs is None else _fits(needs), "fraction_of_bound": made.bound / made.seconds(run.value)}
    if run.category == "predicted_reference":
        return ok(made.value(made.bound), "a formula of its source, no run: beside the bound", **found)
    if found["fits"] is False and shape_of(run).moe:
        return verdict("inexpressible", "the experts lie on more devices than the row states", **found)
    if why := _impossible(run, made):
        return verdict("impossible", why, **found)
    stack = Stack([made])
    terms = {name: float(seconds[0]) for name, seconds in stack.terms(figures).items()}
    predicted, note = made.value(sum(terms.values())), ""
    if run.draft_model or run.gamma:
        try:
            predicted, note = predicted * speedup(run), "as without a draft, times the speed-up that alpha and gamma promise"
        except ValueError as why:
            return verdict("inexpressible", str(why), **found)
    elif run.decode_context is None and run.metric.startswith("decode"):
        note = f"no context stated: that of {GENERATED} generated tokens, half of them on the average"
    return ok(predicted, note, binds=max(terms, key=terms.get), terms=terms, **found)


def speedup(run: Run) -> float:
    """Tokens per pass of the target, over what a pass and its drafts cost: (1-a^(g+1)) / ((1-a)(gc+1)), Leviathan et al. 2023, thm 3.8.

    c, the draft's step beside the target's, is its share of the weights. Raises ValueError if alpha, gamma or the draft is not stated.
    """
    if run.alpha is None or not 0 <= run.alpha < 1:
        raise ValueError("the share of drafted tokens that are accepted, alpha, is not stated")
    gamma = run.whole("gamma")
    if run.draft_params_B is None or not run.params_B:
        raise ValueError("draft_params_B is not stated")
    cost = run.draft_params_B / run.params_B
    return (1 - run.alpha ** (gamma + 1)) / ((1 - run.alpha) * (gamma * cost + 1))


def capacity(run: Run) -> Capacity | None:
    """What a run of a whole model keeps in the memory of all its devices; None where there is no model, or no memory stated."""
    if run.metric in ("gemm_ms", "attn_kernel_us", "allreduce_ms") or not run.mem_GB_per_device:
        return None
    shape = shape_of(run)
    context = max(run.decode_context or 1, (run.prompt_len or 0) + (run.gen_len or 0))
    batch = 1 if run.metric.endswith("mixed") else run.whole("batch", 1)
    memory = 1e9 * run.mem_GB_per_device * max(run.whole("n_devices", 1), run.whole("tp", 1))
    return shape.fits(memory, batch, max(1, round(context)), bytes_per_weight(run, shape), kv_format(run))


def _fits(needs: Capacity) -> bool:
    return needs.weight_bytes + needs.kv_bytes <= needs.memory * (1 + TOLERANCE)


def _impossible(run: Run, made: Plan) -> str:
    """Why `run` cannot have happened, or nothing."""
    needs = capacity(run)
    if needs is not None and not _fits(needs):
        return (f"does not fit: {needs.weight_bytes / 1e9:.1f} GB of weights and {needs.kv_bytes / 1e9:.1f} GB of KV cache, "
                f"and there are {needs.memory / 1e9:.1f} GB")
    passes = 1 + (run.gamma or 0) if run.draft_model or run.gamma else 1        # a pass gives gamma + 1 tokens at the most
    beaten = made.bound / passes / made.seconds(run.value)
    if beaten > 1 + TOLERANCE and not (run.draft_model and not run.gamma):
        return f"{beaten:.2f} times as fast as the bytes that must be read and the FLOPs that must be done allow"
    return ""
