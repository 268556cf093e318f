"""A row, judged: predicted without its source, or the reason why it cannot be.

    impossible      does not fit into the memory, or is faster than every byte once at the data
                    sheet's bandwidth and every FLOP at its peak
    inexpressible   a quality, a share that depends on the text, a figure that the source leaves out
    ok              predicted by figures that were fitted on other sources only
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from clawdemy_infer.arithmetic import Capacity
from clawdemy_infer.published.demand import GENERATED, Demand, demand, kv_format
from clawdemy_infer.published.fitting import Figures, Stack, fit
from clawdemy_infer.published.rows import PublishedRun, read
from clawdemy_infer.published.setting import bytes_per_weight, shape_of

TOLERANCE = 0.02
"""How far beyond a bound a row is called impossible: data sheets and file sizes are rounded."""
NOT_LEARNT_FROM = ("speculative", "failure", "negative_control", "predicted_reference",
                   "attention_kernel")
"""Categories that teach nothing: what went wrong, what is no run, comparisons of kernels."""
INEXPRESSIBLE = {
    "wikitext2_ppl": "a quality: it depends on the weights, not on how many there are",
    "acceptance_alpha": "a property of two models and a text",
    "kv_memory_used_pct": "a property of an allocator and of the lengths of its requests"}


@dataclass(frozen=True)
class Verdict:
    """One row, judged, with its own attributes too. `predicted` and `published` are in the row's
    unit, `terms` are seconds of the prediction by cause."""

    run: PublishedRun
    status: str
    reason: str = ""
    predicted: float | None = None
    fits: bool | None = None
    binds: str | None = None
    terms: dict[str, float] | None = None
    fraction_of_bound: float | None = None

    def __getattr__(self, name: str) -> str | float | None:
        return getattr(self.run, "value" if name == "published" else name)

    @property
    def ratio(self) -> float | None:
        return None if self.predicted is None else self.predicted / self.published

    @property
    def error(self) -> float:
        return abs(self.ratio - 1)

    def as_dict(self) -> dict:
        names = ("id category source status reason predicted published ratio metric unit group "
                 "model hardware software fits binds terms fraction_of_bound").split()
        return {name: getattr(self, name) for name in names} | {"generated": self.gen_len}


def teaches(run: PublishedRun) -> bool:
    """Whether a row may be learnt from: a demand that fits, and beats no bound."""
    if run.draft_model or run.gamma or any(word in run.category for word in NOT_LEARNT_FROM):
        return False
    try:
        return not run.problem and not _impossible(run, demand(run))
    except (ValueError, ArithmeticError):
        return False


def expressible(run: PublishedRun) -> bool:
    """Whether a row can be put as a demand."""
    try:
        return not run.problem and bool(demand(run))
    except (ValueError, ArithmeticError):
        return False


class Evidence:
    """The rows that figures are fitted on: those of `data/published_runs.csv`, or others."""

    def __init__(self, runs: list[PublishedRun] | None = None) -> None:
        self.runs = [run for run in (read() if runs is None else runs) if teaches(run)]
        self.demands = [demand(run) for run in self.runs]
        self.seconds = list(map(lambda run, one: one.seconds(run.value), self.runs, self.demands))
        self.groups = [run.group for run in self.runs]
        # The figures fitted on every row but those of one source.
        self.without = cache(lambda group: self.fitted(lambda run: run.group != group))

    def fitted(self, taken: Callable[[PublishedRun], bool]) -> Figures:
        chosen = [i for i, run in enumerate(self.runs) if taken(run)]
        return fit(*([of_all[i] for i in chosen]
                     for of_all in (self.demands, self.seconds, self.groups)))

    def figures(self, run: PublishedRun) -> Figures:
        """Those for judging `run`; if none of the rows is from its source, fitted on all rows."""
        return self.without(run.group if run.group in self.groups else None)


def judge(run: PublishedRun, figures: Figures) -> Verdict:
    # 1. What is no time, or cannot be put as a demand.
    if run.problem or run.metric in INEXPRESSIBLE:
        return Verdict(run, "inexpressible", run.problem or INEXPRESSIBLE[run.metric])
    try:
        if run.metric == "kv_KiB_per_token":
            return Verdict(run, "ok", "", shape_of(run).kv_bytes_per_token(kv_format(run)) / 1024)
        if run.metric == "spec_speedup":
            return Verdict(run, "ok", "by Leviathan et al. 2023, theorem 3.8; a draft step costs "
                           "what its share of the weights says", speedup(run))
        asked, needs = demand(run), capacity(run)
    except (ValueError, ArithmeticError) as why:
        return Verdict(run, "inexpressible", str(why))
    # 2. Capacity and the bound.
    found = {"fits": None if needs is None else _fits(needs),
             "fraction_of_bound": asked.bound / asked.seconds(run.value)}
    if run.category == "predicted_reference":
        return Verdict(run, "ok", "a formula of its source, no run: beside the bound",
                       asked.value(asked.bound), **found)
    if found["fits"] is False and shape_of(run).moe:
        return Verdict(run, "inexpressible",
                       "the experts lie on more devices than the row states", **found)
    if why := _impossible(run, asked):
        return Verdict(run, "impossible", why, **found)
    # 3. The prediction.
    terms = {name: float(seconds[0]) for name, seconds in Stack([asked]).terms(figures).items()}
    predicted, note = asked.value(sum(terms.values())), ""
    if run.draft_model or run.gamma:
        note = "as without a draft, times the speed-up that alpha and gamma promise"
        try:
            predicted *= speedup(run)
        except ValueError as why:
            return Verdict(run, "inexpressible", str(why), **found)
    elif run.decode_context is None and run.metric.startswith("decode"):
        note = (f"no context stated: that of {GENERATED} generated tokens, half of them on the "
                "average")
    return Verdict(run, "ok", note, predicted, binds=max(terms, key=terms.get), terms=terms,
                   **found)


def speedup(run: PublishedRun) -> float:
    """Tokens per pass of the target, over what a pass and its drafts cost: (1-a^(g+1)) /
    ((1-a)(gc+1)), Leviathan et al. 2023, theorem 3.8; c, a draft step beside the target's, is its
    share of the weights. Raises ValueError if alpha, gamma or the draft is not stated."""
    if run.alpha is None or not 0 <= run.alpha < 1:
        raise ValueError("the share of drafted tokens that are accepted, alpha, is not stated")
    gamma = run.whole("gamma")
    if run.draft_params_B is None or not run.params_B:
        raise ValueError("draft_params_B is not stated")
    cost = run.draft_params_B / run.params_B
    return (1 - run.alpha ** (gamma + 1)) / ((1 - run.alpha) * (gamma * cost + 1))


def capacity(run: PublishedRun) -> Capacity | None:
    """What a whole model keeps in the memory of all its devices; None without a model or memory."""
    if run.metric in ("gemm_ms", "attn_kernel_us", "allreduce_ms") or not run.mem_GB_per_device:
        return None
    shape = shape_of(run)
    context = max(run.decode_context or 1, (run.prompt_len or 0) + (run.gen_len or 0))
    batch = 1 if run.metric.endswith("mixed") else run.whole("batch", 1)
    memory = 1e9 * run.mem_GB_per_device * max(run.whole("n_devices", 1), run.whole("tp", 1))
    return shape.fits(memory, batch, max(1, round(context)), bytes_per_weight(run, shape),
                      kv_format(run))


def _fits(needs: Capacity) -> bool:
    return needs.weight_bytes + needs.kv_bytes <= needs.memory * (1 + TOLERANCE)


def _impossible(run: PublishedRun, asked: Demand) -> str:
    """Why `run` cannot have happened, or nothing."""
    needs = capacity(run)
    if needs is not None and not _fits(needs):
        weights, kv, memory = (x / 1e9 for x in (needs.weight_bytes, needs.kv_bytes, needs.memory))
        return (f"does not fit: {weights:.1f} GB of weights and {kv:.1f} GB of KV cache, and there "
                f"are {memory:.1f} GB")
    passes = 1 + (run.gamma or 0)                       # a pass gives gamma + 1 tokens at the most
    beaten = asked.bound / passes / asked.seconds(run.value)
    if beaten > 1 + TOLERANCE and not (run.draft_model and not run.gamma):
        return (f"{beaten:.2f} times as fast as the bytes that must be read and the FLOPs that "
                "must be done allow")
    return ""
