"""A row, judged: predicted without its source, or the reason why it cannot be.

    impossible      does not fit into the memory, or beats every byte once and every FLOP at peak
    inexpressible   a quality, a share that depends on the text, a figure that the source leaves out
    ok              predicted by figures that were fitted on other sources only
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from clawdemy_infer.arithmetic import Capacity
from clawdemy_infer.published.demand import GENERATED, demand
from clawdemy_infer.published.fitting import START, Figures, Stack, fit
from clawdemy_infer.published.rows import RULES, PublishedRun, read
from clawdemy_infer.published.setting import bytes_per_weight, shape_of

TOLERANCE = 0.02
"""How far beyond a bound a row is called impossible: data sheets and file sizes are rounded."""


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
    """Whether a row may be learnt from: no draft, a demand that fits, and beats no bound."""
    barred = any(word in run.category for word in RULES["not_learnt_from"])
    return not (barred or run.draft_model or run.gamma) and judge(run, START).terms is not None


class Evidence:
    """The rows that figures are fitted on: those of `data/published_runs.csv`, or others."""

    def __init__(self, runs: list[PublishedRun] | None = None) -> None:
        self.runs = [run for run in (read() if runs is None else runs) if teaches(run)]
        self.demands = [demand(run) for run in self.runs]
        self.groups = {run.group for run in self.runs}
        # The figures fitted on every row but those of one source.
        self.without = cache(lambda group: self.fitted(lambda run: run.group != group))

    def fitted(self, taken: Callable[[PublishedRun], bool]) -> Figures:
        chosen = [(asked, asked.seconds(run.value), run.group)
                  for run, asked in zip(self.runs, self.demands, strict=True) if taken(run)]
        return fit(*zip(*chosen, strict=True))

    def figures(self, run: PublishedRun) -> Figures:
        """Those for judging `run`; if none of the rows is from its source, fitted on all rows."""
        return self.without(run.group if run.group in self.groups else None)


def judge(run: PublishedRun, figures: Figures) -> Verdict:
    found = {}
    try:
        # 1. What is no time, or cannot be put as a demand.
        if why := run.problem or RULES["inexpressible"].get(run.metric):
            raise ValueError(why)
        if run.metric == "kv_KiB_per_token":
            return Verdict(run, "ok", "", shape_of(run).kv_bytes_per_token(run.kv_format) / 1024)
        if run.metric == "spec_speedup":
            return Verdict(run, "ok", "by Leviathan et al. 2023, theorem 3.8; a draft step costs "
                           "what its share of the weights says", speedup(run))
        asked, needs = demand(run), capacity(run)
        # 2. Capacity and the bound.
        fits = None if needs is None else (
            needs.weight_bytes + needs.kv_bytes <= needs.memory * (1 + TOLERANCE))
        fraction = asked.bound / asked.seconds(run.value)
        found = {"fits": fits, "fraction_of_bound": fraction}
        if run.category == "predicted_reference":
            return Verdict(run, "ok", "a formula of its source, no run: beside the bound",
                           asked.value(asked.bound), **found)
        if fits is False and shape_of(run).moe:
            raise ValueError("the experts lie on more devices than the row states")
        if fits is False:
            weights, kv, memory = needs.weight_bytes / 1e9, needs.kv_bytes / 1e9, needs.memory / 1e9
            return Verdict(run, "impossible", f"does not fit: {weights:.1f} GB of weights and "
                           f"{kv:.1f} GB of KV cache, and there are {memory:.1f} GB", **found)
        # A pass gives gamma + 1 tokens at the most; with a draft of no stated gamma, any number.
        beaten = fraction / (1 + (run.gamma or 0))
        if beaten > 1 + TOLERANCE and (run.gamma or not run.draft_model):
            return Verdict(run, "impossible", f"{beaten:.2f} times as fast as the bytes that must "
                           "be read and the FLOPs that must be done allow", **found)
        # 3. The prediction.
        seconds = Stack([asked]).terms(figures)
        terms = {name: float(of_the_row[0]) for name, of_the_row in seconds.items()}
        predicted, note = asked.value(sum(terms.values())), ""
        if run.draft_model or run.gamma:
            predicted *= speedup(run)
            note = "as without a draft, times the speed-up that alpha and gamma promise"
        elif run.decode_context is None and run.metric.startswith("decode"):
            note = (f"no context stated: that of {GENERATED} generated tokens, half of them on the "
                    "average")
        return Verdict(run, "ok", note, predicted, binds=max(terms, key=terms.get), terms=terms,
                       **found)
    except (ValueError, ArithmeticError) as error:
        return Verdict(run, "inexpressible", str(error), **found)


def speedup(run: PublishedRun) -> float:
    """Tokens per pass of the target, over what a pass and its drafts cost: (1-a^(g+1)) /
    ((1-a)(gc+1)), Leviathan et al. 2023, theorem 3.8; c, a draft step beside the target's, is its
    share of the weights. Raises ValueError if alpha, gamma or the draft is not stated."""
    if run.alpha is None or not 0 <= run.alpha < 1:
        raise ValueError("the share of drafted tokens that are accepted, alpha, is not stated")
    if run.draft_params_B is None or not run.params_B:
        raise ValueError("draft_params_B is not stated")
    gamma, cost = run.whole("gamma"), run.draft_params_B / run.params_B
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
                      run.kv_format)
