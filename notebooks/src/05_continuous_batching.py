# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 05 · What if requests come and go?
# ## Question
# Lesson 04 made a batch cheap: eight sequences share one read of the weights, and a step takes hardly longer than for one. But it
# took for granted that the eight begin together and end together. Nobody's users do that. One asks for a word, another for an essay,
# and a third comes in while both are being served.
#
# The plain answer is to wait: gather a batch, pad it, run it until its *last* member has ended, then take the next. That is **static
# batching**. The other answer is to decide anew after *every single step* who is in the batch. That is **continuous batching**
# (Yu et al. 2022, Orca), and every engine of today does it.
#
# Three guesses on paper before you go on. Sixteen answers of 8 to 192 tokens, any length as likely as another, run as one static batch:
# what share of its rows is computed for nothing? How many times more tokens a second will the continuous batch give? And when a prompt of 256
# tokens joins a running batch, for how long do all the others stand still?

# %% tags=["nbval-ignore-output"]
from dataclasses import replace
from fractions import Fraction

from clawdemy_course.timeline import draw_gantt, spans
from clawdemy_infer.batching import SLO, Engine, Policy, Request, simulate, simulator
from clawdemy_infer.batching.serving import engine, scheduler_for
from clawdemy_infer.batching.simulator import RooflineExecutor
from clawdemy_infer.envelope.roofline import Part, Prediction
from clawdemy_infer.fast.faster import faster
from clawdemy_infer.fast.watched import count_operations
from clawdemy_infer.files import load_model
from clawdemy_infer.from_config import catalog
from clawdemy_infer.lesson import Lesson, plots, widgets
from clawdemy_infer.lesson.tables import Table, number, si
from clawdemy_infer.machine.calibrate import this_machine
from clawdemy_infer.machine.present import bracketed, default_device
from clawdemy_infer.rigs.workload import uniform, workload
from clawdemy_infer.timing import now

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown
from ipywidgets import IntSlider

plots.use_style()
plt.rcParams["figure.dpi"] = plt.rcParams["savefig.dpi"] = 80      # many figures, and the file stays small
PHASES = {"waiting": "#d9d9d9", "prefill": plots.COLOURS[1], "decode": plots.COLOURS[0], "preempted": plots.COLOURS[3]}
machine = this_machine()
lesson = Lesson("05 continuous_batching", machine=machine)
decoder = faster(load_model("smollm2-135m", device=default_device()), "fp32")   # matrices as this machine's kernels like them
lesson.card()

# %% [markdown]
# ## Envelope: the rectangle
# A static batch is a rectangle: B rows, and as many columns as its longest answer has tokens. A row that has ended goes on being
# computed, because the others are not done. So of B·max cells only the sum of the lengths is wanted, and
#
# $$\text{wasted} = 1 - \frac{\text{mean length}}{\text{longest length}}$$
#
# How long is the longest of B? We count it for lengths that are uniform from 8 to 192: the longest is at most t if all B are.

# %%
low, high, B = 8, 192, 16
lengths = range(low, high + 1)
mean = Fraction(sum(lengths), len(lengths))

longest = Fraction(0)
for t in lengths:
    at_most = Fraction(t - low + 1, len(lengths)) ** B          # all B are at most t
    below = Fraction(t - low, len(lengths)) ** B                # all B are less than t
    longest += t * (at_most - below)                            # so the longest is just t

assert mean == Fraction(low + high, 2)
assert abs(float(longest) - (low + (high - low) * B / (B + 1))) < 1     # for a continuous length: B/(B+1) of the way up
wasted = 1 - mean / longest
Markdown(f"The mean is {float(mean):.0f} tokens, the longest of {B} has {float(longest):.0f}. "
         f"So **{float(wasted):.0%}** of the rectangle is computed for nothing, "
         f"and a batch that wastes nothing needs {float(longest / mean):.2f} times fewer steps.")

# %% [markdown]
# The prompts make a rectangle, too: all are padded to the longest. And uniform lengths are kind. Real answers have a long tail. Take geometric
# lengths: every token is the last with the same small probability. Then the longest of B is *1 + 1/2 + … + 1/B* times the mean: among B that run, the
# first ends after a B-th of the mean, the next after a (B-1)-th more, and so on. That sum grows without end.

# %%
sizes = np.arange(1, 65)
harmonic = np.cumsum(1 / sizes)
assert harmonic[0] == 1 and abs(harmonic[15] - float(sum(Fraction(1, i) for i in range(1, 17)))) < 1e-12
spread = {"all equal": np.ones(64), "uniform, 8 to 192": (low + (high - low) * sizes / (sizes + 1)) / float(mean), "geometric": harmonic}

fig, ax = plt.subplots(figsize=(6.2, 3.1))
for (name, times), colour in zip(spread.items(), plots.COLOURS, strict=False):
    ax.plot(sizes, 1 - 1 / times, color=colour)
    ax.annotate(name, (63, 1 - 1 / times[-1]), xytext=(0, 6), textcoords="offset points", ha="right", color=colour)
ax.set(xlabel="batch, B", ylabel="wasted", xlim=(1, 64), ylim=(-0.02, 0.95),
       title="The larger a static batch, the more of it is padding")
ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
plots.show(fig, "Wasted share of a static batch against its size. " + "; ".join(
    f"{name}: {1 - 1 / times[15]:.0%} at 16 and {1 - 1 / times[-1]:.0%} at 64" for name, times in spread.items()) + ".")

# %% [markdown]
# Note the trap. Lesson 04 says: make the batch larger. The rectangle says: the larger, the more of it is wasted.
#
# ### The rule
# Continuous batching needs no clever idea, only a small rule that is applied after each step:
#
# 1. whoever has ended leaves, and gives its memory back;
# 2. whoever waits joins, in order of arrival, while there is a free seat and memory for it;
# 3. everybody who is in brings what it has not brought yet: its prompt if it is new, else its last token.
#
# The rule is `clawdemy_infer/batching/scheduler.py`, without torch and without a clock. It says what the next step holds, and somebody else spends the
# time. Let us give it the simplest clock there is: every step takes one second. Six answers of 5, 1, 2, 6, 1 and 3 tokens, two seats.

# %%
class Tick:
    """The cost of a step on a machine that takes a second for any."""

    def seconds(self, contexts, chunks=(), extra_logits=0):
        return 1.0

    def padded(self, B, T, S):
        return 1.0


def by_hand(policy: Policy) -> Engine:
    scheduler = scheduler_for(policy, blocks=64, block_size=16)
    return Engine(scheduler, RooflineExecutor(Tick(), scheduler.tables))


six = [Request(name, prompt=1, max_tokens=tokens, arrival_s=0.0) for name, tokens in zip("ABCDEF", (5, 1, 2, 6, 1, 3), strict=True)]
toy = {name: by_hand(Policy(name, max_batch=2)).run(six) for name in ("static", "continuous")}

assert toy["static"].seconds == max(5, 1) + max(2, 6) + max(1, 3)
assert toy["continuous"].seconds == (5 + 1 + 2 + 6 + 1 + 3) / 2         # not a row wasted


def in_line(report) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Times (to 10 ms), and how many wait and how many are served from each of them on."""
    events = sorted((round(at, 2), span.phase == "waiting", change) for s in report.sequences for span in spans(s)
                    for at, change in ((span.start_s, 1), (span.end_s, -1)))
    times = np.array([at for at, *_ in events])
    waits = np.cumsum([change if waiting else 0 for _, waiting, change in events])
    served = np.cumsum([0 if waiting else change for _, waiting, change in events])
    last = np.append(np.diff(times) > 0, True)              # of all that happens at one time, only the sum is to be seen
    return times[last], waits[last], served[last]


def draw_pair(reports: dict, xlabel: str, labels: list[str] | None = None) -> None:
    """Two Gantt charts side by side on one time axis, and under each how many were being served."""
    end = max(report.seconds for report in reports.values())
    fig, axes = plt.subplots(2, 2, figsize=(8.4, 4.4), sharex=True, height_ratios=(3, 1))
    for (name, report), (chart, below) in zip(reports.items(), axes.T, strict=True):
        draw_gantt(chart, report, PHASES)
        chart.set(title=f"{name}: {number(report.seconds)} s", xlim=(0, end * 1.02), ylabel="request")
        chart.set_yticks(range(len(labels)), labels) if labels else chart.set_yticks([])
        times, _, served = in_line(report)
        below.step(times, served, where="post", color=plots.COLOURS[0])
        below.fill_between(times, served, step="post", color=plots.COLOURS[0], alpha=0.2)
        below.set(xlabel=xlabel, ylabel="served", ylim=(0, report.max_batch * 1.15))
        below.set_yticks([0, report.max_batch])
        for ax in (chart, below):
            ax.grid(axis="y", visible=False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=PHASES[phase]) for phase in ("waiting", "prefill", "decode")]
    fig.legend(handles, ["waits", "until its first token", "decodes"], loc="outside lower center", ncols=3)
    plots.show(fig, "Two Gantt charts, a bar for each request that waits, is prefilled and decodes; below them how many are served. " + "; ".join(
        f"{name}: {number(report.seconds)} {xlabel}" for name, report in reports.items()) + ".")


draw_pair(toy, "steps", list("ABCDEF"))

# %% [markdown]
# On the left B ends after one step, and its seat stays empty for four. On the right C takes it at once. Fourteen steps became nine.
#
# ### One scheduler, two clocks
# What you just ran is a *simulator*: the real scheduler with a clock that is only added to. There are two more clocks for the same scheduler object:
#
# - **the roofline's**: a step costs what its FLOPs and bytes cost on some machine (lessons 00 and 01). Nothing runs, so it can be any model on any machine;
# - **the wall's**: the model runs, and takes as long as it takes.
#
# So a prediction and a measurement differ in the clock and in nothing else.
#
# ## Prediction
# Our trace: 24 requests, all there at time 0, prompts of 16 to 64 tokens, answers of 4 to 40, eight seats. The model is SmolLM2-135M in fp32. First your own guesses, written over the dots: a number, or text
# with its unit, as in `"5 s"`.

# %% tags=["guess"]
lesson.guess("24 requests, static", ...)
lesson.guess("24 requests, continuous", ...)
lesson.guess("speed-up of continuous", ...)

# %%
shape = catalog.model("smollm2-135m")
SEATS = 8
requests = workload(uniform(16, 64), uniform(4, 40), requests=24, seed=0)
prompts, answers = ([getattr(request, name) for request in requests] for name in ("prompt", "max_tokens"))
batches = [slice(first, first + SEATS) for first in range(0, 24, SEATS)]

steps_static = sum(max(answers[batch]) for batch in batches)
rows_static = sum(SEATS * max(prompts[batch]) for batch in batches)
Table(["", "static", "continuous", "static ÷ continuous"],
      [["tokens of prompts to compute", f"{rows_static:,}", f"{sum(prompts):,}", f"{rows_static / sum(prompts):.2f}"],
       ["steps of decoding", f"{steps_static}", f"{sum(answers) / SEATS:.0f}", f"{steps_static / (sum(answers) / SEATS):.2f}"]],
      numeric=["static", "continuous", "static ÷ continuous"])

# %% [markdown]
# That is nearly the whole **napkin**. A prompt token costs 2 FLOPs for each weight, at peak. A decode step reads the weights once, or computes 2 FLOPs
# for each weight and seat, whichever takes longer. (It supposes that all seats are taken until the end, which they are not.)
#
# The **simulator** gets the same trace, and for a clock this machine's calibration. Its prediction is an interval, as wide as that of a single step: the probes of the machine are right to so much. And we ask it what the
# run waits for: on a machine that is a tenth faster in one respect, and in no other, how much sooner would it be over?

# %% tags=["nbval-ignore-output"]
FP32 = {"weights": "fp32", "kv": "fp32", "activations": "fp32"}
KV_BYTES = 2**27
POLICIES = {"static": Policy("static", SEATS), "continuous": Policy(max_batch=SEATS)}
OPERATIONS = {name: count_operations(decoder, policy) for name, policy in POLICIES.items()}     # launches of a step, by policy
weights = shape.streamed_bytes("fp32") / 4

prompt_token = 2 * weights / machine.peak("fp32")                                               # seconds
decode_step = max(shape.streamed_bytes("fp32") / machine.bandwidth_at(), SEATS * prompt_token)


def simulated(name: str, policy: Policy | None = None, on=machine) -> Engine:
    """The simulator of this model, by default on this machine as it was calibrated."""
    return simulator(shape, on, policy or POLICIES[name], kv_bytes=KV_BYTES, operations=OPERATIONS[name], **FP32)


off = machine.time(shape.decode(SEATS, 64, **FP32), OPERATIONS["continuous"].of(1)).spread     # of a typical step


def by_limit(run, of) -> Prediction:
    """Seconds `of` a simulated run, by what they wait for. `run(machine)` is its report; a speed that is a tenth higher saves an eleventh of what waits for it."""
    seconds = of(run(machine))
    faster = {limit: machine.at(machine.now._replace(**{limit: 1.1 * speed})) for limit, speed in machine.now._asdict().items() if limit != "waited"}
    saved = {limit: max(seconds - of(run(on)), 1e-9) for limit, on in faster.items()}
    parts = {limit: Part(seconds * each / sum(saved.values()), off, limit) for limit, each in saved.items()}
    return Prediction(parts, compute_s=parts["compute"].seconds, memory_s=parts["memory"].seconds)


said = {name: simulated(name).run(requests) for name in POLICIES}
napkin = {"static": {"steps with prompts": rows_static * prompt_token, "decode steps": steps_static * decode_step},
          "continuous": {"steps with prompts": sum(prompts) * prompt_token, "decode steps": sum(answers) / SEATS * decode_step}}
by_hand_s = {name: sum(napkin[name].values()) for name in POLICIES}

for name in POLICIES:
    lesson.predict(f"24 requests, {name}", by_hand_s[name], by_limit(lambda on, name=name: simulated(name, on=on).run(requests), lambda report: report.seconds), unit="s")
faster_by = said["static"].seconds / said["continuous"].seconds
lesson.predict("speed-up of continuous", by_hand_s["static"] / by_hand_s["continuous"], faster_by, "×", interval=(faster_by / (1 + off), faster_by * (1 + off)))
lesson.reveal()

# %% [markdown]
# ### The price: a newcomer's prompt
# Orca's rule has a catch. A prompt that joins comes *whole*, in the same step in which the others bring their one token. The step is as long as the prompt, and
# everybody waits for it. The remedy is **chunked prefill** (Agrawal et al. 2024, Sarathi-Serve): a step has a *token budget*. Those who decode come
# first, with a token each, and the prompt gets what is left, a chunk in each step.
#
# Three sequences are decoding when a prompt of 256 tokens arrives. How long is the longest gap that any of the three sees? On the napkin it is the time that the
# prompt takes, or one budget full of it. The simulator does the same with the scheduler's real steps.

# %% tags=["guess"]
lesson.guess("longest gap, prompt whole", ...)
lesson.guess("longest gap, prompt in chunks of 32", ...)

# %% tags=["nbval-ignore-output"]
BUDGET, NEWCOMER = 32, 256
talkers = [Request(f"talker {i}", prompt=12 + i, max_tokens=30, arrival_s=0.0) for i in range(3)]
alone = simulated("continuous").run(talkers)
arrival = alone.sequences[0].token_times[6]                     # some way into their answers
disturbed = [*talkers, Request("newcomer", prompt=NEWCOMER, max_tokens=4, arrival_s=arrival)]
CHUNKS = {"whole": Policy(max_batch=SEATS), f"in chunks of {BUDGET}": Policy(max_batch=SEATS, token_budget=BUDGET)}


def gaps(report) -> dict[str, np.ndarray]:
    """Of each talker, the seconds between its tokens."""
    return {s.request.id: np.diff(s.token_times) for s in report.sequences if s.request.id != "newcomer"}


def longest_gap(report) -> float:
    return max(each.max() for each in gaps(report).values())


foretold = {name: simulated("continuous", policy).run(disturbed) for name, policy in CHUNKS.items()}
for (name, policy), tokens in zip(CHUNKS.items(), (NEWCOMER, BUDGET), strict=True):
    lesson.predict(f"longest gap, prompt {name}", tokens * prompt_token,
                   by_limit(lambda on, policy=policy: simulated("continuous", policy, on).run(disturbed), longest_gap), unit="s")
lesson.reveal(*(f"longest gap, prompt {name}" for name in CHUNKS))

# %% [markdown]
# ## Measurement: one trace, two policies
# Now the wall clock. The same scheduler, the same 24 requests, and the model runs. Right before and right after each run the machine is probed: is it as fast as it was when we predicted? If not, the interval becomes
# wider; what was predicted stays.

# %% tags=["nbval-ignore-output"]
def served(policy: Policy, requests: list[Request], of) -> tuple:
    """The engine's report, and the seconds `of` it with the machine's speeds right before and right after the run."""
    serving, reports = engine(decoder, policy, kv_bytes=KV_BYTES), []
    timing = bracketed(machine)(lambda: reports.append(serving.run(requests)), repeats=1, warmup=0)
    return reports[0], replace(timing, seconds=(of(reports[0]),))


def seconds_of(report) -> dict[str, float]:
    """Seconds of the steps that bring prompts, and of those that only decode."""
    with_prompts = sum(step.end_s - step.start_s for step in report.steps if step.tokens > step.sequences)
    without = sum(step.end_s - step.start_s for step in report.steps if step.tokens <= step.sequences)
    return {"steps with prompts": with_prompts, "decode steps": without}


measured = {}
for name, policy in POLICIES.items():
    engine(decoder, policy, kv_bytes=KV_BYTES).run([replace(request, max_tokens=3) for request in requests[:2]])    # once to warm up
    measured[name], timing = served(policy, requests, lambda report: report.seconds)
    foreseen = seconds_of(said[name])
    lesson.measure(f"24 requests, {name}", timing, parts=[
        {"name": part, "napkin_s": napkin[name][part], "predicted_s": foreseen[part], "measured_s": took}
        for part, took in seconds_of(measured[name]).items()])
lesson.measure("speed-up of continuous", measured["static"].seconds / measured["continuous"].seconds)

draw_pair(measured, "seconds")

# %% tags=["nbval-ignore-output"]
METRICS = {
    "output tokens/s": ("output_tokens_per_s", ""), "seats taken": ("occupancy", "%"), "computed for nothing": ("wasted", "%"),
    "time to first token, median": ("ttft_p50", "s"), "time to first token, p99": ("ttft_p99", "s"), "end to end, median": ("e2e_p50", "s"),
    "end to end, p99": ("e2e_p99", "s"), "time per output token, median": ("tpot_p50", "s"), "between two tokens, p99": ("itl_p99", "s"),
}


def shown(value: float, unit: str) -> str:
    return f"{value:.0%}" if unit == "%" else si(value, unit) if unit else number(value)


Table(["", *measured], [[label, *(shown(report.summary[key], unit) for report in measured.values())] for label, (key, unit) in METRICS.items()],
      numeric=[*measured])

# %% tags=["nbval-ignore-output"]
def better(label: str) -> str:
    """The policy that a row speaks for."""
    key = METRICS[label][0]
    best = max if key in ("output_tokens_per_s", "occupancy") else min
    return best(measured, key=lambda name: measured[name].summary[key])


for_static = [label for label in METRICS if better(label) == "static"]
Markdown(f"{len(METRICS) - len(for_static)} of {len(METRICS)} rows speak for the continuous batch. For the static one: {'; '.join(for_static) or 'none'}. Its members are never disturbed by anybody, once they are in.")

# %% [markdown]
# Did the neighbours change what anybody was *told*? Each request has its own positions, its own keys, its own row. Its tokens must be those it gets alone.

# %% tags=["nbval-ignore-output"]
told = {name: {s.request.id: s.tokens for s in report.sequences} for name, report in measured.items()}
same = sum(told["static"][request.id] == told["continuous"][request.id] for request in requests)
print(f"{same} of {len(requests)} answers are the same, token by token, under both policies")

# %% [markdown]
# ### The newcomer
# Three talkers, and a long prompt that arrives in the middle of their answers: whole, then in chunks.

# %% tags=["nbval-ignore-output"]
stalled = {}
for name, policy in CHUNKS.items():
    stalled[name], timing = served(policy, disturbed, longest_gap)
    lesson.measure(f"longest gap, prompt {name}", timing)

fig, axes = plt.subplots(1, 2, figsize=(8.4, 2.9), sharey=True)
for ax, (name, report) in zip(axes, stalled.items(), strict=True):
    for other, colour, style in ((foretold[name], plots.ROOFLINE, "-"), (report, plots.MEASURED, "o")):
        each = next(iter(gaps(other).values()))
        ax.plot(range(2, len(each) + 2), each, style, color=colour, markersize=5, label="simulator" if style == "-" else "engine")
    ax.set(xlabel="token of the first talker", title=f"The prompt comes {name}")
    ax.set_ylim(bottom=0)
axes[0].set_ylabel("gap before it")
plots.units(axes[0].yaxis, "s")
axes[0].legend()
plots.show(fig, "Gaps before each token of the first talker, simulator and engine. " + "; ".join(
    f"the prompt comes {name}: longest gap {si(longest_gap(report), 's')}, simulated {si(longest_gap(foretold[name]), 's')}" for name, report in stalled.items()) + ".")

# %% [markdown]
# The same prompt, the same work: one long stall, or a stretch of steps that are each a little longer. Nobody's total is better for it. What is better is the worst gap, and
# that is what a reader notices.
#
# ## Reconciliation: two clocks, one scheduler
# First what must be *equal*. All requests were there at 0 and their lengths are given, so the scheduler saw the same in both worlds. It must have decided the same steps, every one.

# %%
def decisions(report) -> list[tuple[int, int]]:
    """Of each step, how many sequences were in it and how many tokens they brought."""
    return [(step.sequences, step.tokens) for step in report.steps]


for name in POLICIES:
    assert decisions(said[name]) == decisions(measured[name])
print(", ".join(f"{name}: the same {len(decisions(said[name]))} steps in the simulator and in the engine" for name in POLICIES))

# %% [markdown]
# So all that can differ is what a step takes. Metric by metric, engine beside simulator, as it was written down before. The band is the interval of the whole run, with what the probes saw right before and right after it.

# %% tags=["nbval-ignore-output"]
CHECKED = {label: METRICS[label] for label in ("output tokens/s", "time to first token, median", "time per output token, median", "end to end, median",
                                               "end to end, p99", "between two tokens, p99")}
ratio = {(name, label): measured[name].summary[key] / said[name].summary[key] for name in POLICIES for label, (key, _) in CHECKED.items()}
row = lesson.rows["24 requests, continuous"]
band = row.low / row.predicted, row.high / row.predicted

fig, ax = plt.subplots(figsize=(7.2, 3.0))
ax.axvspan(*band, color=plots.ROOFLINE, alpha=0.10, linewidth=0)
ax.axvline(1, color="black", linewidth=0.8)
for name, colour, shift in (("static", plots.COLOURS[4], 0.12), ("continuous", plots.COLOURS[0], -0.12)):
    ax.plot([ratio[name, label] for label in CHECKED], [place - shift for place in range(len(CHECKED))], "o", color=colour, label=name)
ax.set(xlim=(min(0.5, 0.95 * min(ratio.values())), max(1.5, 1.05 * max(ratio.values()))), ylim=(len(CHECKED) - 0.4, -0.6), xlabel="engine ÷ simulator (the band: its interval)",
       title="The simulator beside the engine, on the same trace")
ax.set_yticks(range(len(CHECKED)), list(CHECKED))
ax.legend()
plots.show(fig, "Engine over simulator, metric by metric, for both policies: " + "; ".join(
    f"{label} {ratio['continuous', label]:.2f} continuous and {ratio['static', label]:.2f} static" for label in CHECKED) + f". The interval is {band[0]:.2f} to {band[1]:.2f}.")
Table(["continuous batching", "simulator", "engine", "ratio", "ratio when static"],
      [[label, shown(said["continuous"].summary[key], unit), shown(measured["continuous"].summary[key], unit),
        f"{ratio['continuous', label]:.2f}", f"{ratio['static', label]:.2f}"] for label, (key, unit) in CHECKED.items()],
      numeric=["simulator", "engine", "ratio", "ratio when static"])

# %% [markdown]
# Now the napkin. It counted prompts and decode steps. Commit yourself: what is the largest difference between napkin and clock for the 24 requests in a continuous batch?

# %% tags=["guess"]
# "steps with prompts", "decode steps", "memory was slower than calibrated", "memory was faster than calibrated" or "not explained";
# where the run waits for arithmetic, "compute was slower than calibrated" and so on
lesson.cause("24 requests, continuous", ...)

# %% tags=["nbval-ignore-output"]
for name in ("continuous", "static"):
    lesson.explain(f"24 requests, {name}")

# %% tags=["nbval-ignore-output"]
lesson.table()

# %% tags=["nbval-ignore-output"]
run = measured["continuous"]
without_prompts = [step for step in run.steps if step.tokens <= step.sequences]
drain = sum(step.end_s - step.start_s for step in without_prompts if step.sequences < SEATS)
Markdown(f"""
- **The napkin** took every product to run at peak and every byte to come at full bandwidth. The runs took {measured['static'].seconds / by_hand_s['static']:.1f} times as long under the static policy and
  {run.seconds / by_hand_s['continuous']:.1f} times under the continuous one. The calibration knows the rate of a product with eight rows and the price of a launch: against the simulator
  they took {measured['static'].seconds / said['static'].seconds:.2f} and {run.seconds / said['continuous'].seconds:.2f} times as long.
- **The speed-up** is {measured['static'].seconds / run.seconds:.2f}, where the rectangle promised {by_hand_s['static'] / by_hand_s['continuous']:.2f}. When the last requests are served nobody is left to take the slots that come
  free: look at the staircase at the right end of the chart. Steps with a free slot took {drain / run.seconds:.0%} of this run; in a service that never ends there are few.
- **What the simulator leaves out**: choosing the tokens, turning them into text, the scheduler's own work, and a machine whose speed changes within a run. What lay between steps was
  {1 - sum(seconds_of(run).values()) / run.seconds:.1%} of the run.
""")

# %% [markdown]
# ### When it loses
# Continuous batching wins what a rectangle wastes. Where nothing is wasted there is nothing to win. We let the simulator look: Llama-3-8B on an H100, by its data sheet.

# %%
H100, llama = catalog.machine("h100-sxm"), catalog.model("llama-3-8b")


def times_faster(requests: list[Request], max_batch: int) -> float:
    """Static over continuous, seconds for all of them."""
    static, continuous = (simulate(llama, H100, requests, Policy(batching, max_batch)).seconds for batching in ("static", "continuous"))
    return static / continuous


cases = {
    "answers uniform from 8 to 192, 16 seats": (workload(uniform(16, 256), uniform(8, 192), requests=256), 16),
    "answers of a chat (a long tail), 16 seats": (workload("sharegpt", requests=256), 16),
    "the same, 64 seats": (workload("sharegpt", requests=256), 64),
    "the same, 2 seats": (workload("sharegpt", requests=256), 2),
    "all answers equal, 16 seats": (workload(uniform(136, 136), uniform(100, 100), requests=256), 16),
    "one at a time: 1 seat": (workload("sharegpt", requests=256), 1),
    "no more requests than seats": (workload("sharegpt", requests=16), 16),
    "one token each, to classify": (workload(uniform(136, 136), uniform(1, 1), requests=256), 16),
}
Table(["Llama-3-8B on an H100", "continuous is faster by"], [[name, f"{times_faster(*case):.2f} ×"] for name, case in cases.items()],
      numeric=["continuous is faster by"])

# %% [markdown]
# One seat, equal answers, or a single batch: it wins nothing, or next to nothing. What it costs meanwhile: a paged cache instead of a plain one (lesson 06), ragged steps that are harder to make fast,
# and newcomers that disturb those who decode.
#
# Chunks have their price, too. A chunk of 32 rows reads all the weights for 32 tokens, where a whole prompt reads them once. The smaller the budget, the more often they are read: below the knee of
# lesson 04, first tokens come later and the machine is busy with less.
#
# ### A size that nobody in the room owns
# Nothing has to fit but the arithmetic. Llama-3.1-70B in bf16 on **eight H100s** (tensor parallel), and 10,000 requests of a production assistant: long prompts, twelve
# a second. The scheduler is the one that just served SmolLM2. The clock is a data sheet's: all of the bandwidth, all of the peak, and launches that cost nothing. Real H100s take longer, and more so where
# several work on one step (lesson 01 judges such bounds by other people's runs). So the seconds that follow are a best case; what they are good for is to compare policies.

# %% tags=["nbval-ignore-output"]
large = catalog.model("llama-3.1-70b")
CHUNKED = Policy(max_batch=256, token_budget=512)


def serve_large(policy: Policy, rate: float, count: int):
    return simulate(large, H100, workload("conversation", requests=count, rate=rate, seed=0, most=8192), policy, tp=8)


start = now()
ten_thousand = serve_large(CHUNKED, rate=12.0, count=10_000)
took = now() - start
Markdown(f"{len(ten_thousand.finished):,} requests, {si(ten_thousand.seconds, 's')} on the data sheet of eight H100s, simulated in **{took:.1f} s**: "
         f"{len(ten_thousand.finished) / took:,.0f} requests a second on one core of this machine.")

# %%
summary = ten_thousand.summary
Table(["Llama-3.1-70B on eight H100s, by data sheet", "median", "95 %", "99 %"],
      [[label, *(si(summary[f"{key}_p{p}"], "s") for p in (50, 95, 99))] for label, key in
       (("time to first token", "ttft"), ("time per output token", "tpot"), ("between two tokens", "itl"), ("end to end", "e2e"))],
      numeric=["median", "95 %", "99 %"])

# %% [markdown]
# ### How much load is too much?
# A service promises something: say, the first token within a second, and then 40 tokens a second or more. That is a **service level objective** (SLO). What counts is
# **goodput**: requests a second for which the promise was kept (Zhong et al. 2024, DistServe). Throughput cannot see the difference between a
# user who was served and one who had left.
#
# We raise the load, and watch three policies.

# %%
slo = SLO(ttft_s=1.0, tpot_s=1 / 40)
RATES = [1, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20]
RIVALS = {"static, 64 rows": Policy("static", 64), "continuous": Policy(max_batch=256), "… in chunks of 512": CHUNKED}
swept = {name: [serve_large(policy, rate, 400) for rate in RATES] for name, policy in RIVALS.items()}
kept = {name: [rate * sum(report.good(s, slo) for s in report.sequences) / 400 for rate, report in zip(RATES, reports, strict=True)]
        for name, reports in swept.items()}

fig, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.3))
left.plot([0, 20], [0, 20], ":", color="black", linewidth=1)
left.annotate("all are served in time", (9.5, 10.4), ha="right", rotation=0)
for (name, reports), colour in zip(swept.items(), (plots.COLOURS[4], plots.COLOURS[0], plots.COLOURS[2]), strict=True):
    left.plot(RATES, kept[name], "o-", color=colour, label=name, markersize=4)
    right.semilogy(RATES, [report.summary["itl_p99"] for report in reports], "o-", color=colour, markersize=4)
left.set(xlabel="requests that arrive, per second", ylabel="goodput, per second", title="Goodput rises, and then falls", ylim=(0, 20))
left.legend(loc="upper left", bbox_to_anchor=(0, 0.98))
right.set(xlabel="requests that arrive, per second", ylabel="p99 between two tokens", title="… and why: newcomers' prompts")
plots.units(right.yaxis, "s")
best = {name: max(values) for name, values in kept.items()}
plots.show(fig, "Left, goodput against the requests that arrive per second: it rises with the load, peaks and falls. " + "; ".join(
    f"{name} peaks at {value:.1f} a second" for name, value in best.items()) + ". Right, the 99th percentile between two tokens rises with the load, least where prompts come in chunks.")
Markdown("Most requests a second that are served in time: " + ", ".join(f"{name}: **{value:.1f}**" for name, value in best.items()) + ".")

# %% [markdown]
# Beyond its peak a policy's goodput *falls*: the machine is as busy as before, but with requests that come too late. And the policies' order is the order in which they let users wait for one
# another: for a whole batch, for a whole prompt, for a chunk.
#
# ### What a budget buys
# Twelve requests a second, and the budget from small to none.

# %%
BUDGETS = [256, 384, 512, 768, 1024, 2048, 4096, 8192]
by_budget = [serve_large(Policy(max_batch=256, token_budget=budget), 12.0, 400).summary for budget in BUDGETS]

fig, ax = plt.subplots(figsize=(6.2, 3.0))
for key, label, colour in (("ttft_p95", "to the first token, p95", plots.COLOURS[1]), ("itl_p99", "between two tokens, p99", plots.COLOURS[0])):
    ax.loglog(BUDGETS, [summary[key] for summary in by_budget], "o-", color=colour, label=label)
ax.set(xlabel="token budget of a step", title="A small budget: no stalls, and a late first token")
ax.set_xticks(BUDGETS[::2] + [8192], [f"{budget:,}" for budget in BUDGETS[::2] + [8192]])
ax.set_yticks([0.02, 0.05, 0.1, 0.2, 0.5])
ax.minorticks_off()
plots.units(ax.yaxis, "s")
ax.legend()
plots.show(fig, "Time to the first token and between two tokens against the token budget of a step. " + "; ".join(
    f"with {budget:,}: {si(summary['ttft_p95'], 's')} and {si(summary['itl_p99'], 's')}" for budget, summary in zip(BUDGETS, by_budget, strict=True)) + ".")

# %% [markdown]
# A budget too small to keep up with the prompts lets a queue form, and then the first token is late without limit. A budget that is never reached is none. Between them one buys the other.
#
# ## Play and exercises
# Drag the arrival rate, and watch the queue form. Llama-3-8B on one H100 serves 400 requests of a chat. Try to find: the rate at which the queue still empties from time to time; one at which it only grows; a number of
# seats with which the same rate is no trouble; and how little of all this the static batch survives.

# %%
def draw_queue(rate: int, seats: int, batching: str, arrivals: str) -> None:
    """Who waits and who is served, over time."""
    burstiness = {"evenly spaced": 0.0, "at random": 1.0, "in bursts": 3.0}[arrivals]
    report = simulate(llama, H100, workload("sharegpt", requests=400, rate=rate, burstiness=burstiness, seed=1), Policy(batching, seats))
    times, waits, served = in_line(report)
    fig, ax = plt.subplots(figsize=(7.4, 3.2))
    ax.fill_between(times, served, step="post", color=plots.COLOURS[0], alpha=0.3, label="served")
    ax.step(times, waits, where="post", color=plots.COLOURS[1], label="waiting")
    ax.axhline(seats, color="black", linestyle=":", linewidth=1)
    ax.axvline(max(s.arrival_s for s in report.sequences), color="black", linewidth=0.8)
    summary = report.summary
    ax.set(xlabel="seconds (the line: the last one arrives)", ylabel="requests", xlim=(0, report.seconds), ylim=(0, max(waits.max(), seats) * 1.2),
           title=f"{rate} a second on {seats} seats, {batching}: first token after {si(summary['ttft_p50'], 's')}, p99 {si(summary['ttft_p99'], 's')}")
    ax.legend(loc="upper left", ncols=2)
    plots.show(fig, f"Requests waiting and served over time, at {rate} a second on {seats} seats, {batching}, {arrivals}: at most {waits.max():.0f} wait, "
                    f"and the median first token comes after {si(summary['ttft_p50'], 's')}.")


# %% tags=["widget", "nbval-ignore-output"]
widgets.play(draw_queue,
             rate=IntSlider(description="requests/s", min=1, max=40, value=19, **widgets.LOOK),
             seats=widgets.powers_of_two("seats", 1, 256, 32),
             batching=widgets.choose("batching", ["continuous", "static"]),
             arrivals=widgets.choose("arrivals", ["at random", "evenly spaced", "in bursts"]))

# %%
draw_queue(19, 32, "continuous", "at random")

# %% [markdown]
# ### 1 · How much of the rectangles?
# `answers` are served in order, in static batches of `seats`. Which share of all rows that are computed in decoding is wasted? (Each batch has as many rows as
# it has members: the last may have fewer.)

# %% tags=["exercise", "exercise:wasted_share"]
def wasted_share(answers, seats):
    return ...


lesson.exercise(
    "wasted_share", wasted_share,
    cases={
        ((5, 1, 2, 6, 1, 3), 2): 10 / 28,           # our toy: rectangles of 10, 12 and 6, and 18 tokens wanted
        ((5, 1, 2, 6, 1, 3), 6): 18 / 36,           # one large rectangle wastes more
        ((5, 1, 2, 6, 1, 3), 1): 0.0,
        ((7, 7, 7, 7, 7), 2): 0.0,                  # equal lengths: nothing to win
        ((1, 1, 1, 97), 4): 288 / 388,              # one long answer keeps three empty seats
        ((4, 2, 8), 2): 2 / 16,                     # the last batch has one member
    },
    nudge="Sum the rectangles (members × longest), then subtract what was wanted.",
    means="sorting requests by length would help, if anybody knew the lengths.",
)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Cut the list into pieces of `seats`: `answers[first:first + seats]`. Each piece computes `len(piece) * max(piece)` rows.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def wasted_share(answers, seats):
#     pieces = [answers[first:first + seats] for first in range(0, len(answers), seats)]
#     computed = sum(len(piece) * max(piece) for piece in pieces)
#     return 1 - sum(answers) / computed
# ```
#
# </details>

# %% [markdown]
# ### 2 · The doorkeeper
# Write the rule of admission. `prompts` wait, in order of arrival; a prompt of P tokens needs ⌈P / `block`⌉ blocks of memory. `running` sequences are in, of at most `seats`, and `free` blocks are
# left. Each sequence that is in may soon need a block, so whoever joins must leave one free block for each that is in *before* it. Nobody
# overtakes: who cannot join blocks those behind. How many join?

# %% tags=["exercise", "exercise:admitted"]
def admitted(prompts, running, seats, free, block):
    return ...


lesson.exercise(
    "admitted", admitted,
    cases={
        ((16, 16, 16), 0, 8, 100, 16): 3,           # room for all
        ((16, 16, 16), 6, 8, 100, 16): 2,           # two seats left
        ((16, 16, 16), 0, 8, 3, 16): 2,             # the third needs 1 block, and must leave 2: 1 + 2 > 1
        ((17, 1), 0, 8, 2, 16): 1,                  # 17 tokens are 2 blocks
        ((100, 1), 1, 8, 7, 16): 0,                 # the first does not fit, and the second may not overtake
        ((), 3, 8, 9, 16): 0,
    },
    nudge="One after the other: take blocks and a seat for each that joins, and stop at the first that cannot.",
    means="this is `_admit` and `_make_room` of scheduler.py, without prefixes and swapping.",
)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# A loop over `prompts`. Stop if `running == seats`, or if `needed > free - running`; else `free -= needed`, `running += 1`. `-(-P // block)` rounds up.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def admitted(prompts, running, seats, free, block):
#     joined = 0
#     for P in prompts:
#         needed = -(-P // block)
#         if running == seats or needed > free - running:
#             break
#         free -= needed
#         running += 1
#         joined += 1
#     return joined
# ```
#
# </details>

# %% [markdown]
# ### 3 · A budget for a promise
# On some machine a step takes `base` seconds, plus `per_token` for each token in it. You promise that no gap between two tokens is longer than `limit`. What is the largest token budget, and into how many
# steps does it cut a prompt of `P` tokens while `running` others decode? Return both.

# %% tags=["exercise", "exercise:budget_for"]
def budget_for(limit, base, per_token, running, P):
    return ...


lesson.exercise(
    "budget_for", budget_for,
    cases={
        (0.050, 0.010, 0.0001, 0, 1600): (400, 4),          # 40 ms to spend, 0.1 ms a token
        (0.050, 0.010, 0.0001, 80, 1600): (400, 5),         # those who decode take 80 of the 400
        (0.020, 0.010, 0.0001, 60, 1600): (100, 40),        # a tight promise: 40 tokens of the prompt in each step
        (0.050, 0.010, 0.00003, 33, 1300): (1333, 1),
    },
    nudge="The budget is whole, and those who decode are served from it first.",
    means="at 40 steps for one prompt you pay `base` 40 times: that is what a tight promise costs.",
)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# (limit - base) / per_token, rounded down; rounding errors are a nuisance, so add a hair (1e-9) before. Each step takes `budget - running` tokens of the prompt; the last may be smaller.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def budget_for(limit, base, per_token, running, P):
#     budget = int((limit - base) / per_token + 1e-9)
#     return budget, -(-P // (budget - running))
# ```
#
# </details>

# %% [markdown]
# ### 4 · Little's law
# However requests arrive and whoever is served first: *the mean number in the house is the rate of arrival times the mean time in the house* (Little 1961). Requests come at `rate` a second. They wait `wait` seconds
# for their first token, and take `tokens` more at `tpot` seconds each. How many are waiting in the mean, and how many seats are taken by those who decode?

# %% tags=["exercise", "exercise:in_the_house"]
def in_the_house(rate, wait, tokens, tpot):
    return ...


lesson.exercise(
    "in_the_house", in_the_house,
    cases={
        (10, 2.0, 100, 0.02): (20, 20),
        (10, 0.0, 100, 0.02): (0, 20),              # nobody waits, and still 20 seats are needed
        (12, 0.08, 200, 0.0125): (0.96, 30),        # about our 70B
        (40, 1.0, 338, 0.01): (40, 135.2),
    },
    nudge="Rate times time, once for each room of the house.",
    means="so seats needed = rate × tokens × TPOT: a slower step needs more seats, and more seats make a slower step.",
)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Waiting: rate · wait. Decoding: rate · (tokens · tpot).
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def in_the_house(rate, wait, tokens, tpot):
#     return rate * wait, rate * tokens * tpot
# ```
#
# </details>

# %% [markdown]
# ### 5 · Harder: why 80 % is busy
# One server, jobs of `service` seconds each, arrivals at random (Poisson). At a load of `load` (the share of the time that it is busy) a job waits in the mean load · service / (2 · (1 - load)) seconds before its turn
# (Pollaczek and Khinchine). You promise a mean wait of at most `most` seconds. Up to which arrival rate can you keep it?

# %% tags=["exercise", "exercise:highest_rate"]
def highest_rate(service, most):
    return ...


lesson.exercise(
    "highest_rate", highest_rate,
    cases={
        (1.0, 0.5): 0.5,            # half busy: the mean wait is half a job
        (1.0, 2.0): 0.8,            # 80 % busy: four times as long
        (1.0, 4.5): 0.9,            # 90 %: and it doubles again
        (0.1, 0.05): 5.0,
        (1.0, 49.5): 0.99,
    },
    nudge="Solve wait = most for the load; the rate is the load over the service time.",
    means="the last few per cent of a machine cost more waiting than all the rest together. Plan with 70 %.",
)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# most · 2 · (1 - load) = load · service, so load = 2 · most / (service + 2 · most). And load = rate · service.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def highest_rate(service, most):
#     return 2 * most / (service + 2 * most) / service
# ```
#
# </details>

# %% [markdown]
# **To take away.** A static batch computes B times its longest member; half of that is padding as soon as lengths differ, and the larger the batch the worse. To decide after every step who is in costs nothing but a scheduler, and gives both
# throughput and latency. Its price is that newcomers' prompts stall the others; a token budget turns one long stall into many short ones. Beyond some load goodput falls while throughput does not. And because scheduling knows no clock, the code that serves a
# model here also simulates it on machines that you do not have. How near it comes was checked here for this machine alone; by a data sheet it is a best case. What makes it possible to let anybody in at any time is a memory without gaps: that is lesson 06.
#
# Further reading: Yu et al. 2022 (Orca: iteration-level scheduling, selective batching); Kwon et al. 2023 (PagedAttention); Agrawal et al. 2024 (Sarathi-Serve: chunked prefill, stalls); Zhong et al. 2024 (DistServe: goodput); Agrawal
# et al. 2024 (Vidur: a simulator learned from profiles).
