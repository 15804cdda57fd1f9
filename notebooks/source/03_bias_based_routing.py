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
# 1. that a mixture of experts, left alone, sends nearly everything to a few experts within a minute of training;
# 2. that one number an expert, moved by a sign after each step and never by a gradient, prevents it;
# 3. that a token's experts lie on at most four machines, and what that is worth, counted copy by copy.
#
# About 60 minutes. Paper: *DeepSeek-V3 Technical Report* (2024), §2.1.2 (Eqs. 12 to 20), §3.2.2 (traffic), §4.5.2 and §4.5.3
# (balancing compared, specialisation). You should know what an expert is (notebook 00).

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
# Eight experts in a layer, two for each token. Nobody asks for balance. We train a small DeepSeek-V3 on real text for a
# few dozen steps and look at where the tokens go. The view below draws while the model trains: blue is idle, white the
# mean, red overloaded.

# %%
import torch

from dsv3lib import DeepSeekV3, ModelConfig
from dsv3lib.training.loop.settings import TrainingConfig
from dsv3lib.training.text.data import PackedStream
from dsv3lib.training.text.folder import open_domains
from dsv3lib.training.text.tokenizer import default_tokenizer

tokenizer, (domains, _) = default_tokenizer(), open_domains()
nano = ModelConfig.preset("nano").replace(num_nextn_predict_layers=0, vocab_size=tokenizer.vocab_size)
steps = 6 if FAST else STEPS
# One thread: for a model this small a second one helps little, and sums come out the same everywhere.
recipe = TrainingConfig(steps=steps, seed=SEED, learning_rate=1e-3, ema_decay=0, validation_batches=0, threads=1)

def fresh():
    model = DeepSeekV3(nano, torch.Generator().manual_seed(SEED)).to(session.device)
    return model, PackedStream(domains, tokenizer, seq_len=128, seed=SEED), {}

# %% [markdown]
# `fresh` makes the same model and the same text at every call: whatever differs between two runs below is how they
# balance, and nothing else. Commit to a guess first.

# %%
from dsv3lib.course import measured, predict, reveal

predict(
    "routing.p1",
    "Without any balancing, how much of a layer's work do its two fullest experts (of eight) do at the end?",
    options=["about 25 %, their fair share", "about 40 %", "about 70 %", "more than 85 %"],
)

# %%
from dsv3lib.viz.expert_load import ExpertLoad

names = fresh()[1].domain_names
view = ExpertLoad.of_model(nano, names, title="No balancing")
view

# %%
from dsv3lib.course import bar
from dsv3lib.training.loop.comparison import compare


def train(way, live, **settings):
    with bar(f"training, balance {way}", total=steps) as step:
        def on_step(_way, record):
            live.add(record)
            step(note=f"loss {record['losses']['main']:.2f}, MaxVio {max(record['max_violation']):.2f}")
        outcome = compare(fresh, recipe, [way], on_step=on_step, **settings)[0]
    live.refresh(now=True)
    return outcome

runs = {"none": train("none", view)}

# %%
tail = runs["none"].tail().load.sum(0).double()
shares = (tail / tail.sum(-1, keepdim=True)).sort(descending=True).values
top_two = round(100 * float(shares[:, :2].sum(-1).mean()))
bins = [(87, "more than 85 %"), (55, "about 70 %"), (32, "about 40 %"), (0, "about 25 %, their fair share")]
reveal(
    "routing.p1", next(text for least, text in bins if top_two >= least), varies=True,
    because=f"Measured here: {top_two} %. Who gets tokens learns, who learns gets more tokens.",
)  # fmt: skip
assert FAST or top_two > 60

# %% [markdown]
# This is *routing collapse*. Most of the experts' weights are hardly trained, and on a cluster the machine with the
# popular experts keeps all others waiting.
#
# ## The symbols

# %%
v3 = ModelConfig.preset("v3-671b")
rows = [
    ("N_r", "n_routed_experts", "routed experts in a layer"),
    ("K_r", "num_experts_per_tok", "of them chosen for a token"),
    ("", "n_group", "groups; in V3 a group is a node"),
    ("M", "topk_group", "groups that a token may use"),
    ("", "routed_scaling_factor", "what the gate values sum to"),
]
print(f"{'paper':6} {'code':22} {'V3':>5} {'nano':>5}  meaning")
for symbol, name, meaning in rows:
    print(f"{symbol:6} {name:22} {getattr(v3, name):5} {getattr(nano, name):5}  {meaning}")

# %% [markdown]
# Three more have no place in the config: $s_i$ the *affinity* of a token to expert $i$, $b_i$ the expert's *bias*, and
# $\gamma$ the bias update speed (0.001 in V3, for 14.3 of its 14.8 trillion tokens, then 0).
#
# ## The idea in twenty lines
#
# $$s_i = \sigma(u^\top e_i) \qquad \text{chosen} = \text{TopK}_i(s_i + b_i) \qquad
# g_i = 2.5\,\frac{s_i}{\sum_{\text{chosen}} s_j} \qquad b_i \leftarrow b_i + \gamma\,\text{sign}(\overline{\text{load}} - \text{load}_i)$$
#
# The bias decides *who* works. It has no part in *how much* each counts. And before the choice, all but $M$ groups are
# shut out: a group is as good as the sum of its two best.

# %%
def route_by_hand(s, b, c):
    """Choice and gate values of each row of affinities s [tokens, experts]."""
    steered = s + b
    groups = steered.unflatten(-1, (c.n_group, -1))
    quality = groups.topk(2, dim=-1).values.sum(-1)
    kept = quality.topk(c.topk_group, dim=-1).indices
    shut = torch.ones_like(quality, dtype=torch.bool).scatter(-1, kept, False)
    steered = groups.masked_fill(shut[..., None], -torch.inf).flatten(-2)  # not 0: see "Break it"
    chosen = steered.topk(c.num_experts_per_tok, dim=-1).indices
    g = s.gather(-1, chosen)  # the bias is not in here
    return chosen, c.routed_scaling_factor * g / g.sum(-1, keepdim=True)

def update_by_hand(b, load, gamma):
    return b + gamma * torch.sign(load.double().mean() - load).float()

# %% [markdown]
# ## The real thing
#
# The library's router is [dsv3lib/layers/router.py](../dsv3lib/layers/router.py), the update
# [dsv3lib/training/loop/balance.py](../dsv3lib/training/loop/balance.py). Same tokens, same choice, same numbers, at V3's own sizes:

# %%
from dsv3lib.layers.router import route
from dsv3lib.training.loop.balance import max_violation, update_bias

s = torch.rand(500, v3.n_routed_experts, generator=session.generator)
b = torch.randn(v3.n_routed_experts, generator=session.generator) * 0.2
mine, theirs = route_by_hand(s, b, v3), route(s, b, v3)
assert torch.equal(mine[0], theirs[0]) and torch.allclose(mine[1], theirs[1])
load = torch.bincount(theirs[0].flatten(), minlength=v3.n_routed_experts)
moved = b.clone()
update_bias(moved, load, 0.001)
assert torch.equal(moved, update_by_hand(b, load, 0.001))
print("tokens x 8 visits:", load.sum().item(), "=", 500 * 8, "· every token's gates sum to", round(theirs[1].sum(-1).mean().item(), 4))
print("groups that a token uses, at most:", max(len(set((row // 32).tolist())) for row in theirs[0]))

# %% [markdown]
# Loads sum to tokens × K, always: there is no capacity, and no token is dropped, in training or after.
#
# How unbalanced is a layer? The measure of loss-free balancing is **MaxVio** $= \max_i \text{load}_i / \overline{\text{load}} - 1$. In
# one *batch* it says how long the slowest machine keeps the others waiting; over *many* batches (global) whether some expert is
# hardly trained.

# %%
predict(
    "routing.p2",
    "Now with the bias, γ = 0.01, from the same weights on the same text. Without it, MaxVio ended near its worst value, 3. "
    "Where does the global MaxVio of the last quarter end?",
    options=["above 2", "between 1 and 2", "between 0.5 and 1", "below 0.5"],
)

# %%
with_bias = ExpertLoad.of_model(nano, names, title="Balanced by the bias")
with_bias

# %%
runs["bias"] = train("bias", with_bias, speed=0.01)
worst = float(runs["bias"].tail().global_violation().mean())
bins = [(2, "above 2"), (1, "between 1 and 2"), (0.5, "between 0.5 and 1"), (0, "below 0.5")]
reveal(
    "routing.p2", next(text for least, text in bins if worst >= least), varies=True,
    because=f"Measured: {worst:.2f}, against {runs['none'].tail().global_violation().mean():.2f} without the bias.",
)  # fmt: skip
assert torch.equal(runs["none"].load[0], runs["bias"].load[0])  # the same start
assert FAST or worst < 0.5 * float(runs["none"].tail().global_violation().mean())

# %% [markdown]
# ## The figure to remember

# %%
from dsv3lib.viz import style
from dsv3lib.viz.expert_load import heat_map
from dsv3lib.viz.load_history import relative

figure, axes = style.figure("One number an expert, moved by a sign, keeps all of them at work", None, None, columns=3, size=(10.5, 3.4))
for ax, way, title in zip(axes, ("none", "bias"), ("no balancing", "with the bias"), strict=False):
    heat_map(ax, relative(runs[way].tail().load.sum(0).numpy()), ["layer 1", "layer 2"], nano.n_group)
    ax.set_title(f"{title}, last quarter", fontsize=11, fontweight="normal")
for way, meaning in (("none", "neutral"), ("bias", "bias")):
    axes[2].plot(range(1, steps + 1), runs[way].batch_violation.mean(1), **style.line(meaning) | {"marker": "", "linestyle": "-"}, label=way)
axes[2].set(xlabel="training step", ylabel="MaxVio of each batch", ylim=(0, None))
axes[2].legend()
style.show(figure, "Two heat maps of experts: without balancing a few are dark red and most blue, with the bias all are pale. "
           "MaxVio climbs to its worst value without the bias and is held down with it.")  # fmt: skip

# %% [markdown]
# Batch by batch, MaxVio still jumps: γ pushes by a fixed step, and in a run this short it must be large (0.01, ten times V3's).
# Over the last quarter as a whole, the experts are level.
#
# Look into the run: move the step, choose a layer (or click on its row), choose a text domain. The bias curves fan out, then run level: each has
# found the height at which its expert gets its share.

# %%
with_bias

# %% [markdown]
# The same view follows a run in another process: `dsv3 watch runs/tiny`. It attaches to other people's models
# (`ExpertLoad.attach(model)`), and it can be saved as one page that needs no Python at all:

# %%
import tempfile
from pathlib import Path

with tempfile.TemporaryDirectory() as folder:
    page = with_bias.save_page(Path(folder) / "load.html").read_text()
print("a whole page:", page.startswith("<!doctype html>"), "· asks the network for nothing:", "http" not in page)

# %% [markdown]
# ## Break it
#
# **The bias in the gate value.** Then it would not only choose, it would scale. Take real affinities from the model that
# collapsed, find the bias that balances them, and compare the gate values.

# %%
@torch.no_grad()
def affinities(model, layer=0, rows=24):
    """Router logits of real text, token by token."""
    gate, found = model.routers()[layer], []
    hook = gate.register_forward_pre_hook(lambda _m, inputs: found.append(inputs[0] @ gate.weight.T))
    for name in names:
        for batch in fresh()[1].validation_batches(name, 1, rows, seq_len=64):
            model(batch.input_ids.to(session.device))
    hook.remove()
    logits = torch.cat(found).cpu()
    return logits[torch.randperm(len(logits), generator=torch.Generator().manual_seed(SEED))]

logits = affinities(runs["none"].model)
print("routers asked; every affinity is a probability:", bool(((logits.sigmoid() > 0) & (logits.sigmoid() < 1)).all()))

# %%
def balance_frozen(scores, gamma, updates=400, batch=512):
    """Update the bias on frozen affinities; returns bias and MaxVio of each batch."""
    b, violations = torch.zeros(scores.shape[-1]), []
    for i in range(updates):
        rows = scores[torch.arange(i * batch, (i + 1) * batch) % len(scores)]
        load = torch.bincount(route(rows, b, nano)[0].flatten(), minlength=len(b))
        violations.append(float(max_violation(load)))
        update_bias(b, load, gamma)
    return b, torch.tensor(violations)

b, _ = balance_frozen(logits.sigmoid(), gamma=0.001)
chosen, gates = route(logits.sigmoid(), b, nano)
leaked = (logits.sigmoid() + b).gather(-1, chosen)
change = (2.5 * leaked / leaked.sum(-1, keepdim=True) - gates).abs().mean() / gates.mean()
measured(f"With the bias inside, gate values are off by {100 * change:.0f} % on average: another model, at every update of b.")
assert change > 0.01

# %% [markdown]
# **A mask of 0.** The groups that are shut out get −∞. Zero looks harmless, because affinities are positive. But biased ones
# need not be: lower all biases by one, which changes no order, and count the tokens that slip into a forbidden group.

# %%
def masked_with(value, steered, c=nano):
    groups = steered.unflatten(-1, (c.n_group, -1))
    quality = groups.topk(2, dim=-1).values.sum(-1)
    kept = quality.topk(c.topk_group, dim=-1).indices
    shut = torch.ones_like(quality, dtype=torch.bool).scatter(-1, kept, False)
    chosen = groups.masked_fill(shut[..., None], value).flatten(-2).topk(c.num_experts_per_tok, dim=-1).indices
    forbidden = shut.gather(-1, chosen // (c.n_routed_experts // c.n_group))
    return round(100 * float(forbidden.any(-1).double().mean()))

s = torch.rand(1000, 8, generator=session.generator)
for shift in (0.0, -1.0):
    print(f"biases at {shift:4}: tokens in a forbidden group: mask -inf {masked_with(-torch.inf, s + shift)} %, mask 0 {masked_with(0.0, s + shift)} %")
assert masked_with(-torch.inf, s - 1) == 0 and masked_with(0.0, s - 1) == 100

# %% [markdown]
# **γ too large.** The affinities of the balanced model, frozen; its bias taken away and found again, with steps of three sizes.

# %%
balanced = affinities(runs["bias"].model).sigmoid()
trials = {f"γ = {gamma}": balance_frozen(balanced, gamma)[1] for gamma in (0.001, 0.01, 0.1, 0)}
figure, ax = style.figure("A small step settles, a large one swings for ever", "update of the bias", "MaxVio of the batch")
looks = ("bias", "rope", "backward-input", "neutral")
for (label, violations), meaning in zip(trials.items(), looks, strict=True):
    ax.plot(violations, **style.line(meaning) | {"marker": "", "linestyle": "-", "linewidth": 1.2}, label=label)
ax.set_ylim(0, 3.6)
ax.legend(ncols=4, loc="upper center")
style.show(figure, "Four curves: with the smallest step MaxVio falls slowly and stays low; larger steps fall fast and then swing, the wider the larger; without a step it stays high.")
final = {label: float(violations[-100:].mean()) for label, violations in trials.items()}
assert final["γ = 0.001"] < final["γ = 0.1"] and final["γ = 0.001"] < final["γ = 0"]
measured(" · ".join(f"{label}: {value:.2f}" for label, value in final.items()) + " (MaxVio, mean of the last 100 updates)")

# %% [markdown]
# The bias can place an expert no finer than γ. When γ is larger than the differences between tokens, an expert is chosen by
# all or by none.
#
# **A softmax** in place of the sigmoid. Its values sum to one, so that with V3's 256 experts they lie near 0.004, and differ by less.
# A step of γ = 0.001 that is small for a sigmoid is then a large one. Made-up affinities, some experts more popular than others:

# %%
def settle(gate, gamma=0.001, updates=120, batch=512):
    draw, b, last = torch.Generator().manual_seed(SEED), torch.zeros(v3.n_routed_experts), []
    popular = 0.5 * torch.randn(v3.n_routed_experts, generator=draw)
    for _ in range(updates):
        s = gate(torch.randn(batch, v3.n_routed_experts, generator=draw) + popular)
        load = torch.bincount(route(s, b, v3)[0].flatten(), minlength=v3.n_routed_experts)
        last.append(float(max_violation(load)))
        update_bias(b, load, gamma)
    return sum(last[-20:]) / 20

found = {"sigmoid": settle(torch.sigmoid), "softmax": settle(lambda x: x.softmax(-1))}
measured(f"MaxVio of a batch in the end: sigmoid {found['sigmoid']:.2f}, softmax {found['softmax']:.2f}")
assert found["softmax"] > found["sigmoid"]

# %% [markdown]
# ## On trial
#
# **"3.2 experts per token."** Count it. Route tokens as V3 does, lay its 256 experts on 8 nodes, and count every copy that
# crosses a wire ([dsv3lib/layers/traffic.py](../dsv3lib/layers/traffic.py)).

# %%
from dsv3lib.parallel.traffic import Cluster, count_traffic


def traffic_of(config, tokens=2000, gpus=32):
    scores = torch.rand(tokens, config.n_routed_experts, generator=torch.Generator().manual_seed(SEED))
    indices = route(scores, torch.zeros(config.n_routed_experts), config)[0]
    return count_traffic(indices, Cluster.of(config, gpus))

traffic = traffic_of(v3)
copies, visits = int(traffic.infiniband.sum()) / 2000, int(traffic.visits.sum()) / 2000
print(f"experts a token: {visits:.0f} · nodes a token: {copies:.1f}, at most {int(traffic.nodes_per_token.max())} · dropped: {traffic.dropped}")
print(f"InfiniBand carries {copies:.1f} copies of a token, not {visits:.0f}: one for each node")
everywhere = traffic_of(v3.replace(topk_group=8))
print(f"without the limit: {int(everywhere.infiniband.sum()) / 2000:.1f} nodes a token, at most {int(everywhere.nodes_per_token.max())}")

# %%
predict(
    "routing.p3",
    "NVLink inside a node is 3.2 times as fast as InfiniBand between nodes (160 against 50 GB/s). To how many experts could a "
    "token go, on its 4 nodes, at the price of InfiniBand's 4 copies?",
    number=(1, 64, "experts"),
)

# %%
for k in range(8, 16):
    counted = traffic_of(v3.replace(num_experts_per_tok=k))
    print(f"{k:2} experts: InfiniBand {int(counted.infiniband.sum()) / 2000:.2f} copies, NVLink {int(counted.nvlink.sum()) / 2000:.0f},"
          f" NVLink hidden behind it: {counted.nvlink_is_hidden()}")  # fmt: skip
bound = 160 / 50 * int(counted.infiniband.sum()) / 2000
print(f"bound: 3.2 x {int(counted.infiniband.sum()) / 2000:.0f} nodes = {bound:.1f}, or {round(bound)}")
reveal("routing.p3", round(bound), unit="experts", because="4 nodes × 3.2; V3 uses 8 of them.", close=0.05)
assert round(bound) == 13

# %% [markdown]
# Refuted: 3.2 is experts *per node*, an allowance of bandwidth. A token visits 8, and could visit 13 at the same price (the
# paper's rounding of 12.8).
#
# **"The sigmoid balances the load."** The run that collapsed had a sigmoid. So had the other one.

# %%
for way in ("none", "bias"):
    summary = runs[way].summary()
    measured(f"sigmoid, balance {way}: MaxVio a batch {summary['batch_violation']:.2f}, global {summary['global_violation']:.2f}, "
             f"entropy {summary['entropy']:.2f} of 1")  # fmt: skip
x = torch.randn(20, nano.hidden_size)
for way in ("none", "bias"):
    gates = runs[way].model.cpu().routers()
    print(way, "scores by a sigmoid:", all(torch.allclose(g.scores(x), torch.sigmoid(x @ g.weight.T)) for g in gates))

# %% [markdown]
# **"The bias is trained by gradient."** It is no parameter, the gate values do not depend on it, and from γ and the logged loads
# alone it can be worked out to the bit.

# %%
model = runs["bias"].model
router = model.routers()[0]
print("among the parameters:", any(p is router.e_score_correction_bias for p in model.parameters()))
b = torch.zeros(8, requires_grad=True)
_, gates = route(torch.rand(50, 8), b, nano)
print("a gradient path from gate values to bias:", gates.requires_grad)
replayed = torch.from_numpy(with_bias.history.bias[-1])
print("replayed from the loads, equal to the bit:", torch.equal(replayed, torch.stack([r.e_score_correction_bias.cpu() for r in model.routers()])))

# %% [markdown]
# **"Auxiliary losses are harmless."** The older way to balance is a term in the loss, over each sequence or over the whole batch. It
# does balance. Train both, all else equal ([dsv3lib/training/loop/comparison.py](../dsv3lib/training/loop/comparison.py); in a terminal:
# `dsv3 train --steps 300 --balance none sequence batch bias`).

# %%
for way in ("sequence", "batch"):
    runs[way] = train(way, ExpertLoad.of_model(nano, names), alpha=0.02)
for way in ("none", "sequence", "batch", "bias"):
    summary = runs[way].summary()
    measured(f"**{way}**: " + " · ".join(f"{k.replace('_', ' ')} {v:.2f}" for k, v in summary.items() if v == v))

# %% [markdown]
# In so short a run the loss cannot tell them apart. What can be seen is the *pull*: the auxiliary loss sends a gradient into the
# router and the layers below, and that gradient does not want what the language model wants. Measure both, and the angle between
# them, on the router that collapsed, where balancing has most to do.

# %%
def pulls(model, alpha, rows=8):
    """Gradients on all parameters: of the language model's loss, and of the auxiliary loss alone."""
    model.aux_loss_alpha = alpha
    ids = fresh()[1].next_batch(rows).input_ids.to(session.device)
    losses = model(ids, labels=ids).losses
    shared = [p for name, p in model.named_parameters() if "gate.weight" in name]
    both = [torch.autograd.grad(losses[name], shared, retain_graph=True) for name in ("main", "balance")]
    return [torch.cat([g.flatten() for g in grads]) for grads in both]

main, balance = pulls(runs["none"].model, alpha=0.02)
cosine = float(torch.cosine_similarity(main, balance, dim=0))
measured(f"On the routers the auxiliary gradient is {float(balance.norm() / main.norm()):.1f} times as long as the language "
         f"model's; the cosine between them is {cosine:.2f}.")  # fmt: skip
print("the auxiliary loss pulls on the same weights:", bool(balance.norm() > 0), "· in the same direction:", cosine > 0.5)
assert cosine < 0.5

# %% [markdown]
# Refuted in kind: it is a second aim for the same weights, and α is a compromise between them. By how much it hurts, only a long run
# tells. The paper's: validation loss of a 1B model 2.258 with the sequence-wise loss, 2.253 without it and 2.253 batch-wise; of a
# 3B model 2.085, 2.080 and 2.080 (§4.5.3). The bias has no such pull. V3 keeps a sequence-wise loss with α = 0.0001 beside
# it, only against extremes within one sequence.
#
# ## Who works for which text?
#
# Balanced does not mean alike. Give the trained model documents of the seven domains and count. But any table of counts shows some
# pattern: is this one more than chance? Shuffle the domains' names among the *documents* a thousand times and see how much
# pattern chance makes.

# %%
from dsv3lib.training.loop.balance import domain_load
from dsv3lib.training.loop.specialisation import specialisation_test


@torch.no_grad()
def document_loads(model, rows=32):
    loads, domain = [], []
    for d, name in enumerate(names):
        for batch in fresh()[1].validation_batches(name, 1, rows, seq_len=64):
            out, ids = model(batch.input_ids.to(session.device)), batch.document_ids
            found = domain_load(out.expert_indices, ids, int(ids.max()) + 1, nano.n_routed_experts)
            loads.append(found)
            domain += [d] * len(found)
    return torch.cat(loads), torch.tensor(domain)

loads, domain = document_loads(runs["bias"].model)
measured(f"{len(domain)} documents, {len(set(domain.tolist()))} domains")

# %%
test = specialisation_test(loads, domain, 99 if FAST else 999, torch.Generator().manual_seed(SEED))
by_domain = torch.stack([loads[domain == d].sum(0) for d in range(len(names))])
figure, axes = style.figure("Experts take to texts, beyond chance", None, None, columns=2, size=(10.5, 3.6), width_ratios=[3, 2])
heat_map(axes[0], relative(by_domain[:, 1].numpy()), names, nano.n_group)
axes[0].set_title("layer 2: load / the domain's mean", fontsize=11, fontweight="normal")
axes[1].hist(test.by_chance[:, 1].numpy(), bins=30, **style.bar("communication"), label="names shuffled")
axes[1].axvline(float(test.bits[1]), color=style.colour("bias"), linewidth=2.5, label="as it is")
axes[1].set(xlabel="what the domain tells of the expert (bits)", ylabel="shuffles")
axes[1].legend()
style.show(figure, "A heat map of seven domains by eight experts with a different pattern in each row, and a histogram of what "
           "shuffled names give, far to the left of the line that marks the real order.")  # fmt: skip
for layer, (bits, p) in enumerate(zip(test.bits, test.p_value, strict=True), start=1):
    measured(f"layer {layer}: {bits:.3f} bits, by chance {test.by_chance[:, layer - 1].mean():.3f}; p = {p:.3f}")
assert FAST or float(test.p_value.min()) < 0.05

# %% [markdown]
# The p-value is the share of shuffles that came to as much. Documents are shuffled and not tokens, since the tokens of one document
# resemble each other; a test on tokens would find specialisation everywhere.
#
# ## At scale
#
# On a cluster the choice becomes traffic: dispatch in FP8, combine in BF16, 58 layers, every step. The limit of four nodes and the one
# copy for each node are what make it payable.

# %%
from dsv3lib.course import at_scale

gpus = traffic_of(v3, gpus=8)
naive = int(gpus.visits.sum()) / int(gpus.infiniband.sum())
per_token = gpus.dispatch_bytes(v3.hidden_size) / 2000, gpus.combine_bytes(v3.hidden_size) / 2000
print(f"a token and layer: {per_token[0] / 1024:.1f} KiB out (FP8 with scales), {per_token[1] / 1024:.1f} KiB back (BF16)")
print(f"a copy for each expert instead of each node would be {naive:.1f} times that")
measurements = ("gate", "permute", "grouped_gemm", "grouped_gemm_fp8")
at_scale("gate training", "permute bf16", "grouped_gemm forward", operations=measurements)

# %% [markdown]
# Routing itself is a small part of a step, but written in PyTorch it is a dozen launches that each cross memory. On a GPU the
# gate is one: scores, bias, groups, choice and weights of a token never leave the registers
# ([gate_kernel.py](../dsv3lib/kernels/moe/gate_kernel.py)). The rows then go to their experts by counting, without asking the host how
# many went where ([permutation.py](../dsv3lib/kernels/moe/permutation.py)), and all experts are one product
# ([grouped_gemm.py](../dsv3lib/kernels/matmul/grouped_gemm.py)). The cell compiled them for Hopper just now; the CPU form that you
# trained with is what they are held against.
#
# ## Exercises

# %%
from dsv3lib.course import check, exercise

exercise("routing.1")

# %%
def choose(scores, bias, k, scale):
    ...


check("routing.1", choose)

# %%
exercise("routing.2")

# %%
def update(bias, load, gamma):
    ...


check("routing.2", update)

# %%
exercise("routing.3")

# %%
def nodes_used(indices, experts, nodes):
    ...


check("routing.3", nodes_used)

# %%
exercise("routing.4")

# %%
def max_experts(nodes, nvlink, infiniband):
    ...


check("routing.4", max_experts)

# %%
from dsv3lib.course import progress

progress()

# %% [markdown]
# ## What can go wrong
#
# - *The load runs away in spite of the bias.* The sign of the update is the wrong way round, or γ is 0. A negative γ is refused.
# - *MaxVio swings from step to step.* γ is too large for the spread of the affinities.
# - *The bias does not move after `model.bfloat16()`.* Steps of 0.001 vanish in BF16 near 1; the buffer must stay FP32.
# - *Load counted twice.* Activation checkpointing runs layers again in backward; count in the forward pass alone.
#
# ## Do you recall?
#
# <details><summary>Where does the bias act, and where not?</summary>
# In the choice of experts (and of groups). Not in the gate values, not in the loss, not in any gradient.</details>
#
# <details><summary>Why the sign, and not the size of the violation?</summary>
# One flooded expert must not shake the layer: every step has the same size, and γ bounds how fast anything can change.</details>
#
# <details><summary>What do 4, 3.2, 8 and 13 count?</summary>
# Nodes of a token at most; experts per node that NVLink serves for free; experts of a token; experts it could have at the same
# price.</details>
#
# ## Where next
#
# The modules that predict further tokens ([dsv3lib/layers/mtp.py](../dsv3lib/layers/mtp.py)) are mixtures too, with biases of
# their own. To watch a longer run: `dsv3 train --steps 400 --out runs/mine` in one terminal and `dsv3 watch runs/mine` in another.
