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
# # 03 · Balance without a loss: the routing bias
#
# **You will have shown**
#
# 1. **that a mixture of experts, left alone, collapses onto a few of them** <!-- claim: collapse -->;
# 2. **that one number per expert, moved by a sign and never by a gradient, prevents it** <!-- claim: balanced, no_gradient -->;
# 3. **that a token's experts lie on few machines, whatever it would have liked** <!-- claim: nodes -->.
#
# About 75 minutes. Paper: *DeepSeek-V3 Technical Report* (2024), §2.1.2 (Eqs. 12 to 20), §3.2.2 (traffic), §4.5.2 and
# §4.5.3 (ways to balance compared, specialisation). You should know what an expert is (notebook 00).

# %% tags=["parameters"]
STEPS = 60
SEED = 1234
DEVICE = "cpu"
FAST = False

# %%
from dsv3lib.course import setup

session = setup(seed=SEED, notebook="03_bias_based_routing", device=DEVICE)

# %% [markdown]
# ## Cold open: a router left alone
#
# We train the smallest model of this course, `nano`, on real text. It has 8 experts in a layer; each token goes to 2 of them.
# Nobody asks for balance. <!-- claim: nano -->
#
# `fresh` makes the same model and the same text at every call: whatever differs between two runs below is how they balance,
# and nothing else.

# %% tags=["claim:nano"]
import torch

from dsv3lib import ModelConfig
from dsv3lib.studies import balance_ways as small
from dsv3lib.training.loop.settings import TrainingConfig

nano, v3 = small.small_model(SEED).config, ModelConfig.preset("v3-671b")
recipe = TrainingConfig(
    steps=8 if FAST else STEPS, seed=SEED, learning_rate=small.LEARNING_RATE,
    ema_decay=0, validation_batches=0, threads=1,  # one thread: the same sums everywhere
)  # fmt: skip
assert (nano.n_routed_experts, nano.num_experts_per_tok) == (8, 2)

def fresh():
    return small.small_model(SEED).to(session.device), small.stream(SEED), {}

# %%
from dsv3lib.course import measured, predict, reveal, table

shares = ["about 25 %, their fair share", "about 40 %", "about 70 %", "more than 85 %"]
predict(
    "routing.p1",
    "Without any balancing, how much of a layer's work do its two fullest experts (of eight) "
    "do in the last quarter of the training?",
    options=shares,
)

# %% [markdown]
# The view draws while the model trains. Blue is an idle expert, white the mean, red an overloaded one.

# %%
# answers routing.p1
from dsv3lib.viz.follow import train_and_watch

runs, views = {}, {}
runs["none"], views["none"] = train_and_watch(
    fresh, recipe, "none", "No balancing",
    "Dark blue columns are experts that get next to no tokens: they are hardly trained.",
)  # fmt: skip

# %% tags=["claim:collapse"]
from dsv3lib.studies import log

study = log.read("balance_ways")  # recorded: `python -m dsv3lib.studies.balance_ways`
load = runs["none"].tail().load.sum(0).double()  # last quarter: [layers, experts]
fullest = (load / load.sum(-1, keepdim=True)).sort(descending=True).values[:, :2]
share = float(fullest.sum(-1).mean())
reveal(
    "routing.p1", shares[sum(share > edge for edge in (0.32, 0.55, 0.87))], varies=True,
    because=f"Here: {100 * share:.0f} %. Who gets tokens learns, who learns gets tokens.",
)  # fmt: skip
unbalanced = [row["tail_global_violation"] for row in study if row["way"] == "none"]
assert len(unbalanced) >= 3 and min(min(row) for row in unbalanced) > 1
assert FAST or share > 0.55

# %% [markdown]
# This is *routing collapse*. Most experts' weights are hardly trained, and on a cluster the machine with the popular experts
# keeps all others waiting.
#
# ## How a token finds its experts
#
# Here is one real token at the router that has just collapsed, with a bias that would balance it. Follow it from top to
# bottom before you read a formula.

# %%
from dsv3lib.layers.router import route
from dsv3lib.studies.frozen_router import find_bias, router_logits
from dsv3lib.viz import balance, style
from dsv3lib.viz.routing_path import routing_path

s = router_logits(runs["none"].model, fresh()[1], seed=SEED).sigmoid()
b, _ = find_bias(s, nano, gamma=0.001)
plain, steered = (route(s, bias, nano)[0].sort(-1).values for bias in (0 * b, b))
changed = (plain != steered).any(-1).nonzero()
token = int(changed[0]) if len(changed) else 0  # a token whose experts the bias changes
style.show(*routing_path(s[token], b, nano))

# %% [markdown]
# What each row is called, in the paper and in the code:

# %%
from dsv3lib.course import symbols

symbols(
    "N_r", "K_r", "n_g", "M", "s_r",
    ("u_t", "x", "[d]", "what the layer reads of token t"),
    ("e_i", "weight[i]", "[d]", "expert i's own vector, a row of the router's matrix"),
    ("s_{i,t}", "scores", "[N_r]", "affinity of token t to expert i, the sigmoid of u·e"),
    ("b_i", "e_score_correction_bias", "[N_r]", "bias of expert i, the same for all tokens"),
    ("g_{i,t}", "weights", "[K_r]", "gate value: how much a chosen expert's output counts"),
)  # fmt: skip

# %% [markdown]
# $$s_{i,t} = \sigma(u_t^\top e_i), \quad \sigma(x) = \tfrac{1}{1 + e^{-x}} \qquad
# \text{chosen} = \mathrm{TopK}_i(s_{i,t} + b_i) \qquad g_{i,t} = s_r\,\frac{s_{i,t}}{\sum_{\text{chosen}} s_{j,t}}$$
#
# ## You write it: the choice

# %%
from dsv3lib.course import check, exercise

exercise("routing.1")

# %%
def choose(s, b, k, scale):
    ...


choose = check("routing.1", choose)

# %% [markdown]
# ## You write it: the groups
#
# V3 lays its experts on machines (*nodes*), one group on each. Before the choice all but $M$ groups are closed. Why score a
# group by its *two* best? A token wants $K_r$ experts on $M$ nodes, so on average $K_r / M$ on each: 8 / 4 at V3's sizes. (The
# paper sums the $K_r/M$ best; the released code always two.) <!-- claim: two -->

# %%
exercise("routing.2")

# %%
def close_groups(steered, groups, kept):
    ...


close_groups = check("routing.2", close_groups)

# %% [markdown]
# ## You write it: the update
#
# After each training step the loads are counted, and the bias moves:
#
# $$b_i \leftarrow b_i + \gamma\,\mathrm{sign}(\overline{\text{load}} - \text{load}_i)$$
#
# $\gamma$ is the *bias update speed*. In V3 it is $0.001$ for most of the training and then $0$ (§4.2).

# %%
exercise("routing.3")

# %%
def update(b, load, gamma):
    ...


update = check("routing.3", update)

# %% [markdown]
# ## The real thing
#
# The library's router is [dsv3lib/layers/router.py](../dsv3lib/layers/router.py), its update
# [dsv3lib/training/loop/balance.py](../dsv3lib/training/loop/balance.py). **The same tokens get the same experts from your
# functions and from the library**, at V3's own sizes <!-- claim: same -->.

# %% tags=["claim:same", "claim:two", "claim:worst"]
from dsv3lib.training.loop.balance import max_violation, update_bias

s = torch.rand(500, v3.n_routed_experts, generator=session.generator)
b = torch.randn(v3.n_routed_experts, generator=session.generator) * 0.2
chosen, g = route(s, b, v3)
mine = close_groups(s + b, v3.n_group, v3.topk_group).topk(8, dim=-1).indices
free = route(s, b, v3.replace(n_group=1, topk_group=1))[0]
for ours, theirs in ((mine, chosen), (choose(s, b, 8, 2.5)[0].long(), free)):
    assert torch.equal(ours.sort(-1).values, theirs.sort(-1).values)
load, moved = torch.bincount(chosen.flatten(), minlength=len(b)), b.clone()
update_bias(moved, load, 0.001)
torch.testing.assert_close(update(b.clone(), load, 0.001), moved, check_dtype=False)
print(f"{load.sum()} visits = 500 tokens × 8; the gate values sum to {g.sum(-1).mean():.1f}")
assert v3.num_experts_per_tok / v3.topk_group == 2
assert float(max_violation(torch.tensor([9, 9, 0, 0, 0, 0, 0, 0]))) == 3

# %% [markdown]
# Visits are always tokens times $K_r$: no expert has a capacity, and no token is dropped, in training or after.
#
# ## Does it balance?
#
# The measure of loss-free balancing is **MaxVio** $= \max_i \text{load}_i / \overline{\text{load}} - 1$: by how much the fullest
# expert exceeds the mean. At worst two of eight experts get everything: four times the mean each, MaxVio 3. In one *batch*
# MaxVio says how long the fullest machine keeps the others waiting; over *many* batches (global), whether some expert is
# hardly trained. <!-- claim: worst -->

# %%
bands = ["above 2", "between 1 and 2", "between 0.5 and 1", "below 0.5"]
predict(
    "routing.p2",
    "The same weights, the same text, now with the bias (γ = 0.01, ten times V3's: the run is "
    "short). Where does MaxVio of the last quarter as a whole end, the mean of both layers?",
    options=bands,
)

# %%
# answers routing.p2
runs["bias"], views["bias"] = train_and_watch(
    fresh, recipe, "bias", "Balanced by the bias", speed=0.01,
    caption="Bottom left: every expert's bias. Whoever gets too few tokens rises.",
)  # fmt: skip

# %% tags=["claim:balanced"]
style.show(*balance.before_and_after(runs))
before, after = (float(runs[way].tail().global_violation().mean()) for way in ("none", "bias"))
reveal(
    "routing.p2", bands[sum(after < edge for edge in (2, 1, 0.5))], varies=True,
    because=f"Measured: {after:.2f}, against {before:.2f} without the bias.",
)  # fmt: skip
balanced = [row for row in study if row["way"] == "bias"]
assert max(max(row["tail_global_violation"]) for row in balanced) < min(map(min, unbalanced))
assert torch.equal(runs["none"].load[0], runs["bias"].load[0])  # the same start
assert FAST or after < 0.5 * before

# %% [markdown]
# In the view above: move the step with the arrow keys, choose a layer, choose a kind of text. `dsv3 watch runs/tiny` follows a
# run in another process in the same way.
#
# ## Where do the biases go?
#
# Look at the biases of one layer again. Some still climb when the run ends, so "each finds its height" is not what you see.
# Two things are mixed here. An expert's distance from the others answers to its load. But the *whole* vector wanders too:
# whenever more experts lie below the mean than above it, the signs sum to something positive, and nothing ever pulls back.

# %% tags=["claim:drift", "claim:centred"]
path = views["bias"].history.bias[:, 1]  # layer 2: [steps, experts]
style.show(*balance.drift(path, "layer 2"))
s = router_logits(runs["bias"].model, fresh()[1], layer=1, seed=SEED).double().sigmoid()
b = torch.from_numpy(path[-1]).double()  # in FP32 rounding may settle a tie
centred = b - b.mean()
assert torch.equal(route(s, b, nano)[0], route(s, centred, nano)[0])
drifts = [abs(sum(layer) / len(layer)) for row in balanced for layer in row["bias"][-1]]
measured(f"Mean bias: {b.mean():.3f}; in the record {min(drifts):.3f} to {max(drifts):.3f}")
assert max(drifts) > 0.01

# %% [markdown]
# **The biases of a layer drift as a whole**, by more than a single step of γ <!-- claim: drift -->. **Taking their mean off changes
# no choice of experts** <!-- claim: centred -->, since a constant added to all of them changes no order. torchtitan and Ling
# subtract it after every step; the paper does not (here: `TrainingConfig(centre_bias=True)`). It matters in one place, the mask:
#
# ## Break it
#
# ### A mask of 0
#
# Closed groups get $-\infty$. A `0` looks harmless, because affinities are positive. The released biases are said to be all
# positive as well (public issues report the least about $+2$, most about $+5$). Count the tokens that reach an expert in a
# closed group, with biases at several levels.

# %% tags=["claim:mask"]
from dsv3lib.studies.frozen_router import forbidden_visits

s = torch.rand(1000, 8, generator=session.generator)
b = 0.3 * torch.randn(8, generator=session.generator)
rows = []
levels = {"about +5, as released": 5.0, "centred": 0.0, "about −1": -1.0, "about −2": -2.0}
for name, level in levels.items():
    steered = s + (b - b.mean() + level)
    found = [100 * float(forbidden_visits(fill, steered, nano)) for fill in (-torch.inf, 0.0)]
    rows.append([name, *(f"{x:.0f} %" for x in found)])
table(["biases", "mask −∞", "mask 0"], rows, caption="Tokens with an expert in a closed group")
assert [row[1] for row in rows] == ["0 %"] * 4
assert rows[0][2] == rows[1][2] == "0 %" != rows[2][2] and rows[3][2] == "100 %"

# %% [markdown]
# **On the released weights both masks agree; where biases lie well below 0, a mask of 0 is wrong** <!-- claim: mask -->. A port can
# pass every test on the released model and fail in its owner's first training.
#
# ### The bias in the gate value
#
# Then it would not only choose, it would scale.

# %% tags=["claim:leak"]
s = router_logits(runs["none"].model, fresh()[1], seed=SEED).sigmoid()
b, _ = find_bias(s, nano, gamma=0.001)
chosen, g = route(s, b, nano)
leaked = (s + b).gather(-1, chosen)
wrong = nano.routed_scaling_factor * leaked / leaked.sum(-1, keepdim=True)
off = (wrong - g).abs().mean() / g.mean()
measured(f"With the bias inside, gate values are off by {100 * off:.0f} % on average.")
assert off > 0.005

# %% [markdown]
# So **every update of the bias would change the outputs of tokens that keep their experts** <!-- claim: leak -->.
#
# ### γ too large, or none
#
# The affinities of the balanced model, frozen; its bias is taken away and found again.

# %% tags=["claim:gamma"]
s = router_logits(runs["bias"].model, fresh()[1], seed=SEED).sigmoid()
updates = 120 if FAST else 400
trials = {gamma: find_bias(s, nano, gamma, updates)[1] for gamma in (0, 0.001, 0.01, 0.1)}
style.show(*balance.steps_of_gamma(trials))
final = {gamma: float(row[-updates // 4 :].mean()) for gamma, row in trials.items()}
measured("Last quarter: " + " · ".join(f"γ = {g:g}: {v:.2f}" for g, v in final.items()))
assert final[0.01] < final[0.1]

# %% [markdown]
# **A larger step balances worse** <!-- claim: gamma -->: the bias can place an expert no finer than γ.
#
# ## On trial: "the sigmoid balances the load"
#
# The claim comes from a machine-made audio conversation about the report, published as a transcript in several languages, and
# from summaries that repeat it. Both runs above had a sigmoid; one collapsed. Then is the sigmoid worth anything here? Take
# made-up affinities at V3's sizes, some experts more popular than others, and balance them: a sigmoid and a softmax, each
# without a bias, with V3's γ, and with a fiftieth of it.

# %% tags=["claim:sigmoid"]
from dsv3lib.studies.frozen_router import made_up_affinities

rows, updates = {}, 60 if FAST else 240
for name, gate in (("sigmoid", torch.sigmoid), ("softmax", lambda x: x.softmax(-1))):
    s = made_up_affinities(gate, v3, seed=SEED)
    ends = [find_bias(s, v3, gamma, updates)[1][-20:].mean() for gamma in (0, 0.001, 0.00002)]
    rows[name] = [round(float(x), 2) for x in ends]
table(["affinity", "no bias", "γ = 0.001", "γ = 0.00002"], [[n, *r] for n, r in rows.items()],
      caption="MaxVio of a batch in the end", varies=True)  # fmt: skip
assert min(rows["sigmoid"][0], rows["softmax"][0]) > 1.5  # neither balances by itself
assert rows["sigmoid"][1] < 0.6 * rows["sigmoid"][0]

# %% [markdown]
# **Neither the sigmoid nor the softmax balances anything; the bias does** <!-- claim: sigmoid -->. What differs is the step that suits
# them: softmax values of 256 experts are small and lie close together, so that V3's γ is a coarse step for them. That is a
# matter of scale, not a fault of the softmax. <!-- claim: sigmoid -->
#
# ## On trial: "the bias is trained by gradient"

# %% tags=["claim:no_gradient"]
router = runs["bias"].model.routers()[0]
own = router.e_score_correction_bias
assert not any(p is own for p in runs["bias"].model.parameters())  # no parameter
b = torch.zeros(8, requires_grad=True)
assert not route(torch.rand(50, 8), b, nano)[1].requires_grad  # no path from gate values to it
b, gamma = torch.zeros(8), [record["bias_speed"] for record in runs["bias"].records]
for load, speed in zip(runs["bias"].load[:, 0], gamma, strict=True):
    b = update(b, load, speed)
print("worked out from γ and the loads alone:", torch.allclose(b.float(), own.cpu(), atol=1e-6))
assert torch.allclose(b.float(), own.cpu(), atol=1e-6)

# %% [markdown]
# Refuted: **your `update` and the logged loads give the trained model's bias, with no gradient anywhere** <!-- claim: no_gradient -->.
#
# ## On trial: "auxiliary losses are harmless; why a bias, then?"
#
# The older way to balance is a term in the loss, over each sequence or over the whole batch. First, does it balance? Train both,
# all else equal.

# %% tags=["claim:losses"]
from dsv3lib.training.loop.comparison import compare

for outcome in compare(fresh, recipe, ["sequence", "batch"], alpha=0.02):
    runs[outcome.way] = outcome
keys = ("batch_violation", "global_violation", "loss")
rows = [[way, *(round(runs[way].summary()[key], 2) for key in keys)] for way in runs]
head = ["balanced by", "MaxVio, batch", "MaxVio, global", "loss (nats per token)"]
table(head, rows, caption="Last quarter of each run, mean over the layers", varies=True)
ways = small.summary(study)
assert max(ways["sequence, α = 0.02"]["violation"]) < min(ways["none"]["violation"])

# %% [markdown]
# **An auxiliary loss balances too** <!-- claim: losses -->; batch by batch it is often the more even one. And in so short a run the
# losses in the last column lie too close together to tell the ways apart. So why a bias? Two questions can be measured here.
#
# ### What does a step for balance do to the language model?
#
# Take the collapsed model. Move its parameters a small way along
# the negative gradient of the auxiliary loss alone, and see what the *language-model* loss does on other text. For comparison:
# a step of the same length along the language model's own gradient, one in a random direction, and one update of the bias.

# %% tags=["claim:reach"]
from dsv3lib.studies.interference import interference

got = interference(runs["none"].model, fresh()[1], 0.02, 0.01, repeats=2 if FAST else 6)
said = {"language": "along the language model's gradient", "balance": "along the auxiliary one",
        "random": "in a random direction", "bias": "one update of the bias"}  # fmt: skip
spread = {k: f"{1000 * x.mean():+.2f} ± {1000 * x.std():.2f}" for k, x in got.items()}
rows = [[text, spread[k]] for k, text in said.items()]
table(["step", "change of the loss (0.001 nats)"], rows, varies=True,
      caption="Language-model loss on other text; mean and spread over batches")  # fmt: skip
reach, cosine = got["reach"], got["cosine"]
measured(f"The auxiliary gradient reaches {100 * reach.mean():.0f} % of the parameters; its "
         f"cosine with the other gradient: {cosine.mean():.3f} ± {cosine.std():.3f}.")
assert reach.min() > 0.1 and got["language"].mean() < got["balance"].mean()
assert FAST or got["balance"].mean() > max(got["random"].mean(), got["bias"].mean())

# %% [markdown]
# **The auxiliary gradient moves the router and what lies below it; the bias moves no weight at all** <!-- claim: reach -->. Here is the
# quarrel, where balancing has most to do: on the collapsed model a step for balance alone costs the language model far more
# than a random step of its length, and more than the bias's update. The bias is not quite for free, since it sends tokens to other
# experts. Do not read the cosine alone: near zero it would mean that the two gradients are unrelated, not that they agree.
#
# ### What does it do over a whole run, over seeds?
#
# Recorded; each run starts from the same weights and text as the others of its seed.

# %% tags=["claim:study", "claim:undecided"]
style.show(*balance.ways_compared(study))
head = ["balanced by", "seeds", "MaxVio, frozen", "bits", "loss, less that of 'none'"]
span = "{:.2f} to {:.2f}".format
table(head, [
    [name, w["seeds"], *(span(min(w[k]), max(w[k])) for k in ("violation", "bits", "loss"))]
    for name, w in ways.items()
], caption="Lowest to highest over the seeds; loss in nats per token")  # fmt: skip
rest = [w for name, w in ways.items() if name != "bias"]
assert max(ways["bias"]["violation"]) < min(min(w["violation"]) for w in rest)
assert min(ways["bias"]["bits"]) > 5 * max(ways["sequence, α = 0.2"]["bits"])
assert max(ways["sequence, α = 0.2"]["loss"]) < 0 < max(ways["bias"]["loss"])

# %% [markdown]
# What this size decides, and what it does not:
#
# - **The bias gives the most level model of all, and keeps what experts know of the text** <!-- claim: study -->. A strong loss over
#   each sequence levels the model too, but by asking *every sequence* for level experts. A sequence here is one kind of text,
#   so that experts may not differ by text: of the bits little is left. Over the batch the loss asks for less, and the bits stay.
# - **Which way gives the better language model is not decided here** <!-- claim: undecided -->. In these short runs the strongest
#   loss has the lowest language-model loss in every seed, and the bias gains nothing over none.
#
# The paper's own comparison, at sizes where the loss can tell (§4.5.3): validation loss of a 1B model 2.258 with the
# sequence-wise loss, 2.253 without one, 2.253 with the batch-wise loss; of a 3B model 2.085, 2.080, 2.080. Its Table 5 sets an
# auxiliary loss against the bias, all else equal (small model, large model):
#
# | the paper's Table 5 | auxiliary loss | bias |
# |---|---|---|
# | Table 5: Pile, bits per byte (lower is better) | 0.727, 0.656 | 0.724, 0.652 |
# | Table 5: HumanEval | 22.0, 40.2 | 22.6, 46.3 |
# | Table 5: GSM8K | 27.1, 70.7 | 29.6, 74.5 |
# | Table 5: MMLU | 51.0, 68.3 | 51.8, 67.2 |
#
# Seven of eight figures favour the bias, by little. The batch-wise loss does as well in the
# paper's test; it still asks for a strength α that is right for the whole training, and the bias does not.
#
# ## Who works for which text?
#
# Level in the mixture does not mean alike in every text. To see it, the model must be *frozen* and *balanced*: loads that are
# counted while a bias swings show the swings. Keep the weights of your run, let nothing but the bias move for
# another hundred batches, by smaller and smaller steps, and only then count, on documents that no training saw.
#
# Any table of counts shows some pattern. How much of it is chance? Shuffle the domains' names among the *documents* and count
# again, many times. (Documents, not tokens: those of one document resemble each other.) What the domain tells of
# the expert is measured as mutual information, in bits; it is zero if all domains use the experts alike.

# %% tags=["claim:texts", "claim:p_value"]
from dsv3lib.training.loop.specialisation import specialisation_test

model, text = runs["bias"].model.eval(), fresh()[1]
small.settle(model, text, small.SETTLING[::8] if FAST else None)
mixture = sum(small.expert_load(model, text) for _ in range(4 if FAST else 24))
loads, domain = small.document_loads(model, text)
names, shuffles = text.domain_names, 99 if FAST else 999
test = specialisation_test(loads, domain, shuffles, torch.Generator().manual_seed(SEED))
by_domain = torch.stack([loads[domain == d, 1].sum(0) for d in range(len(names))])
style.show(*balance.experts_by_domain(by_domain, names, "layer 2", test, 1, nano.n_group))
level, chance = max_violation(mixture).max(), test.by_chance[:, 1].mean()
measured(f"MaxVio of the frozen model on the mixture: {level:.2f}. Bits: {test.bits[1]:.3f}, "
         f"by chance {chance:.3f}, p = {test.p_value[1]:.3f}.")  # fmt: skip
assert FAST or level < 0.6
assert float(test.p_value.min()) * (1 + shuffles) > 0.999
assert min(min(b) - max(c) for b, c in [(r["bits"], r["bits_by_chance"]) for r in balanced]) > 0

# %% [markdown]
# **A frozen model that is level on the mixture still uses its experts unevenly on each kind of text** <!-- claim: texts -->, by more
# than chance would. The p-value is (1 + the shuffles that came to as much) / (1 + all shuffles), so it is never zero: with
# 999 shuffles and none that came near, it is 0.001. <!-- claim: p_value -->
# `tiny-v3`, which comes with the course, has learnt for longer:

# %% tags=["claim:shipped"]
from dsv3lib.studies.shipped_model import open_shipped

longer = small.specialisation(*open_shipped(seed=SEED), shuffles, session.generator)
style.show(*balance.bits_by_layer(longer))
assert all(longer.bits > longer.by_chance.max(0).values)

# %% [markdown]
# **In each of its layers the domain tells more of the expert than any of the shuffles does** <!-- claim: shipped -->.
#
# ## What the groups are worth
#
# On a cluster a choice becomes traffic. Inside a machine (a *node*) GPUs talk over NVLink, between machines over InfiniBand, which
# is slower: 160 and 50 GB/s (§3.2.2). Sending tokens to their experts is called *dispatch*, bringing the results back
# *combine*. A token is sent once to each node that holds one of its experts, and handed on inside.

# %%
exercise("routing.4")

# %%
def nodes_used(chosen, experts, nodes):
    ...


nodes_used = check("routing.4", nodes_used)

# %% [markdown]
# Count with it: 2,000 tokens, 256 experts on 8 nodes, with and without the limit of 4. <!-- claim: nodes -->

# %% tags=["claim:nodes"]
from dsv3lib.parallel.traffic import Cluster, count_traffic


def routed(config, tokens=2000):
    draw = torch.Generator().manual_seed(SEED)
    s = torch.rand(tokens, config.n_routed_experts, generator=draw)
    return route(s, torch.zeros(config.n_routed_experts), config)[0]

limited, free = routed(v3), routed(v3.replace(topk_group=8))
on = {n: nodes_used(i, 256, 8).double() for n, i in (("at most 4", limited), ("any", free))}
table(["nodes allowed", "nodes per token", "most"],
      [[n, f"{x.mean():.2f}", int(x.max())] for n, x in on.items()])  # fmt: skip
traffic = count_traffic(limited, Cluster.of(v3, gpus_per_node=32))
assert int(on["at most 4"].max()) == 4 and int(on["any"].max()) > 4
assert int(traffic.infiniband.sum()) == int(on["at most 4"].sum()) and traffic.dropped == 0

# %%
predict(
    "routing.p3",
    "NVLink is 3.2 times as fast as InfiniBand, and both work at the same time. InfiniBand "
    "brings a token to 4 nodes. How many experts could it visit there, in all, before NVLink "
    "takes longer than InfiniBand?",
    number=(1.0, 64.0, "experts"),
)

# %% [markdown]
# ## On trial: "3.2 experts per token"
#
# Count copies on both wires for a growing number of experts:

# %% tags=["claim:bound"]
counted = {k: count_traffic(routed(v3.replace(num_experts_per_tok=k)), Cluster.of(v3, 32))
           for k in (8, 10, 12, 13, 16)}  # fmt: skip
rows = [[k, f"{int(t.infiniband.sum()) / 2000:.2f}", f"{int(t.nvlink.sum()) / 2000:.0f}",
         "yes" if t.nvlink_is_hidden() else "no"] for k, t in counted.items()]  # fmt: skip
table(["experts per token", "InfiniBand copies", "NVLink copies", "NVLink done in time"], rows)
bound = v3.topk_group * 160 / 50
reveal("routing.p3", bound, unit="experts", close=0.05,
       because="4 nodes × 3.2. Twelve whole experts fit; the paper rounds up.")  # fmt: skip
assert counted[12].nvlink_is_hidden() and not counted[13].nvlink_is_hidden()
assert round(bound, 1) == 12.8 and round(bound) == 13

# %% [markdown]
# Refuted: **3.2 is a number of experts per node, an allowance of bandwidth** <!-- claim: bound -->. A token visits 8 experts. With 13,
# NVLink would need less than two percent longer than InfiniBand: the paper's "up to 13 experts" is 12.8, rounded up.
# <!-- claim: bound -->
#
# ## At scale
#
# At V3's sizes a copy of a token is 7,168 numbers. Out (dispatch) it travels in FP8 with a scale for each 128 numbers, back
# (combine) in BF16, in 58 layers. <!-- claim: bytes -->

# %% tags=["claim:bytes"]
out, back = (f(v3.hidden_size) / 2000 for f in (traffic.dispatch_bytes, traffic.combine_bytes))
naive = int(traffic.visits.sum()) / int(traffic.infiniband.sum())
table(["a token in one layer", ""], [
    ["dispatch over InfiniBand", f"{out / 1024:.1f} KiB"],
    ["combine over InfiniBand", f"{back / 1024:.1f} KiB"],
    ["the same with a copy per expert", f"{naive:.1f} times that"],
])  # fmt: skip
assert v3.hidden_size == 7168 and len(v3.moe_layers) - v3.num_nextn_predict_layers == 58

# %% [markdown]
# <details><summary>Appendix: the kernels that route on a GPU, as compiled</summary>
#
# In PyTorch, routing is a dozen launches that each cross memory. On a GPU the gate is one kernel
# ([gate_kernel.py](../dsv3lib/kernels/moe/gate_kernel.py)): a token's scores, bias, groups, choice and gate values never leave
# the registers. Rows then go to their experts by counting
# ([permutation.py](../dsv3lib/kernels/moe/permutation.py)), and all experts are one product
# ([grouped_gemm.py](../dsv3lib/kernels/matmul/grouped_gemm.py)).
#
# The next cell compiles them for Hopper; no GPU is needed for that. How to read its table: *registers* hold the numbers that one
# thread works on, `255` at most; what does not fit is *spilled* to slow memory, so none is wanted. *Shared* is the fast memory that
# the threads of a block share, `227` KiB at most on Hopper. `wgmma` is Hopper's matrix instruction; a kernel that
# multiplies no matrices has none. (Limits: NVIDIA's CUDA programming guide.)
# </details>

# %% tags=["folded"]
from dsv3lib.course import at_scale

operations = ("gate", "permute", "grouped_gemm", "grouped_gemm_fp8")
at_scale("gate training", "permute bf16", "grouped_gemm forward", operations=operations)

# %% [markdown]
# ## Further exercises

# %%
exercise("routing.5")

# %%
def sequence_loss(s, k, alpha):
    ...


sequence_loss = check("routing.5", sequence_loss)

# %%
exercise("routing.6")

# %%
def waiting(load, devices):
    ...


waiting = check("routing.6", waiting)

# %% [markdown]
# ## What can go wrong
#
# - *The load runs away in spite of the bias.* The sign of the update is the wrong way round, or γ is zero.
# - *MaxVio swings from step to step.* γ is too large for the spread of the affinities.
# - *The bias does not move after `model.bfloat16()`.* Steps of `0.001` vanish in BF16 beside larger biases; the buffer must stay FP32.
# - *Load counted twice.* Activation checkpointing runs layers again in backward; count in the forward pass alone.
#
# ## Do you recall?
#
# <details><summary>Where does the bias act, and where not?</summary>
# In the choice of experts and groups. Not in the gate values, the loss or any gradient.</details>
#
# <details><summary>Why the sign, and not the size of the violation?</summary>
# One flooded expert must not shake the layer: every step has the same size, and γ bounds how fast anything can change.</details>
#
# <details><summary>What do 4, 3.2, 8 and 13 count?</summary>
# Nodes of a token at most; experts per node that NVLink serves in InfiniBand's time; experts of a token; experts it could have
# in that time, 12.8 rounded (§3.2.2).</details>
#
# ## Where next
#
# The modules that predict further tokens ([dsv3lib/layers/mtp.py](../dsv3lib/layers/mtp.py)) are mixtures too, with biases of
# their own. To watch a longer run: `dsv3 train --steps 400 --out runs/mine` in one terminal and `dsv3 watch runs/mine` in another.
