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
# # 02 · The position travels beside the latent
#
# **You will have shown**
#
# 1. **that a turned query and a turned key see nothing of their places but the distance**; <!-- claim: relative -->
# 2. **that a turn cannot pass through the latent: every distance would need a matrix of its own**; <!-- claim: wall -->
# 3. **that a few dimensions beside the latent are enough to carry the position**. <!-- claim: enough -->
#
# About 70 minutes. Paper: *DeepSeek-V3 Technical Report* (2024), §2.1.1, Equations 3, 4, 8 and 10. The idea is called
# *decoupled rotary position embedding*.

# %% tags=["parameters"]
STEPS = 120  # of the two small trainings
SEED = 1234
DEVICE = "auto"  # or "cpu", "cuda"
FAST = False  # True: fewer steps

# %%
import torch

from dsv3lib import DeepSeekV3, LatentCache, ModelConfig
from dsv3lib.course import check, exercise, measured, predict, reveal, setup, symbols, table
from dsv3lib.viz import rotary as figures
from dsv3lib.viz import style
from dsv3lib.viz.live import live

session = setup(seed=SEED, notebook="02_decoupled_rope", device=DEVICE)
v3, tiny = ModelConfig.preset("v3-671b"), ModelConfig.preset("tiny")
draw = session.generator

# %% [markdown]
# ## A bag of words
#
# *Dog bites man* and *man bites dog* have the same words. Attention compares a query with every key and mixes the values; a
# sum does not know in which order its terms came. Here is one layer of an untrained `tiny` with the content of its queries
# and keys alone. It reads some tokens, and then the same tokens shuffled, with the last one left in its place.

# %%
predict(
    "rope.p1",
    "All tokens but the last are shuffled. How does the output at the last token change?",
    options=["not at all", "a little", "it is another vector altogether"],
)

# %%
layer = DeepSeekV3(tiny, draw).model.layers[0].self_attn.double()
d_c, d_h = tiny.kv_lora_rank, tiny.qk_nope_head_dim
d_r, heads = tiny.qk_rope_head_dim, tiny.num_attention_heads
W_DKV, W_KR = layer.kv_a_proj_with_mqa.weight.detach().split([d_c, d_r])
W_UK, W_UV = layer.kv_b_proj.weight.detach().unflatten(0, (heads, -1)).split([d_h, d_h], 1)
W_DQ = layer.q_a_proj.weight.detach()
W_UQ, W_QR = layer.q_b_proj.weight.detach().unflatten(0, (heads, -1)).split([d_h, d_r], 1)


def norm(c):
    return c * (c.square().mean(-1, keepdim=True) + tiny.rms_norm_eps).rsqrt()


h = torch.randn(48, tiny.hidden_size, generator=draw, dtype=torch.float64)
c, q = norm(h @ W_DKV.T), torch.einsum("tc,hnc->thn", norm(h @ W_DQ.T), W_UQ)


# %%
def last_output(order):
    """Every head's output at the last token, from content alone: [heads, value]."""
    k = torch.einsum("sc,hnc->hsn", c[order], W_UK)
    v = torch.einsum("sc,hvc->hsv", c[order], W_UV)
    p = (torch.einsum("hn,hsn->hs", q[-1], k) * d_h**-0.5).softmax(-1)
    return torch.einsum("hs,hsv->hv", p, v)


shuffled = torch.cat([torch.randperm(47, generator=draw), torch.tensor([47])])
change = (last_output(shuffled) - last_output(torch.arange(48))).abs().max()
assert change < 1e-12
reveal(
    "rope.p1", "not at all", because="Content is compared with content: the order is lost."
)

# %% [markdown]
# So the position has to be written into queries and keys. Most models turn them: that is **RoPE**, rotary position
# embedding. MLA cannot do that to the keys that it makes from its latent; this notebook shows why, and what V3 does instead.
#
# ## The mechanism
#
# A token leaves two things in the cache: its latent, which says nothing of where it stands, and *one* short key, which is
# turned by its position and which all heads share. Below is the fourth token of our text with its real numbers; how the
# turning works comes next.

# %%
from dsv3lib.layers.rope import RotaryEmbedding, apply_rope

key = h @ W_KR.T  # not turned yet: [tokens, d_h^R]
turns = RotaryEmbedding(tiny).table(48, h)
after = apply_rope(key, turns)
style.show(
    *figures.decoupled_path(c[3, :3].tolist(), key[3, :4].tolist(), after[3, :4].tolist(), 3)
)

# %% [markdown]
# These are the letters, with their sizes in V3 and in `tiny`.

# %%
symbols(
    *("d", "n_h", "d_h", "d_h^R", "d_c"),
    ("c_t^{KV}", "c", "[d_c]", "the latent of token t, cached"),
    (
        "k_t^R",
        "after",
        "[d_h^R]",
        "the rotary key of token t, turned, cached, one for all heads",
    ),
    ("q_{t,i}^R", "q_rope", "[d_h^R]", "the rotary query of head i, turned"),
    ("W^{KR}", "W_KR", "[d_h^R, d]", "makes the rotary key from h"),
    ("W_i^{UK}", "W_UK", "[d_h, d_c]", "makes head i's content key from the latent"),
    ("R_t", "rotate", "", "the turn that belongs to position t"),
)

# %% [markdown]
# ## Turn it yourself
#
# Two numbers are a point in a plane. Turning it by an angle $\varphi$ keeps its length:
#
# $$(a, b) \;\to\; (a\cos\varphi - b\sin\varphi,\; a\sin\varphi + b\cos\varphi)$$
#
# A vector of $d_h^R$ numbers is a row of such points. V3 takes neighbours as pairs.

# %%
exercise("rope.1")


# %%
def rotate(x, angles): ...


rotate = check("rope.1", rotate)

# %% [markdown]
# Pair $i$ of position $t$ is turned by the angle $t\,\theta^{-2i/R}$, with $\theta$ = `rope_theta` and $R$ dimensions in all.
# The first pair is fast, the last is slow, like the hands of a clock: one tells near places apart, the other far ones.


# %%
def speeds(R, theta=10_000.0):
    """Radians a token, for each pair of R dimensions."""
    return theta ** (-torch.arange(0, R, 2, dtype=torch.float64) / R)


def at(x, positions):
    """RoPE(x) at these positions (Eqs. 3 and 8)."""
    return rotate(
        x, torch.as_tensor(positions, dtype=torch.float64)[..., None] * speeds(x.shape[-1])
    )


numbers = (0, 8, 16, 24, 31)
slow = [f"{round(figures.wavelength(v3.qk_rope_head_dim, n)):,}" for n in numbers]
table(["pair of V3's 32", *map(str, numbers)], [["tokens for one turn", *slow]])

# %%
def draw_pair(position, pair):
    return figures.rotation(position, pair, d_r)


live(
    draw_pair,
    position=figures.POSITIONS,
    pair=range(d_r // 2),
    start={"position": 5, "pair": 1},
)

# %% [markdown]
# What is it good for? Take one query and one key, put them at two places, and compare. Then move both by the same way.

# %%
predict(
    "rope.p2",
    "A query at 5 and a key at 2 have some score. Both are moved 100,000 tokens on. "
    "What happens to the score?",
    options=["it stays the same", "it gets smaller", "it changes in an irregular way"],
)

# %% tags=["claim:relative"]
query, key_of_one = torch.randn(2, v3.qk_rope_head_dim, generator=draw, dtype=torch.float64)


def score(t, j):
    return (at(query, t) @ at(key_of_one, j)).item()


places = [(5, 2), (105, 102), (100_005, 100_002), (5, 3), (2, 5)]
rows = [[f"{t:,} and {j:,}", round(score(t, j), 6)] for t, j in places]
table(["query at, key at", "score"], rows)
same = [score(t, j) for t, j in places[:3]]
assert max(same) - min(same) < 1e-6
assert all(abs(score(t, j) - same[0]) > 1e-2 for t, j in places[3:])
reveal(
    "rope.p2",
    "it stays the same",
    because="Turning both by the same angle changes no angle between them.",
)

# %% [markdown]
# **A turned query and a turned key see their distance, and nothing else of where they are.** <!-- claim: relative --> In
# letters: $R_t^\top R_j = R_{j-t}$, so that $(R_t\mathbf q)^\top(R_j\mathbf k) = \mathbf q^\top R_{j-t}\,\mathbf k$. The order
# matters too: with query and key exchanged the score is another one.
#
# ## The wall
#
# [01](01_mla_latent_cache.ipynb) moved the matrix $W^{UK}$ from the cached latents to the query: $\mathbf q^\top(W^{UK}\mathbf
# c_j) = (W^{UK\top}\mathbf q)^\top\mathbf c_j$. Now let the content keys be turned, as most models do it:
#
# $$(R_t\,\mathbf q)^\top R_j\,W^{UK}\mathbf c_j = \mathbf q^\top R_{j-t}\,W^{UK}\,\mathbf c_j$$
#
# A turn and a matrix do not commute: $R\,W \neq W R$. So the turn stays where it is, between the query and $W^{UK}$, and it is
# another one for each cached token. Write down the matrix that would be needed.

# %%
exercise("rope.2")


# %%
def matrix_for_distance(w_uk, frequencies, distance): ...


matrix_for_distance = check("rope.2", matrix_for_distance)

# %%
predict(
    "rope.p3",
    "Absorb with one matrix for all distances, that of distance 0. Where is the score right?",
    options=["at all", "at 0 alone", "at small ones, nearly"],
)

# %% tags=["claim:wall"]
frequencies, w, query = speeds(d_h), W_UK[0], q[-1, 0]
rows = []
for distance in (0, 1, 2, 8, 32):
    true = torch.stack([at(query, 40 + distance) @ at(w @ one, 40) for one in c])
    own = (query @ matrix_for_distance(w, frequencies, distance)) @ c.T
    once = (query @ w) @ c.T
    off = [((guess - true).norm() / true.norm()).item() for guess in (own, once)]
    rows.append([distance, *(f"{100 * one:.0f} %" for one in off)])
    assert off[0] < 1e-9 and (off[1] < 1e-9 if distance == 0 else off[1] > 0.2)
table(["distance", "its own matrix is off by", "that of distance 0 by"], rows)
reveal(
    "rope.p3",
    "at 0 alone",
    because="One step away the fastest pair has turned by a whole radian.",
)

# %% [markdown]
# **Each distance needs a matrix of its own, and none of them can be applied to the query in advance.** <!-- claim: wall -->
# What would it take to keep them all for V3's longest context?

# %% tags=["claim:keep_all"]
distances, one_layer = 131_072, v3.num_attention_heads * v3.qk_nope_head_dim * v3.kv_lora_rank
whole = distances * one_layer * 2
print(f"{distances:,} distances: {whole / 1e12:.1f} TB for one layer")
some = [matrix_for_distance(w, frequencies, n).flatten() for n in range(0, distances, 500)]
rank = int(torch.linalg.matrix_rank(torch.stack(some)))
print(f"{len(some)} of these matrices are mixtures of {rank}")
assert round(whole / 1e12, 1) == 2.2 and rank == d_h

# %% [markdown]
# They are mixtures of only $d_h$ matrices, a cosine and a sine for each pair. That does not help either: to mix them anew for
# every cached token takes a product of $d_h$ numbers with the latent for each head, which is what unpacking the key costs.
# <!-- claim: keep_all -->
#
# ## The way out
#
# V3 leaves the content alone and gives each query $d_h^R$ further numbers, and each token *one* further key (Eqs. 3, 4, 8).
# Only these are turned. A score is the sum of two products, and in each of them every matrix is where it should be:
#
# $$\mathbf q_{t,i}^\top\mathbf k_{j,i} = \underbrace{(W_i^{UK\top}\mathbf q^C_{t,i})^\top\mathbf c_j}_{\text{content, absorbed}} +
# \underbrace{\mathbf q^{R\,\top}_{t,i}\,\mathbf k^R_j}_{\text{position}}$$

# %%
t = torch.arange(48)
k_rope = at(h @ W_KR.T, t)  # cached
asked = torch.einsum("tc,hrc->htr", norm(h @ W_DQ.T), W_QR)
q_rope = at(asked, t).transpose(0, 1)


def scores(position):
    """All heads' scores of one query, with nothing unpacked: [heads, tokens]."""
    content = torch.einsum("hn,hnc->hc", q[position], W_UK) @ c.T
    return content + q_rope[position] @ k_rope.T


unpacked = torch.einsum("sc,hnc->hsn", c, W_UK)
whole_keys = torch.cat([unpacked, k_rope.expand(heads, -1, -1)], -1)
whole_query = torch.cat([q[-1], q_rope[-1]], -1)
torch.testing.assert_close(scores(-1), torch.einsum("hn,hsn->hs", whole_query, whole_keys))
print(f"a token leaves {c.shape[-1]} + {k_rope.shape[-1]} numbers; no key was made")

# %% [markdown]
# The key is shared, for it is cached: with one for each head the cache would grow by heads, as *Break it* shows below. The
# queries are not cached, so each head has its own way of asking.
#
# ## The real thing
#
# The same stands in [dsv3lib/layers/rope.py](../dsv3lib/layers/rope.py). It reads a pair as one complex number, so that a turn
# is one multiplication, and it computes the angles in FP64.

# %%
torch.testing.assert_close(apply_rope(h @ W_KR.T, turns), k_rope)
torch.testing.assert_close(torch.view_as_real(turns)[7, :, 0], (7 * speeds(d_r)).cos())
far = 163_839
off = (torch.tensor(far) * speeds(d_r).float())[1] - far * speeds(d_r)[1]
print(f"in FP32 the angle of pair 1 at {far:,} is off by {off.abs():.4f} rad")
print("yours equals the library's")

# %% [markdown]
# ## Pairs or halves
#
# Which numbers are a pair? V3's checkpoint takes neighbours. Many programs take the first number with the first of the second
# half, which is easier to write with two slices. Whoever moves a checkpoint from one to the other has to move numbers.

# %%
exercise("rope.3")


# %%
def to_split_halves(x): ...


to_split_halves = check("rope.3", to_split_halves)

# %% tags=["claim:layouts"]
from dsv3lib.layers.rope_layouts import apply_rope_to_halves, to_pairs

raw_q, raw_k = torch.randn(2, 48, d_r, generator=draw, dtype=torch.float64)
pairs_q, pairs_k = apply_rope(raw_q, turns), apply_rope(raw_k, turns)
halves_q, halves_k = (apply_rope_to_halves(to_split_halves(x), turns) for x in (raw_q, raw_k))
torch.testing.assert_close(to_pairs(halves_k), pairs_k)  # and back
torch.testing.assert_close(halves_q @ halves_k.T, pairs_q @ pairs_k.T)
moved = (halves_k != pairs_k).double().mean().item()
wrong = ((pairs_q @ halves_k.T) - pairs_q @ pairs_k.T).norm() / (pairs_q @ pairs_k.T).norm()
print(f"cached numbers that differ: {100 * moved:.0f} %; scores that differ: none")
print(f"a query of one layout on keys of the other: off by {100 * wrong:.0f} %")
assert moved > 0.8 and wrong > 0.5

# %% [markdown]
# **Both layouts give the same scores from different bytes in the cache.** <!-- claim: layouts --> So a mistake does not show
# where a program is used with its own cache, and ruins everything where a cache or a checkpoint comes from elsewhere. The
# library converts at the checkpoint's edge, once (`rope_interleave` in `config.json`).
#
# ## How many dimensions does it take?
#
# V3 turns a third of a head's query and key. (That is 64 of 192 dimensions, the paper's §4.2.) How much is enough? That can be
# found by training alone. The recorded study trains small models with MLA on the bytes of Python's manual, with different
# numbers of rotary dimensions and from different seeds. The control has *none*: a model without positions, called NoPE. Half
# of the rows are a copying task: the first byte of a row names a distance, and each byte repeats the one that stands so far
# before it. You can repeat it with `python -m dsv3lib.studies.rotary_dims`.

# %%
predict(
    "rope.p4",
    "From which number of rotary dimensions on does the loss hardly get any better?",
    options=["0: the causal mask tells the order", "8", "16", "32"],
)

# %%
import json

from dsv3lib.course import data_folder

record = json.loads((data_folder() / "studies" / "rotary_dims.json").read_text())
runs = {}
for run in record["runs"]:
    runs.setdefault(run["rotary_dims"], []).append(run)
seeds = len(runs[0])
print(f"{seeds} seeds, {record['steps']} steps each")

# %% tags=["claim:enough"]
style.show(*figures.rotary_dims_study(runs))
loss, copied = {}, {}
for n, row in runs.items():
    loss[n] = [run["text_loss"] for run in row]
    copied[n] = [100 * sum(run["copy_accuracy"].values()) / 4 for run in row]
span = "{:.2f} to {:.2f}".format
lines = [[n, *(span(min(x[n]), max(x[n])) for x in (loss, copied))] for n in runs]
table(["rotary dims", "loss, nats a byte", "copied rightly, percent"], lines)
assert seeds >= 3 and min(loss[0]) > max(loss[8])
assert min(copied[8]) > 2 * max(copied[0])
mean = {n: sum(row) / seeds for n, row in loss.items()}
assert mean[0] - mean[8] > 5 * abs(mean[16] - mean[32]) and mean[8] > mean[16]
reveal("rope.p4", "16", because="0 to 8 is a large step, 8 to 16 a small one, then hardly any.")

# %% [markdown]
# **A few rotary dimensions carry nearly all that positions are worth**, here and at this size. <!-- claim: enough --> Without
# any, a longer row does not help the loss, and copying is hopeless. (A causal mask alone does tell a deep model something: a
# token can count how many it sees. Two layers make little of it.) The small study cannot say that 64 is right for V3; it says
# why it need not be 192.
#
# Now train two of them yourself, one without positions and one with sixteen rotary dimensions. The next figures look into
# the second.

# %%
from dsv3lib.course import bar
from dsv3lib.studies.rotary_dims import measure, model_with, training_loss
from dsv3lib.studies.small_models import manual, rows_of, train

torch.set_num_threads(1)  # for so small a model, sharing the work costs more than it saves
text, unseen = manual()
steps, trained = min(STEPS, 10) if FAST else STEPS, {}
for dims in (0, 16):
    trained[dims] = model_with(dims, SEED)
    batches = training_loss(text, torch.Generator().manual_seed(SEED))
    with bar(f"training with {dims} rotary dimensions", total=steps) as step:
        for now in train(trained[dims], steps, batches):
            step(note=f"loss {now:.2f}")
for dims, model in trained.items():
    loss_here = measure(model, unseen, rows=16)["text_loss"]
    measured(f"{dims} rotary dimensions: loss {loss_here:.2f}")

# %% [markdown]
# ## Look into a trained head
#
# A score is a sum, so it can be taken apart: what of it is content, what position? The figure has the mean of each over many
# queries. Move the sliders to the other heads.

# %%
from dsv3lib.studies.head_scores import head_scores

base = trained[16]
rows = rows_of(unseen, 16, 128, torch.Generator().manual_seed(SEED))
parts = head_scores(base, rows)
def draw_head(layer, head):
    both = parts.content[layer, head].tolist(), parts.position[layer, head].tolist()
    return figures.score_by_distance(*both, layer, head)


live(draw_head, layer=range(2), head=range(4))

# %%
names = [f"layer {layer}, head {head}" for layer in range(2) for head in range(4)]
turns_of = [figures.wavelength(16, pair) for pair in range(8)]
style.show(
    *figures.frequencies_used(parts.pair_share.flatten(0, 1).tolist(), names, turns_of)
)
best = parts.position.flatten(0, 1).argmax(-1).tolist()
measured(f"Distance that each head's position part likes best: {', '.join(map(str, best))}.")

# %% [markdown]
# The frequencies are fixed; which of them a head listens to is learnt, in $W^{QR}$ and $W^{KR}$.
#
# ## Break it
#
# **Turn the latent itself**, before it is cached. Then nothing stands in the way of absorption. But values come out of the same
# latent. The test: the same tokens, moved 100 positions on. All distances stay, so nothing may change. <!-- claim: turned -->


# %% tags=["claim:turned"]
def output_at(offset, turn_latent):
    place = torch.arange(offset, offset + 48)
    kept = at(c, place) if turn_latent else c
    position = at(asked[:, -1], place[-1]) @ at(key, place).T
    total = torch.einsum("hn,hnc->hc", q[-1], W_UK) @ kept.T + position
    mixture = (total * (d_h + d_r) ** -0.5).softmax(-1) @ kept
    return torch.einsum("hc,hvc->hv", mixture, W_UV)


for turn_latent in (False, True):
    before, later = output_at(0, turn_latent), output_at(100, turn_latent)
    off = ((later - before).norm() / before.norm()).item()
    name = "latent turned" if turn_latent else "as in V3"
    print(f"{name:14}: the output changes by {100 * off:.0f} %")
    assert off > 0.5 if turn_latent else off < 1e-9

# %% [markdown]
# **A rotary key for each head.** <!-- claim: per_head --> Nothing forbids it: each head could have its own. Count what a token would leave behind in one
# layer of V3.

# %% tags=["claim:per_head"]
latent = torch.empty(1, v3.kv_lora_rank, dtype=torch.bfloat16)
shared = torch.empty(1, v3.qk_rope_head_dim, dtype=torch.bfloat16)
own = torch.empty(1, v3.num_attention_heads, v3.qk_rope_head_dim, dtype=torch.bfloat16)
one_key, many_keys = latent.nbytes + shared.nbytes, latent.nbytes + own.nbytes
print(f"one key for all heads: {one_key:,} bytes; a key for each: {many_keys:,}")
print(f"{many_keys / one_key:.1f} times")
assert (one_key, many_keys) == (1152, 17408)

# %% [markdown]
# The position would take sixteen times the room of the content. <!-- claim: per_head -->
#
# **Count positions from the wrong end after a crop.** <!-- claim: crop --> A cache that is cut back goes on at its *length*, not at the number of
# tokens that it has ever seen. (Cutting happens whenever a drafted token is rejected, notebook 07.)


# %%
class Late(RotaryEmbedding):
    """Goes on counting where the cropped tokens left off."""

    def table(self, length, like):
        return super().table(length + 40, like)[40:]


def after_crop(rope):
    cache = LatentCache(base.config)
    base(rows[:1, :100], cache=cache)
    cache.crop(60)
    base.rope, former = rope, base.rope
    logits = base(rows[:1, 60:70], cache=cache).logits
    base.rope = former
    return logits


# %% tags=["claim:crop"]
with torch.no_grad():
    fresh = base(rows[:1, :70]).logits[:, 60:]
    for name, rope in (
        ("from the cache's length", base.rope),
        ("from all ever seen", Late(base.config)),
    ):
        off = ((after_crop(rope) - fresh).norm() / fresh.norm()).item()
        print(f"counted {name:24}: {'equal' if off < 1e-4 else 'wrong'}")
        assert (off < 1e-4) == (name == "from the cache's length")

# %% [markdown]
# It makes no noise: the text goes on, a little worse. Only a comparison with a fresh run shows it.
#
# ## On trial
#
# **"RoPE is applied to both latents."** <!-- claim: both_latents --> Put the same tokens behind others, so that they stand
# further on, and see which numbers of the first layer's cache change. (The saying comes from a machine-made conversation about
# the report and the summaries that repeat it.)


# %% tags=["claim:both_latents"]
class Seen(LatentCache):
    """Shows what each layer stores."""

    def append(self, layer, latent, *rest, **more):
        self.stored = {**getattr(self, "stored", {}), layer: latent}
        return super().append(layer, latent, *rest, **more)


def stored(ids):
    with torch.no_grad():
        base(ids, cache=(cache := Seen(base.config)))
    return cache.stored[0][0]


near, further = stored(rows[:1, 40:80])[-40:], stored(rows[:1, :80])[-40:]
same = ((near - further).abs() < 1e-5).all(0)
rank = base.config.kv_lora_rank
print(f"{int(same[:rank].sum())} of {rank} latent numbers stay")
print(f"{int(same[rank:].sum())} of {same[rank:].numel()} rotary numbers stay")
assert same[:rank].all() and not same[rank:].all()

# %% [markdown]
# **Refuted.** Latents are the same wherever the token stands. Nor is the query's latent turned; only what is made beside it.
#
# **"RoPE makes attention decay with distance."** <!-- claim: decay --> The original paper shows an upper bound that falls. Does
# the score? Draw queries and keys at random, and measure the size of the score by distance. Then once more with keys that
# equal their queries.

# %% tags=["claim:decay"]
drawn = torch.randn(2000, v3.qk_rope_head_dim, generator=draw, dtype=torch.float64)
others = torch.randn(drawn.shape, generator=draw, dtype=torch.float64)
gaps, sizes = (0, 1, 4, 16, 64, 256, 1024), {}
for name, keys in (("any key", others), ("the query itself", drawn)):
    by_gap = [(at(drawn, gap) * keys).sum(-1).square().mean().sqrt().item() for gap in gaps]
    sizes[name] = [by_gap[i] / by_gap[0] for i in range(len(gaps))]
lines = [[name, *(f"{x:.2f}" for x in row)] for name, row in sizes.items()]
table(["size of the score at", *map(str, gaps)], lines)
assert max(abs(x - 1) for x in sizes["any key"]) < 0.1
assert sizes["the query itself"][-1] < 0.5

# %% [markdown]
# **Refuted as a rule.** A turn keeps lengths, so a random key is scored as strongly far away as near. What falls, in waves, is
# the score of a vector with itself. Trained heads make of that what they need: look for a head above whose position part is
# highest some tokens back, not at the token itself.
#
# **"Compression loses positions."** <!-- claim: lost --> Make the latent as narrow as two numbers. Can the place of every token
# still be read from the cache, exactly?

# %% tags=["claim:lost"]
for rank in (d_c, 2):
    narrow = norm(h @ W_DKV[:rank].T)
    cached = torch.cat([narrow, at(key[:1].expand(48, -1), t)], -1)  # the same word, 48 times
    a, b = cached[:, -2], cached[:, -1]  # the slowest pair
    angle = torch.atan2(b, a) - torch.atan2(b[0], a[0])
    read = (angle / speeds(d_r)[-1]).round().long()
    print(
        f"latent of {rank:2}: {int((read == t).sum())} of 48 places read rightly from the cache"
    )
    assert torch.equal(read, t)

# %% [markdown]
# **Refuted.** However narrow the latent, the position does not go through it. (Whether two numbers are enough for the *content*
# is another matter.)
#
# ## At scale
#
# Queries are turned by a kernel, [dsv3lib/kernels/elementwise/rotary.py](../dsv3lib/kernels/elementwise/rotary.py): one launch
# for all heads and the shared key, forward, and *back* for the gradient, which is the turn by the opposite angle. It reads and
# writes memory for nearly all of its time and calculates for the rest, so a good one is as fast as memory. In the model the
# shared key is turned where the latent is normalised, in
# [latent.py](../dsv3lib/kernels/elementwise/latent.py). Here is what they compile to for Hopper.

# %% tags=["folded"]
from dsv3lib.course import at_scale

at_scale("rope bf16", "norm_and_turn bf16", operations=("rope",))

# %% [markdown]
# *In place* moves only the rotary part; *elsewhere* copies the content beside it in the same launch. None has a matrix
# instruction, and none should: pairs are turned one by one.
#
# ## One more exercise
#
# It leads to notebook 08: what happens to slow pairs when a text gets longer than all that the model was trained on?

# %%
exercise("rope.4")


# %%
def pairs_that_turn(dims, theta, length): ...


pairs_that_turn = check("rope.4", pairs_that_turn)

# %% [markdown]
# ## What can go wrong
#
# - *The layout.* Interleaved and split pairs, mixed: see above. A short test of your own cache will not find it.
# - *The scale.* The sum of both parts is divided by $\sqrt{d_h + d_h^R}$, in the absorbed form as well, though there the vectors
#   are much longer.
# - *Turn before the cache.* A rotary key is cached after its turn. Cache it before, and all of them must be turned at each step.
# - *Positions of a batch.* Rows that hold different numbers of tokens stand at different positions; one table for all of them
#   is right only without padding at the left.
# - *FP32 angles.* A position times a speed needs more digits than FP32 has at long contexts; the table is made in FP64.
#
# ## Do you recall?
#
# <details><summary>Why can the content key not simply be turned?</summary>
# The turn depends on the cached token and stands between the query and W^UK, and a turn and a matrix do not commute: the matrix
# could not be moved to the query once for all tokens.</details>
#
# <details><summary>What is shared by all heads, and what is not?</summary>
# The rotary key is shared, since it is cached. Each head has a rotary query of its own.</details>
#
# <details><summary>What do two layouts of the same rotation have in common, and what not?</summary>
# The scores; not the bytes in the cache.</details>
#
# <details><summary>Does RoPE make far tokens count less?</summary>
# Not by itself: a turn keeps lengths. What a head does with distance is learnt.</details>
#
# ## Where next
#
# [03 · Bias-based routing](03_bias_based_routing.ipynb) turns to the other half of a layer. Or read
# [dsv3lib/layers/rope.py](../dsv3lib/layers/rope.py); its last part, YaRN, stretches these very frequencies to longer texts.
