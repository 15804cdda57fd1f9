# ---
# jupyter:
#   jupytext:
#     formats: notebooks///ipynb,notebooks/source///py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 06 · Two directions through one pipeline: DualPipe
#
# **You will have shown**
#
# 1. **that splitting the backward pass and feeding from both ends removes most of the idle time**<!-- claim: moves -->;
# 2. **that the $-3W$ in its formula, and the memory it takes, can be read off the timeline, action by action**<!-- claim: derived -->;
# 3. **that DualPipe buys hidden communication, and not the smallest bubble there is**<!-- claim: hidden -->.
#
# About 70 minutes. Paper: *DeepSeek-V3 Technical Report* (2024), §3.2.1 (Figures 4 and 5, Table 2) and §3.2.2. You should know
# what a layer with experts does (notebook 00); no GPU is needed.

# %% tags=["parameters"]
STEPS = 2  # of the optimiser, where real processes train
SEED = 1234
DEVICE = "cpu"
FAST = False

# %%
from dsv3lib import ModelConfig
from dsv3lib.course import check, exercise, predict, reveal, setup, table
from dsv3lib.pipeline import Costs, Schedule, schedule, simulate, validate
from dsv3lib.viz import style
from dsv3lib.viz.pipeline import gantt, gantt_stack, live_curve

session = setup(seed=SEED, notebook="06_dualpipe", device=DEVICE)
v3 = ModelConfig.preset("v3-671b")

# %% [markdown]
# ## Cold open: eight machines, one at work
#
# V3 does not fit on one GPU, nor on one node. So its layers are cut into **stages**, and each *rank* (a group of GPUs) holds
# one. A batch goes through all ranks forward, and its gradients come back through all of them. Watch eight ranks do that with
# one batch. Green is forward, red backward, white is waiting.

# %% tags=["claim:alone"]
alone = simulate(schedule("gpipe", stages=8, microbatches=1))
style.show(*gantt(alone, "One batch, eight ranks: somebody is always waiting"))
print(f"waiting: {100 * alone.bubble_share:.1f} % of all machines' time")
assert alone.bubble_share == 7 / 8

# %% [markdown]
# Seven eighths of the machines are paid for and wait<!-- claim: alone -->. The remedy is to cut the batch into
# **micro-batches** that follow one another. What is still white then is called the **bubble**, and this notebook is about
# getting rid of it.
#
# ## The symbols

# %%
table(
    ["paper", "in code", "here", "what it is"],
    [
        ["PP", "`stages`", "8", "ranks of the pipeline (V3: 16)"],
        ["", "`microbatches`", "20", "in one step, of both directions together"],
        ["F", "`F`", "1", "time of a forward pass on one rank"],
        ["B", "`B`", "2", "time of a whole backward pass"],
        ["", "`I`", "1", "its part for the inputs: the rank before waits for it"],
        ["W", "`W`", "1", "its part for the weights: nobody waits for it"],
        ["F&B", "`FB`", "3", "an overlapped pair: forward and backward side by side"],
    ],
    caption="Times in any unit: a backward pass is two products where a forward is one.",
)

# %% [markdown]
# ## One micro-batch on its way
#
# Here is micro-batch number zero on four ranks, with the times at which it really passes in a run of six micro-batches. What
# goes down are activations, what comes back are gradients of those activations; each rank makes the gradients of its own
# weights by itself.

# %%
from dsv3lib.viz.pipeline import journey

style.show(*journey(simulate(schedule("1f1b", stages=4, microbatches=6))))

# %% [markdown]
# A schedule is nothing but a list of such actions for each rank. `F0.3` is the forward pass of micro-batch three in direction
# zero, `B` a whole backward pass, `I` and `W` its parts. A rank takes its list in order, each action as soon as what it needs
# has arrived. The two simplest schedules: **GPipe**, all forward passes and then all backward passes; **`1F1B`**, a few
# forward passes ahead and then one of each in turn.

# %%
for name in ("gpipe", "1f1b"):
    print(name)
    for rank, row in enumerate(schedule(name, stages=2, microbatches=4).rows()):
        print(f"  rank {rank}: {row}")

# %%
predict(
    "dualpipe.p1",
    "Eight ranks, twenty micro-batches. How does the bubble of 1F1B compare with GPipe's?",
    options=["half as long", "two thirds", "the same", "longer"],
)

# %% tags=["claim:same"]
pair = {name: simulate(schedule(key)) for name, key in (("GPipe", "gpipe"), ("1F1B", "1f1b"))}
style.show(*gantt_stack(pair, "Another order, the same white"))
assert pair["GPipe"].bubble == pair["1F1B"].bubble
peaks = [max(one.peak_activations) for one in pair.values()]
print("alive at once on the fullest rank:", *peaks)
assert peaks == [20, 8]
reveal("dualpipe.p1", "the same", because="1F1B saves memory: PP are alive, not all.")

# %% [markdown]
# The order in the middle does not matter: the first micro-batch must come down to the last rank, and the last gradient must come
# up again<!-- claim: same -->. How long is that?

# %%
exercise("dualpipe.1")

# %%
def bubble_1f1b(stages, forward, backward):
    ...


bubble_1f1b = check("dualpipe.1", bubble_1f1b)

# %% [markdown]
# ## First move: split the backward pass
#
# The rank before waits for `I` alone. Whoever does all of `B` before sending the gradient on makes the others wait for `W`, too.
# This is the idea of *Zero Bubble* (Qi et al., arXiv:2401.10241). Write it.

# %%
exercise("dualpipe.2")

# %%
def split_backward(row, wait):
    ...


split_backward = check("dualpipe.2", split_backward)

# %% tags=["claim:zb1p"]
before = schedule("1f1b", 8, 20)
rows = [split_backward(row.split(), rank) for rank, row in enumerate(before.rows())]
zb1p = Schedule.by_hand(rows, before.routes, "yours: ZB1P")
validate(zb1p)
saved = simulate(before).bubble[0] - simulate(zb1p).bubble[0]
print("idle on a rank, 1F1B, then split:", *(simulate(s).bubble[0] for s in (before, zb1p)))
assert bubble_1f1b(8, 1, 2) == simulate(before).bubble[0]
assert saved == 2 * 7 * 1  # (PP - 1) gaps, each shorter by 2 W

# %% [markdown]
# Each of the PP − 1 gaps has become shorter by two `W`: one because nobody waits for it any more, one because it fills what is
# left<!-- claim: zb1p -->. Table 2 of the paper writes it $(PP-1)(F+B-2W)$.
#
# ## Second move: feed from both ends
#
# DualPipe holds *two* copies of the model, the second one turned round: rank $r$ has stages $r$ and $PP-1-r$. Half of the
# micro-batches enter at the first rank, half at the last. So the far end does not have to wait for the first micro-batch to come
# down: it begins with its own. And when the pipeline is full, each rank has a forward pass of one direction and a backward
# pass of the other to do, which have nothing to do with each other: it can do them **side by side**, as a pair.
#
# The public repository describes the order in eight steps. You write the first three.

# %%
exercise("dualpipe.3")

# %%
def warm_up(rank, stages):
    ...


warm_up = check("dualpipe.3", warm_up)

# %% [markdown]
# The other five: the long middle of pairs (4), pairs without a near forward pass (5), backward passes alone, from the half on
# split (6), and weights that waited, in the gaps (7, 8). They stand in
# [dsv3lib/pipeline/schedules/eight_steps.py](../dsv3lib/pipeline/schedules/eight_steps.py), in the order of that list<!-- claim: real -->.
# Your first steps and those together must be a schedule that can run. The validator knows nothing of
# DualPipe: each micro-batch once forward and once backward everywhere, nothing before what it needs, no deadlock, every send met.

# %% tags=["claim:real"]
made = schedule("dualpipe", stages=8, microbatches=20)
rows = [
    [*warm_up(rank, 8), *map(str, row[len(warm_up(rank, 8)) :])]
    for rank, row in enumerate(made.actions)
]
mine = Schedule.by_hand(rows, made.routes, "yours: DualPipe")
assert mine.actions == made.actions
validate(mine)
print("rank 0:", mine.rows()[0])

# %%
predict(
    "dualpipe.p2",
    "At eight ranks 1F1B waits 21, ZB1P 7. How long does a rank of DualPipe wait?",
    number=(0, 21, "units"),
)

# %%
predict(
    "dualpipe.p3",
    "How many micro-batches are alive at the peak, at 8 ranks?",
    options=["8 on the ends, fewer between", "8 everywhere", "9 everywhere", "16 everywhere"],
)

# %% tags=["runs"]
# answers dualpipe.p2
keys = {"1F1B": "1f1b", "ZB1P": "zb1p", "ZBV": "zbv", "DualPipe": "dualpipe"}
runs = {name: simulate(schedule(key, 8, 20)) for name, key in keys.items()}
style.show(*gantt(runs["DualPipe"]))

# %% tags=["claim:moves"]
idle = {name: max(one.bubble) for name, one in runs.items()}
style.show(*gantt_stack(runs, "The same work in four orders"))
assert idle["DualPipe"] <= idle["1F1B"] / 3 and idle["ZB1P"] <= idle["1F1B"] / 3
reveal("dualpipe.p2", idle["DualPipe"], unit="units", because="Half the ranks, and −3W.")

# %% [markdown]
# ZBV is another split schedule; we come back to it. Now step through it yourself: move the time with the slider, change the
# schedule, the ranks, the costs. The bars at the right are each rank's idle time, and how many micro-batches are alive on it now;
# the mark is the peak. Hover over a box to read its action.

# %%
from dsv3lib.viz.pipeline_view import PipelineView

PipelineView("dualpipe", stages=8, microbatches=20)

# %% [markdown]
# ## Why PP + 1
#
# What is alive keeps its activations in memory.

# %%
exercise("dualpipe.4")

# %%
def peak_live(row):
    ...


peak_live = check("dualpipe.4", peak_live)

# %% tags=["claim:plus_one"]
# answers dualpipe.p3
peaks = [peak_live([str(action) for action in row]) for row in made.actions]
assert peaks == simulate(made).peak_activations == [made.stages + 1] * made.stages
style.show(*live_curve(simulate(made), ranks=(0, 3)))
reveal("dualpipe.p3", "9 everywhere", because="A pair begins one before it ends another.")

# %% [markdown]
# The warm-up fills each rank to PP, whichever way they came: an end has many of its own direction, the middle as many of
# each. From then on, a rank always has one to begin and one to end. In 1F1B it would end first; **in a pair it does both at
# once, so one more is alive**<!-- claim: plus_one -->. That is the whole of the $+1$.
#
# ## Why −3W
#
# The formula of Table 2 is $(PP/2-1)(F\&B + B - 3W)$, and nobody says where the three come from. Ask the timeline. We run the
# same simulation with amounts that remember what they are made of, and print each gap of a middle rank. (W a little shorter than
# F, so that no two paths are equally long.)

# %% tags=["claim:derived"]
from dsv3lib.pipeline.derivation import derive

derived = derive(made, rank=3, costs=Costs(F=1, B=1.9, W=0.9))
table(
    ["waits before", "from", "how long"],
    [[str(g.before or "the end"), f"{g.start.value:.1f}", str(g.length)] for g in derived.gaps],
    caption=f"Rank 3 of 8. Together: {derived.total}.",
)
assert str(derived.total) == "3 F&B + 3 F − 6 W"
assert set(simulate(made).peak_activations) == {made.stages + 1}

# %% [markdown]
# Read it from top to bottom, with $PP/2-1 = 3$:
#
# - $F$, three times: the first micro-batch of its own direction must come down to the middle.
# - $F\&B-B$, three times: this rank has only a backward pass left where its neighbour still has a pair, and waits for it.
# - $B-2W$, three times, at the end: its neighbours do an `I` where it has a `W` to fill in, and $I - W = B - 2W$.
#
# The sum is $3\,(F\&B + F - 2W)$. With $F = I = B - W$ that *is* the paper's $3\,(F\&B + B - 3W)$: two of the three W were put
# off into gaps, the third is only $F$ written in other letters. So the formula also says when it cannot hold<!-- claim: limits -->:

# %% tags=["claim:limits"]
from dsv3lib.pipeline.closed_form import compare

cases = [
    ("as in the paper", compare("dualpipe", 8, 20)),
    ("W longer than F (1.2)", compare("dualpipe", 8, 20, Costs(F=1, B=2.2, W=1.2))),
    ("F&B shorter than F + B (2.5)", compare("dualpipe", 8, 20, Costs(FB=2.5))),
    ("ZB1P, 4 micro-batches", compare("zb1p", 8, 4)),
]
rows = [
    [why, f"{c.formula:.1f}", f"{c.least:.1f} to {c.worst:.1f}", c.agrees] for why, c in cases
]
table(["case", "formula", "simulated, least to most", "agrees"], rows,
      caption="A long W cannot be put off for nothing; few micro-batches fill no gaps.")
assert [row[3] for row in rows] == ["on every rank", "no", "on the worst rank", "no"]

# %% [markdown]
# ## Inside a pair
#
# Why pairs at all? In V3 each layer sends its tokens to experts on other nodes and back: *dispatch* and *combine*, two
# all-to-alls a layer, about as long as the computing itself (§3.2.1). Alone, a pass would have to wait for them. In a pair, one
# micro-batch travels while the other computes. Communication takes 20 of the GPU's 132 multiprocessors (SMs) for that (§3.2.2).

# %%
from dsv3lib.pipeline.overlap import Gpu, LayerTimes, simulate_pair, tune
from dsv3lib.viz.live import live
from dsv3lib.viz.pipeline_streams import share_of_sms, streams


def inside(ratio, sms):
    gpu = Gpu(communication_sms=sms)
    return streams(simulate_pair(LayerTimes.of_model(v3, ratio), gpu, layers=3))


live(inside, ratio=[0.25, 0.5, 0.7, 1.0, 1.5], sms=[4, 8, 12, 16, 20, 24, 32, 48],
     start={"ratio": 0.7, "sms": 20},
     labels={"ratio": "communication / computing", "sms": "SMs for communication"})

# %%
style.show(*share_of_sms(LayerTimes.of_model(v3, 0.7)))

# %% [markdown]
# ## For real: four processes
#
# So far nothing was computed. Now a small model is cut into a stage for each rank, and four processes on this machine train two
# copies of it, each by its own row of the schedule. They send each other activations and gradients (`torch.distributed`), and
# add up what both copies of a weight have learnt. A process takes some hundred megabytes; where there is little memory, two do it.

# %%
from dsv3lib.course import bar
from dsv3lib.pipeline.runtime.room import processes_here
from dsv3lib.pipeline.runtime.trial import trial

ranks = processes_here(2 if FAST else 4)
small = schedule("dualpipe", stages=ranks, microbatches=2 * ranks)
with bar(f"{ranks} processes", total=STEPS * sum(map(len, small.actions))) as step:
    run = trial("dualpipe", ranks, 2 * ranks, STEPS, on_action=step)

# %% tags=["claim:processes"]
import os

from dsv3lib.pipeline.runtime.trial import whole
from dsv3lib.viz.pipeline_trace import traces

did = [" ".join(name for name, _, _ in spans) for spans in run.spans]
assert did == small.rows()
assert len({os.getpid(), *run.pids}) == ranks + 1 and run.peaks == [ranks + 1] * ranks
one_piece = whole(ranks, 2 * ranks)
print(f"loss, {ranks} processes: {run.losses[0]:.10f}, in one piece: {one_piece:.10f}")
assert abs(run.losses[0] - one_piece) < 1e-12 and run.drift == 0
style.show(*traces(run.timeline, run.simulated))

# %% [markdown]
# **The processes did, action by action, what the schedule says**<!-- claim: processes -->. As many micro-batches were alive as you
# have counted, and the loss is that of the model in one piece. Above is the wall clock: where processes share cores, it shows
# mostly how they wait for one another's computing. Below is the same schedule, simulated at the processor time that each
# action took. Its F, I and W are not of one length: in a model as small as this one, other things than products take the time.
#
# ## Break it
#
# **Two actions swapped.** A middle rank does its first backward pass before a forward pass that it depends on. It is the kind of mistake
# that makes a cluster stand still with no message at all. The validator names who waits for whom<!-- claim: deadlock -->.

# %% tags=["claim:deadlock"]
from dsv3lib.errors import ConfigError, ScheduleError

row = made.rows()[3].split()
wrong = made.swapped(rank=3, first=row.index("F1.2"), second=row.index("B1.0"))
message = ""
try:
    validate(wrong)
except ScheduleError as error:
    message = str(error)
print(message.replace("; ", ";\n"))
assert "waits at" in message and "B1.0" in message

# %% [markdown]
# **No split.** Keep all backward passes of step 6 whole. It runs, and the bubble grows by
# two thirds<!-- claim: whole -->. **Odd PP.** Two directions need a partner for each rank.

# %% tags=["claim:whole"]
from dsv3lib.pipeline.schedules.dualpipe import dualpipe

whole = simulate(dualpipe(8, 20, split_step_6=False))
print("idle on a rank, split and whole:", runs["DualPipe"].bubble[0], whole.bubble[0])
assert whole.bubble[0] * 3 == runs["DualPipe"].bubble[0] * 5
refusal = ""
try:
    schedule("dualpipe", stages=7, microbatches=20)
except ConfigError as error:
    refusal = str(error)
print(refusal)
assert "even" in refusal

# %% [markdown]
# **One direction forgotten.** Each copy of a weight sees half of the micro-batches; their gradients must be added before the
# optimiser takes its step (an all-reduce). Without it nothing crashes, and the first loss is right. But **the two copies drift
# apart, and the next loss is another**<!-- claim: forgotten -->. Threads stand in for the processes here; they give the same numbers.

# %% tags=["claim:forgotten"]
from dsv3lib.pipeline.runtime.trial import rehearse


def forgetful(links):
    links.gather = lambda tensor, ranks: [tensor]  # every copy keeps its own gradients
    return links


added, forgotten = rehearse("dualpipe", 2, 4), rehearse("dualpipe", 2, 4, links=forgetful)
table(["the other direction", "first loss", "next loss", "copies differ by at most"],
      [[name, *(f"{loss:.4f}" for loss in one.losses), f"{one.drift:.3f}"]
       for name, one in (("added", added), ("forgotten", forgotten))],
      caption="A mistake that only a comparison with one process shows.")
assert added.drift == 0 and forgotten.drift > 1e-3
assert abs(added.losses[1] - forgotten.losses[1]) > 1e-3

# %% [markdown]
# ## On trial
#
# **"DualPipe has no bubbles at all."** <!-- claim: t_bubbles --> From a machine-made audio conversation about the report that
# is passed on in several languages; the report has a formula for them. If it were true, no number of ranks would leave one.

# %% tags=["claim:t_bubbles"]
found = {pp: simulate(schedule("dualpipe", pp, 4 * pp)) for pp in (2, 4, 8, 16)}
table(["PP", "idle on a rank", "share of the time"],
      [[pp, max(r.bubble), f"{100 * r.bubble_share:.1f} %"] for pp, r in found.items()],
      caption="Verdict: false, but for two ranks. Longer steps: a smaller share.")
assert all(max(one.bubble) > 0 for pp, one in found.items() if pp > 2)

# %% [markdown]
# **"It needs only slightly more memory."** <!-- claim: t_memory --> Also from summaries; the report says it of activations, and of
# the second copy that it weighs little *because* the experts are spread over many GPUs (§3.2.1). So count a GPU's bytes, with
# V3's own sizes, on 2,048 GPUs.

# %% tags=["claim:t_memory"]
from dsv3lib.pipeline.planner import plan

both = ("zb1p", "dualpipe")
plans = {(name, ep): plan(v3, name, pp=16, ep=ep) for name in both for ep in (8, 64)}
rows = [
    [name, ep, f"{p.weights + p.gradients:.0f}", f"{p.activations:.0f}", f"{p.memory:.0f}"]
    for (name, ep), p in plans.items()
]
table(["schedule", "EP", "weights, gradients GB", "activations GB", "all GB"], rows,
      caption="Verdict: of activations, true. The copy: bearable at EP 64, not at EP 8.")
more = {ep: plans["dualpipe", ep].memory - plans["zb1p", ep].memory for ep in (8, 64)}
ratio = plans["dualpipe", 64].activations / plans["zb1p", 64].activations
assert ratio < 1.1 and more[64] > 10 and more[8] > 2.5 * more[64]

# %% [markdown]
# **"All communication is hidden behind computing."** <!-- claim: t_hidden --> The report says it of V3 on its cluster. Is it a
# property of the schedule? Then it would hold however much there is to send.

# %% tags=["claim:t_hidden"]
rows = []
for ratio in (0.25, 0.5, 0.7, 1.0, 2.0):
    pair = simulate_pair(LayerTimes.of_model(v3, ratio), layers=30)
    rows.append([ratio, round(100 * pair.hidden), f"{pair.serial / pair.makespan:.2f}"])
table(["communication / computing", "hidden, percent", "faster than in turn"], rows,
      caption="Verdict: hidden up to about 0.7; beyond, the wire sets the pace.")
assert rows[1][1] >= 99 and rows[-1][1] < 70

# %% [markdown]
# **"DualPipe always beats Zero Bubble."** <!-- claim: t_always, hidden --> Often said where Table 2 is quoted, which compares with
# ZB1P. ZBV (same authors) folds one model into a V over the ranks. Compare how long the whole step takes, first with nothing to
# send, then with more and more: ZBV's passes wait for it, DualPipe's pairs hide it and give up their SMs.

# %% tags=["claim:t_always", "claim:hidden"]
def step_time(name, ratio):
    """A step of 8 ranks: alone, a pass waits for its all-to-alls; in a pair it does not."""
    times = LayerTimes.of_model(v3, ratio)
    sent = times.dispatch + times.combine
    both = min(tune(times, layers=4)[1].values()) / 4  # with the best share of SMs
    return simulate(schedule(name, 8, 20), F=1 + sent, B=2 + sent, W=1, FB=both).makespan


names = ("zb1p", "zbv", "dualpipe")
rows = [[r, *(round(float(step_time(n, r)), 1) for n in names)] for r in (0, 0.25, 0.5, 1.0)]
table(["communication / computing", "ZB1P", "ZBV", "DualPipe"], rows,
      caption="Verdict: with nothing to send it loses; it was made to send.")
assert max(runs["ZBV"].bubble) < max(runs["DualPipe"].bubble)
assert rows[0][2] < rows[0][3] and rows[-1][3] < rows[-1][2]

# %% [markdown]
# ## At scale: V3 on 2,048 GPUs
#
# The paper trained with PP 16, EP 64, ZeRO-1 and DualPipe (§3.2). The planner compares that with other choices. Parameters,
# operations and bytes are counted from the model; 495 TFLOP/s a GPU in the products is an *assumption*, and nothing here was
# measured. `dsv3 pipeline plan --model v3-671b --gpus 2048` prints the whole table (see the paper's row, marked there).

# %% tags=["claim:plan"]
from dsv3lib.pipeline.planner import compare_plans

names = ["1f1b", "zb1p", "dualpipe"] + ([] if FAST else ["zbv", "dualpipev"])
plans, refused = compare_plans(v3, names, pps=[8, 16], eps=[64])
table(
    ["schedule", "PP", "bubble %", "memory GB", "fits in 80 GB", "k hours per 1T tokens"],
    [[p.schedule + " (the paper's)" * p.is_papers, p.pp, f"{100 * p.bubble:.1f}",
      f"{p.memory:.0f}", "yes" if p.fits[0] else "no", f"{p.hours / 1000:.0f}"] for p in plans],
    caption="Estimates, for comparing. The paper reports 180 thousand H800 hours.",
)
papers = next(one for one in plans if one.is_papers)
cheapest = min(one.hours for one in plans if one.fits[0])
assert papers.fits[0] and papers.hours <= 1.001 * cheapest

# %% [markdown]
# **Among the compared plans that fit, none is cheaper than the paper's**<!-- claim: plan -->. DualPipeV, folded later from the same idea,
# ties with it on half as many ranks.
#
# ## A game: order the actions yourself
#
# Three ranks, four micro-batches. Click what each rank does next. What can run, runs; who waits is named; and at the end you are
# compared with three schedules. Can you reach ZB1P?

# %%
from dsv3lib.viz.pipeline_game import PipelineGame

PipelineGame(stages=3, microbatches=4)

# %% [markdown]
# ## What can go wrong
#
# - A schedule that runs in a simulator can hang on a cluster: sends and receives of a link must come in the same order. The
#   validator checks that, too.
# - A weights' backward that is put off keeps its activations. Whoever counts memory until `I` counts ZB1P too low.
# - "Bubble" is counted in different ways: here it is the whole step's time less a rank's work, on each rank.
# - A stage with the output head is slower than the others, and the slowest sets the pace for all.
#
# ## Recall
#
# <details><summary>Why is `1F1B`'s bubble no shorter than GPipe's?</summary>
#
# The first micro-batch must reach the last rank, and the last gradient must come back: the same way in both.
# </details>
#
# <details><summary>Whom does W keep waiting?</summary>
#
# Nobody in the pipeline: only the optimiser, at the end of the step. So it can be put into gaps.
# </details>
#
# <details><summary>Why are $PP+1$ micro-batches alive, and not PP?</summary>
#
# In a pair a forward pass begins while the backward pass beside it still needs its activations.
# </details>
#
# <details><summary>What does DualPipe pay, and what for?</summary>
#
# A second copy of the parameters and some SMs, for all-to-alls that run behind another micro-batch's computing.
# </details>
#
# ## Where to go next
#
# - `dsv3 pipeline run zbv --stages 4 --save run.svg` draws any schedule's real run on your machine.
# - Run `dsv3 pipeline show dualpipe --actions`, and read
#   [dsv3lib/pipeline/schedules/zbv.py](../dsv3lib/pipeline/schedules/zbv.py) beside it.
# - [Notebook 03](03_bias_based_routing.ipynb) shows where the all-to-all comes from, and why a token visits few nodes.
