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
# # 01 · One small latent instead of all keys and values
#
# **You will have shown**
#
# 1. **how little DeepSeek-V3 keeps of each token it has read, on real tensors** <!-- claim: bytes -->;
# 2. **that it never has to unpack what it kept: the same attention, in another order** <!-- claim: absorb, flops -->;
# 3. **what the packing costs, and why the position travels outside of it** <!-- claim: no_rope, bottleneck -->.
#
# About 75 minutes. Paper: *DeepSeek-V3 Technical Report* (2024), §2.1.1, Equations 1 to 11. The idea is called *multi-head
# latent attention*, **MLA**.

# %% tags=["parameters"]
STEPS = 240  # of the two small trainings
SEED = 1234
DEVICE = "auto"  # or "cpu", "cuda"
FAST = False  # True: fewer steps, shorter contexts

# %%
import torch

from dsv3lib import DeepSeekV3, LatentCache, ModelConfig
from dsv3lib.course import check, exercise, measured, predict, reveal, setup, symbols, table
from dsv3lib.viz import cache as figures
from dsv3lib.viz import style

session = setup(seed=SEED, notebook="01_mla_latent_cache", device=DEVICE)
v3, tiny = ModelConfig.preset("v3-671b"), ModelConfig.preset("tiny")

# %% [markdown]
# ## One conversation, eight GPUs
#
# A transformer writes one token at a time (it *decodes*), and each new token looks back at all tokens before it. It compares
# its *query* with a *key* of each of them and mixes their *values*. Keys and values of the past do not change, so they are kept,
# in every head of every layer. That store is the **KV cache**.
#
# V3 has 61 layers of 128 heads; a key has 192 numbers, a value 128. A number in BF16 takes two bytes. How much would the
# cache of one conversation of 131,072 tokens take, kept in the ordinary way? <!-- claim: ordinary -->

# %% tags=["claim:ordinary"]
context = 131_072
key, value = v3.qk_head_dim, v3.v_head_dim
ordinary = v3.num_hidden_layers * v3.num_attention_heads * (key + value) * 2
assert (v3.num_hidden_layers, v3.num_attention_heads, key, value) == (61, 128, 192, 128)
print(f"a token: {ordinary:,} bytes")
print(f"{context:,} tokens: {figures.readable_bytes(ordinary * context)}")
print(f"that is the whole memory of {ordinary * context / 80e9:.1f} GPUs of 80 GB")
question = "How much does V3 really keep for those 131,072 tokens?"
predict("mla.p1", question, number=(1.0, 1000.0, "GiB"))

# %% tags=["claim:bytes"]
from dsv3lib.model.costs import cache_bytes_per_token
from dsv3lib.model.variants import cached_layer_bytes

kept = v3.num_hidden_layers * cached_layer_bytes(v3, tokens=1)["MLA"]  # of a real layer's cache
print(f"a token: {kept:,} bytes, {ordinary / kept:.1f} times less")
reveal("mla.p1", round(kept * context / 2**30, 2), unit="GiB", because="A corner of one GPU.")
assert kept == cache_bytes_per_token(v3) == 70_272 and round(ordinary / kept, 1) == 71.1

# %% [markdown]
# The rest of this lesson is about how that can work.
#
# ## What is made of a token
#
# A **latent** is a short vector from which longer ones are made. MLA has a latent for queries, which is forgotten at once, and one for
# keys and values *together*, which is kept. Beside it one short key is kept that carries the position; all heads share it. **RoPE**
# writes a position into a vector by turning pairs of its numbers by angles that grow with the position (notebook 02 is about it;
# here it is a finished function). The worked numbers are from a real layer of `tiny`.

# %%
from dsv3lib.layers.attention import MultiHeadLatentAttention, Step
from dsv3lib.layers.rope import RotaryEmbedding, apply_rope
from dsv3lib.viz.latent_path import absorption, latent_path, worked_token

attention = MultiHeadLatentAttention(tiny, layer=0).double()
tokens, draw = 48, session.generator
h = torch.randn(tokens, tiny.hidden_size, generator=draw, dtype=torch.float64)
angles = RotaryEmbedding(tiny).table(tokens, h)  # how far each token's pairs are turned
style.show(*latent_path({"V3": v3, "tiny": tiny}, worked_token(attention, h, Step(angles))))

# %% [markdown]
# A name like $W^{DKV}$ says what the matrix does: **D**own to the latent of **K**eys and **V**alues; **U** is up again; **R** makes
# the part that gets the position.

# %%
symbols(
    "d", "n_h", "d_h", "d_h^R", "d_v", "d_c", "d_c'",
    ("h_t", "x", "[d]", "hidden state: what the layer reads of token t"),
    ("c_t^{KV}", "latents[:d_c]", "[d_c]", "latent of keys and values, cached"),
    ("k_t^R", "latents[d_c:]", "[d_h^R]", "position key, cached, shared by all heads"),
    ("W^{DQ}", "q_a_proj", "[d_c', d]", "down to the latent of queries"),
    ("W^{UQ}, W^{QR}", "q_b_proj", "[n_h*(d_h + d_h^R), d_c']", "up to all heads' queries"),
    ("W^{DKV}, W^{KR}", "kv_a_proj_with_mqa", "[d_c + d_h^R, d]", "makes all that is cached"),
    ("W^{UK}, W^{UV}", "kv_b_proj", "[n_h*(d_h + d_v), d_c]", "up to all keys and values"),
    ("W^O", "o_proj", "[d, n_h*d_v]", "from the heads back to the layer's width"),
)  # fmt: skip

# %% [markdown]
# Where two matrices share one in the code, their rows stand one above the other. Here they are taken apart, one per head:

# %%
rank, nope, rope = tiny.kv_lora_rank, tiny.qk_nope_head_dim, tiny.qk_rope_head_dim
heads, value = tiny.num_attention_heads, tiny.v_head_dim
w = {name: p.detach() for name, p in attention.named_parameters()}
W_DKV, W_KR = w["kv_a_proj_with_mqa.weight"].split([rank, rope])
W_UK, W_UV = w["kv_b_proj.weight"].unflatten(0, (heads, -1)).split([nope, value], 1)
W_UQ, W_QR = w["q_b_proj.weight"].unflatten(0, (heads, -1)).split([nope, rope], 1)
W_DQ, W_O = w["q_a_proj.weight"], w["o_proj.weight"]


def norm(c):
    """To length √width (§4.2); its learned factors are 1 here."""
    return c * (c.square().mean(-1, keepdim=True) + tiny.rms_norm_eps).rsqrt()

# %% [markdown]
# ## You write it: what is cached
#
# $$\mathbf c_t^{KV} = \mathrm{norm}(W^{DKV}\mathbf h_t), \qquad \mathbf k^R_t = \mathrm{RoPE}(W^{KR}\mathbf h_t)$$

# %%
exercise("mla.1")

# %%
def compress(h, W_DKV, W_KR, norm, rope):
    ...


compress = check("mla.1", compress)

# %% [markdown]
# ## You write it: attention, with everything unpacked
#
# Each head $i$ makes its key and its value from the cached latent (Eqs. 2, 4, 5), then attends as usual (Eq. 10):
#
# $$\mathbf k_{t,i} = [W^{UK}_i\mathbf c_t;\ \mathbf k^R_t], \qquad \mathbf v_{t,i} = W^{UV}_i\mathbf c_t, \qquad
# \mathbf o_{t,i} = \sum_{j\le t} \mathrm{softmax}_j\!\left(\frac{\mathbf q_{t,i}^{\top}\mathbf k_{j,i}}{\sqrt{d_h +
# d_h^R}}\right) \mathbf v_{j,i}$$

# %%
exercise("mla.2")

# %%
def attend_expanded(q, q_rope, c, k_rope, W_UK, W_UV):
    ...


attend_expanded = check("mla.2", attend_expanded)

# %% [markdown]
# The query goes through a latent of its own (Eqs. 6 to 9). With it, one new token's attention is whole:

# %%
def queries(h, angles):
    """Each head's query of each token, content and position: [tokens, heads, d_h and d_h^R]."""
    c = norm(h @ W_DQ.T)
    content, position = (torch.einsum("tc,hkc->thk", c, W) for W in (W_UQ, W_QR))
    return content, apply_rope(position, angles[:, None])


def cached_of(h, angles):
    both = compress(h, W_DKV, W_KR, norm, lambda k: apply_rope(k, angles))
    return both.split([rank, rope], -1)

(c, k_rope), (q, q_rope) = cached_of(h, angles), queries(h, angles)
expanded = attend_expanded(q[-1], q_rope[-1], c, k_rope, W_UK, W_UV)
print("cached:", [tokens, rank + rope], "· unpacked keys:", [heads, tokens, nope + rope])

# %% [markdown]
# ## Never unpack
#
# So the cache is small. But every new token unpacks the whole past again. Look at the content part of a score: a query, a
# matrix, a latent.

# %%
style.show(*absorption(v3))

# %% [markdown]
# $$\mathbf q^{\top}\,(W^{UK}\mathbf c_j) \;=\; (W^{UK\top}\mathbf q)^{\top}\,\mathbf c_j$$
#
# On the right, the matrix has moved to the query. There is one query and there are thousands of latents. The same can be done
# on the other side: mix the latents first, then apply $W^{UV}$ once to the mixture. This is called **absorption**.

# %%
predict(
    "mla.p2",
    "Between the two products stands a softmax, which is not linear. What happens to the "
    "output of a head when both matrices are moved?",
    options=["it stays the same", "it changes a little",
             "it is wrong: a matrix cannot move past a softmax"],
)  # fmt: skip

# %%
exercise("mla.3")

# %%
def attend_absorbed(q, q_rope, c, k_rope, W_UK, W_UV):
    ...


attend_absorbed = check("mla.3", attend_absorbed)

# %% tags=["claim:absorb"]
absorbed = attend_absorbed(q[-1], q_rope[-1], c, k_rope, W_UK, W_UV)
print("equal to ten digits:", bool((absorbed - expanded).abs().max() < 1e-10))
reveal("mla.p2", "it stays the same", because="One moves before the softmax, one after it.")
assert (absorbed - expanded).abs().max() < 1e-10

# %% [markdown]
# In the absorbed form all heads look at the same vectors: keys of $d_c + d_h^R$ numbers and values of $d_c$. Attention with one
# key and one value for all heads is known as *multi-query attention*. V3 decodes as that, and still each head has keys of its
# own, hidden in its query.
#
# ## The real thing
#
# The library has both forms in [dsv3lib/layers/attention.py](../dsv3lib/layers/attention.py) and takes the one that costs less. A
# `Step` is what all layers of one forward pass share: the angles, the cache. **The library's layer gives what your functions
# give, and its cache grows by what was counted** <!-- claim: same -->.

# %% tags=["claim:same"]
with torch.no_grad():
    x = h[None]  # a batch of one
    latents = attention.latents(x, Step(angles))
    query = attention.queries(x, Step(angles))[:, :, -1:]
    torch.testing.assert_close(latents[0], torch.cat([c, k_rope], -1))
    for form in (attention.expanded, attention.absorbed):
        assert (form(query, latents)[0, 0] - expanded).abs().max() < 1e-10
    whole = attention(x, Step(angles))[0, -1]
    assert (whole - W_O @ expanded.flatten()).abs().max() < 1e-10  # Eq. 11
model, cache = DeepSeekV3(tiny, draw).eval(), LatentCache(tiny)
with torch.inference_mode():
    for length in (100, 20):
        model(torch.randint(6, tiny.vocab_size, (1, length), generator=draw), cache=cache)
        print(f"{len(cache)} tokens: {cache.nbytes:,} bytes")
        assert cache.nbytes == len(cache) * cache_bytes_per_token(tiny, bytes_per_value=4)

# %% [markdown]
# ## Four ways to keep the past
#
# | | what is kept of a token in a layer |
# |---|---|
# | **MHA**, multi-head attention | a key and a value per head |
# | **GQA**, grouped queries (8 groups here) | 8 keys and 8 values; the heads of a group share one pair | <!-- claim: grows -->
# | **MQA**, multi-query | one key and one value for all heads |
# | **MLA** | one latent and one position key, from which each head makes its own |

# %%
kinds = ["MHA", "GQA-8", "MQA", "MLA"]
predict("mla.p3", "With V3's heads, which of the four keeps the fewest bytes?", options=kinds)

# %% [markdown]
# The next cell does not calculate. It runs a real layer of each kind over one token and over 64, and asks its cache how many bytes it
# holds ([dsv3lib/model/variants.py](../dsv3lib/model/variants.py)). <!-- claim: grows -->

# %% tags=["claim:grows", "claim:smallest"]
one, many = cached_layer_bytes(v3, tokens=1), cached_layer_bytes(v3, tokens=64)
per_token = {name: v3.num_hidden_layers * size for name, size in one.items()}
rows = [[n, f"{b:,}", f"{b / per_token['MLA']:.2f}"] for n, b in per_token.items()]
table(["", "bytes per token", "times MLA's"], rows)
reveal("mla.p3", min(per_token, key=per_token.get), because="One pair for all heads.")
assert many == {name: 64 * size for name, size in one.items()}  # in proportion to the context
assert list(per_token) == kinds and per_token["MHA"] == ordinary
assert per_token["MQA"] < per_token["MLA"] < per_token["GQA-8"]

# %% [markdown]
# **MLA does not keep the least; MQA does** <!-- claim: smallest -->. But under MQA all heads must make do with the same keys and
# values, and under MLA each head has its own. What that is worth can only be found by training; the DeepSeek-V2 report did so
# before V3 was built on it.
#
# Move the slider (Tab to it, then the arrow keys) and watch where each line meets the memory of one GPU.

# %%
# answers mla.p3
from dsv3lib.viz.live import live


def draw_cache(tokens):
    return figures.cache_by_context(per_token, tokens)


live(draw_cache, tokens=figures.CONTEXTS, start={"tokens": 16384}, labels={"tokens": "context"})

# %% [markdown]
# ## What unpacking would cost
#
# Both forms give the same numbers. They do not take the same time. An *operation* is one multiplication or one addition.

# %%
predict(
    "mla.p4",
    "For each cached token, how many times more operations does a new token need at V3's sizes "
    "if it unpacks the latents instead of absorbing?",
    number=(1, 1000, "times"),
)

# %% tags=["claim:flops"]
from dsv3lib.model.costs import attention_flops_per_cached_token

forms = ("expanded", "absorbed")
flops = {form: attention_flops_per_cached_token(v3, form) for form in forms}
ratio = flops["expanded"] / flops["absorbed"]
table(["", "operations per cached token and layer"],
      [[form, f"{count / 1e6:.3g} million"] for form, count in flops.items()])  # fmt: skip
reveal("mla.p4", round(ratio), unit="times", because="128 keys and values from every latent.")
assert [round(flops["expanded"] / 1e6, 1), round(flops["absorbed"] / 1e6, 3)] == [33.6, 0.279]
assert round(ratio) == 121

# %% [markdown]
# Counted is not measured. So here is one layer of V3's attention with all its heads, timed on your machine: one new token,
# both forms, more and more cached tokens. (Only the layer's input is made narrow. That saves memory, and the part that is timed
# does not depend on it.)

# %%
# answers mla.p4
from dsv3lib.studies.decode_time import counted_millions, timed_milliseconds

contexts = [64, 128, 256] if FAST else [64, 128, 256, 512, 1024]
times = timed_milliseconds(v3, contexts, session.device)
counted = counted_millions(v3, contexts)
style.show(*figures.decode_by_context(contexts, times, counted))
faster, fewer = (one["expanded"][-1] / one["absorbed"][-1] for one in (times, counted))
measured(f"At {contexts[-1]}: {faster:.0f} times faster, {fewer:.0f} times fewer operations.")

# %% [markdown]
# Absorption has a price that does not grow: two matrices applied to the query and to the mixture, as much as unpacking a single
# token. That is why its curve starts flat. When a prompt is read (*prefill*), its many queries share one unpacking, and the
# expanded form wins: exercise `mla.5` finds where. The library counts both and chooses.
#
# ## What a latent keeps
#
# Why can V3's latent stand for the keys and values of all heads, which have 64 times as many numbers? <!-- claim: room --> Because
# keys and values of a trained model do not use all that room. You can see it on a small model of your own. It reads bytes of
# Python's manual. Its latent is as wide as its hidden state, so *nothing* forces it to compress; a second one has a latent of 8.

# %% tags=["claim:room"]
from dsv3lib.course import bar
from dsv3lib.studies import latent_directions as see
from dsv3lib.studies import latent_width as small

torch.set_num_threads(1)  # for so small a model, sharing the work between cores costs more
text, unseen = small.read_bytes(session.device)
steps, models = (20 if FAST else STEPS), {}
for rank_of in (64, 8):
    with bar(f"training with a latent of {rank_of}", total=steps) as step:
        reader = small.reader(rank_of, SEED).to(session.device)
        models[rank_of] = small.train(reader, text, steps, SEED, on_step=step)
wide, tight = models[64], models[8]
assert v3.num_attention_heads * (v3.qk_nope_head_dim + v3.v_head_dim) == 64 * v3.kv_lora_rank

# %% [markdown]
# Collect the keys and values of all heads over text that the model has not seen and ask how many *directions* they need. The
# singular value decomposition finds the best ones, in order. The control is the same model before training. Variance is not
# yet meaning, so cut the trained model's keys and values down to a few directions and see what its loss says
# ([latent_directions.py](../dsv3lib/studies/latent_directions.py)): to the best directions, and to random ones.

# %% tags=["claim:directions"]
untrained, sample = small.reader(64, SEED).to(session.device), text[:8192].view(32, 256)
spectra, losses, floors = see.cut_down(wide, untrained, sample, unseen, session.generator)
style.show(*figures.kept_by_directions(spectra, losses, floors))
need = {name: 1 + sum(share < 0.9 for share in row) for name, row in spectra.items()}
measured(f"90 % of the variance: {need['trained']} directions, {need['untrained']} untrained.")
assert need["trained"] < need["untrained"]
assert losses["best directions"][8] < losses["random directions"][8]

# %% [markdown]
# **Training itself makes keys and values low-rank, and the directions that it uses are the ones that count** <!-- claim: directions -->.
# Is that so for longer training and real text too? `tiny-v3` comes with the course. Its latent has 48 numbers, and each layer
# makes 256 of them. <!-- claim: shipped -->

# %% tags=["claim:shipped"]
from dsv3lib.studies.shipped_model import open_shipped

shipped, texts = open_shipped(seed=SEED)
rows = [texts.validation_batches(name, 1, 4)[0].input_ids for name in texts.domain_names]
stages = {"trained": shipped, "untrained": type(shipped)(shipped.config, session.generator)}
used = {name: see.directions(model, torch.cat(rows)) for name, model in stages.items()}
its = shipped.config
whole = its.num_attention_heads * (its.qk_nope_head_dim + its.v_head_dim)
style.show(*figures.directions_by_layer(used, its.kv_lora_rank, whole))
assert (its.kv_lora_rank, whole) == (48, 256)
assert all(after < before for after, before in zip(*used.values(), strict=True))

# %% [markdown]
# **In every layer training has left fewer directions than it found** <!-- claim: shipped -->.
# And a model that has to live with few numbers from the start? One run is no answer, since runs differ by
# their seed. Recorded (`python -m dsv3lib.studies.latent_width`): six widths, three seeds. <!-- claim: width -->

# %% tags=["claim:width"]
from dsv3lib.studies import log

study = log.read("latent_width")
style.show(*figures.loss_by_width(study, sorted({row["steps"] for row in study})))
found = small.summary(study, steps=240)
mean = {width: sum(row) / len(row) for width, row in found.items()}
rows = [[n, len(row), f"{mean[n]:.2f}", f"{min(row):.2f} to {max(row):.2f}"]
        for n, row in found.items()]  # fmt: skip
even = small.summary(study, steps=240, evenly=True)[64]  # starts as small as with 8
level = sum(even) / len(even)
rows += [["64, small start", len(even), f"{level:.2f}", f"{min(even):.2f} to {max(even):.2f}"]]
table(["width", "seeds", "mean loss", "lowest to highest"], rows, caption="After 240 steps")
assert level < mean[64] and level - mean[8] < max(found[8]) - min(found[8])
assert len(found) == 6 and all(len(row) >= 3 for row in found.values())
assert mean[8] < mean[64] == max(mean.values())

# %% [markdown]
# Read it with care. **In this small model the narrow latents lose nothing; the widest is the worst** <!-- claim: width -->. That does
# not say that compression makes a model better. Keys and values are drawn larger from a wider latent, by the root of its width.
# Draw them as small as with 8 and the widest comes down to where the others are; what is left of the difference is within the
# spread of the seeds. <!-- claim: width --> So most of the gap is a poorer start. It does not go away by itself: three times as
# long, the widest is still behind, and how much of that is its start has not been tried. <!-- claim: width --> All this shows *why* a
# narrow latent can work; that V3's 512 are enough for V3 took DeepSeek's own training runs (§2.1.1 refers to DeepSeek-V2's).
#
# ## Break it
#
# ### The position inside the latent
#
# Why the extra key? Suppose the content keys were turned by RoPE, as in most models: the
# score becomes $(R_t\mathbf q)^{\top} R_j W^{UK} \mathbf c_j$, with a turn $R_j$ that depends on the cached token and stands
# between $\mathbf q$ and $W^{UK}$. Try to absorb in spite of it:

# %% tags=["claim:no_rope"]
turned = RotaryEmbedding(tiny.replace(qk_rope_head_dim=nope)).table(tokens, h)
keys = torch.einsum("sc,hkc->hsk", c, W_UK)
true = torch.einsum("hk,hsk->hs", apply_rope(q[-1], turned[-1]), apply_rope(keys, turned))
absorbing = torch.einsum("hk,hkc->hc", q[-1], W_UK) @ c.T
error = (absorbing - true).norm(dim=0) / true.norm(dim=0)  # per cached token, over the heads
rows = [[d, f"{100 * error[-1 - d]:.0f} %"] for d in (0, 1, 4, 16)]
table(["tokens back", "the absorbed score is off by"], rows)
assert error[-1] < 1e-10 and error[:-1].mean() > 0.5

# %% [markdown]
# **With RoPE on the content keys, absorption is right at distance 0 alone** <!-- claim: no_rope -->. To be right elsewhere, every latent
# would have to be unpacked and turned again.
#
# ### The latent itself turned, before it is cached
#
# Absorption works again. But values are made from the same latent. The
# test: the same text, further on. Nothing should change, because all distances are the same.

# %% tags=["claim:turned"]
def last_output(offset, turn_latent):
    at = RotaryEmbedding(tiny).table(offset + tokens, h)[offset:]
    (c, k_rope), (q, q_rope) = cached_of(h, at), queries(h, at)
    if turn_latent:
        wide_turns = RotaryEmbedding(tiny.replace(qk_rope_head_dim=rank))
        c = apply_rope(c, wide_turns.table(offset + tokens, h)[offset:])
    return attend_expanded(q[-1], q_rope[-1], c, k_rope, W_UK, W_UV)

change = {}
for name, turn in (("as in V3", False), ("latent turned", True)):
    before, after = last_output(0, turn), last_output(100, turn)
    change[name] = float((after - before).norm() / before.norm())
table(["", "the output changes by"], [[n, f"{100 * x:.0f} %"] for n, x in change.items()])
assert change["as in V3"] < 1e-10 and change["latent turned"] > 0.5

# %% [markdown]
# **A turned latent makes the values depend on where in the text they stand** <!-- claim: turned -->.
#
# ### No position key at all
#
# After all, it is only a ninth of the cache. <!-- claim: order --> The test: read the past backwards,
# with the last token in its place. Words in another order mean something else.

# %% tags=["claim:order"]
def reads(h, factor):
    (c, k_rope), (q, q_rope) = cached_of(h, angles), queries(h, angles)
    return attend_absorbed(q[-1], q_rope[-1], c, factor * k_rope, W_UK, W_UV)

backwards, change = torch.cat([h[:-1].flip(0), h[-1:]]), {}
for name, factor in (("with position keys", 1), ("without", 0)):
    before = reads(h, factor)
    change[name] = float((reads(backwards, factor) - before).norm() / before.norm())
rows = [[name, f"{100 * x:.1f} %"] for name, x in change.items()]
table(["", "read backwards, the output changes by"], rows)
assert change["without"] < 1e-10 < change["with position keys"]
assert v3.latent_dim == 9 * v3.qk_rope_head_dim

# %% [markdown]
# **Without the position key, attention sees a bag of words** <!-- claim: order -->.
#
# ## On trial
#
# Four things that people say of MLA. The first two stand in a machine-made audio conversation about the report, published as a
# transcript in several languages, and in summaries that repeat it; the last two in many blog posts and comments.
#
# **"RoPE is applied to both latents." "There are two latents, one for content and one for keys and values."** Move the same tokens
# 100 positions on, and see which numbers change. Then nudge each latent, and see what moves. <!-- claim: unturned, two -->

# %% tags=["claim:unturned", "claim:two"]
far = RotaryEmbedding(tiny).table(100 + tokens, h)[100:]
now, then = (*cached_of(h, angles), *queries(h, angles)), (*cached_of(h, far), *queries(h, far))
names = ("latent", "position key", "query, content", "query, position")
stays = [torch.equal(a, b) for a, b in zip(now, then, strict=True)]
rows = [[name, same] for name, same in zip(names, stays, strict=True)]
table(["100 positions on", "the same, to the bit"], rows)
assert stays == [True, False, True, False]
made = {"queries": (norm(h @ W_DQ.T), W_UQ), "keys": (c, W_UK), "values": (c, W_UV)}
moves = {}
for nudged in ("queries", "keys"):
    for name, (latent, W) in made.items():
        other = latent + 0.1 if latent is made[nudged][0] else latent
        moves[nudged, name] = not torch.equal(other @ W.mT, latent @ W.mT)
assert [n for (of, n), moved in moves.items() if moved] == ["queries", "keys", "values"]

# %% [markdown]
# **Refuted: both latents are the same at every position, and only the decoupled numbers turn** <!-- claim: unturned -->. **Refuted: one
# latent is for queries, the other for keys and values jointly** <!-- claim: two -->; no key can be had without the latent of its
# value. That joint compression is the point.
#
# **"Absorption multiplies the weights together in advance."** One could: $W^{UQ}$ and $W^{UK}$ of a head make one matrix. What would
# it give, and what would it cost? <!-- claim: merged -->

# %% tags=["claim:merged"]
merged = torch.einsum("hkq,hkc->hqc", W_UQ, W_UK)  # [heads, d_c', d_c]
together = torch.einsum("q,hqc->hc", norm(h @ W_DQ.T)[-1], merged)
torch.testing.assert_close(together, torch.einsum("hk,hkc->hc", q[-1], W_UK))
n_h, d_h = v3.num_attention_heads, v3.qk_nope_head_dim
in_turn = n_h * d_h * (v3.q_lora_rank + v3.kv_lora_rank)
at_once = n_h * v3.q_lora_rank * v3.kv_lora_rank
table(["V3, one layer", "weights to read per token"],
      [["in turn", f"{in_turn:,}"], ["merged in advance", f"{at_once:,}"]])  # fmt: skip
assert at_once == 3 * in_turn

# %% [markdown]
# **Refuted: merged matrices would give the same from three times as many weights** <!-- claim: merged -->. What is called absorption is
# only the order of the products; your `attend_absorbed` made no new matrix.
#
# **"The compression keeps all information."** How much of what a layer reads can be told from its latent, by the best linear guess? And
# how many independent directions can keys and values have? <!-- claim: bottleneck -->

# %% tags=["claim:bottleneck"]
rows = see.keys_and_values(tight, 1, unseen)
directions = int(torch.linalg.matrix_rank(rows, rtol=1e-5))
told = see.told_by_latent(tight, 1, unseen)
print(f"keys and values: {rows.shape[1]} numbers per token, in {directions} directions")
measured(f"A latent of 8 tells {100 * told:.0f} % of what the layer reads.")
measured(f"Loss: {see.loss_of(tight, unseen):.2f}; of 64: {floors['whole model']:.2f}")
assert directions == 8 and told < 0.9

# %% [markdown]
# **Refuted: a bottleneck loses information, and part of the hidden state cannot be told from the latent** <!-- claim: bottleneck -->.
# Training decides which part may be lost. Whether the loss suffers is a question for many seeds, not for one run: see the figure
# above.
#
# ## At scale
#
# Is absorbed decoding limited by arithmetic or by reading the cache? Divide the operations by the bytes that they read (the
# *arithmetic intensity*), and compare with the same ratio of a GPU. An H800 has 989 trillion BF16 operations and 3.35 trillion
# bytes a second (NVIDIA's data sheet of the H100 SXM, with which it shares both). <!-- claim: intensity -->

# %% tags=["claim:intensity"]
balance, rows = 989e12 / 3.35e12, []
for n in (128, 16):
    flop = attention_flops_per_cached_token(v3.replace(num_attention_heads=n), "absorbed")
    intensity = flop / (2 * v3.latent_dim)
    rows.append([n, round(intensity), f"{100 * intensity / balance:.0f} % of {balance:.0f}"])
table(["heads on a GPU", "operations per byte", "of the H800's ratio"], rows)
assert rows[0][1] > 0.75 * balance and rows[1][1] < 0.15 * balance

# %% [markdown]
# **With all 128 heads on one GPU, decoding is close to the point where arithmetic limits it** <!-- claim: intensity -->. If the heads
# are split over eight GPUs, each still reads the whole latent, which cannot be split by heads: then memory limits it.
# <!-- claim: intensity -->
#
# <details><summary>Appendix: the kernel that decodes on a GPU, as compiled</summary>
#
# [dsv3lib/kernels/attention/mla_decode.py](../dsv3lib/kernels/attention/mla_decode.py) brings a page of latents into fast memory once and
# uses it twice, as keys and as values: that is absorption at work. The next cell compiles it for Hopper; no GPU is needed for that.
#
# How to read its table: *rows* are heads times new tokens, *bytes* those of a number. *Registers* hold the numbers that one thread
# works on, `255` at most; what does not fit is *spilled* to slow memory, so none is wanted. *Shared* is the fast memory that the
# threads of a block share, `227` KiB at most on Hopper. `wgmma` is Hopper's matrix instruction. With few heads there are too few
# rows to fill it, so that form turns the product around and lets the tokens fill it instead. (Limits: NVIDIA's CUDA
# programming guide.)
# </details>

# %% tags=["folded"]
from dsv3lib.course import at_scale

operations = ("mla_decode", "mla_decode fp8")
at_scale("mla_decode sm_90", "mla_decode_fp8 sm_90", operations=operations)

# %% [markdown]
# ## Further exercises

# %%
exercise("mla.4")

# %%
def fp8_cache_bytes(kv_rank, rope_dim, tile):
    ...


fp8_cache_bytes = check("mla.4", fp8_cache_bytes)

# %%
exercise("mla.5")

# %%
def break_even(heads, nope, rope, value, kv_rank):
    ...


break_even = check("mla.5", break_even)

# %% [markdown]
# ## What can go wrong
#
# - *The scale.* In the absorbed form the vectors are $d_c + d_h^R$ wide, but the scale is still that of $d_h + d_h^R$. It belongs to
#   the score, not to the vectors that it is computed from. (At long contexts V3 multiplies it by a correction.)
# - *The order of norm and cache.* The latent is cached after its norm, the position key after its turn. Cache them before, and
#   both must be done again for each old token.
# - *"MLA makes training faster."* In training nothing is cached. There the latent costs a little; decoding earns it back.
# - *Splitting heads over GPUs.* It splits the weights but not the cache: every GPU needs the whole latent.
#
# ## Do you recall?
#
# <details><summary>What exactly is cached for a token, in one layer of V3?</summary>
# The latent of keys and values, after its norm, and the position key, after its turn.</details>
#
# <details><summary>Which equation makes absorption possible?</summary>
# q·(W c) = (Wᵀq)·c: a matrix between two vectors can be applied to either. Nothing is multiplied in advance.</details>
#
# <details><summary>Why does the position need numbers of its own?</summary>
# A turn that depends on the cached token would stand between the query and W^UK, and no matrix could move past it.</details>
#
# <details><summary>When is the expanded form the better one?</summary>
# In prefill and training: there many queries share one unpacking, and narrow heads are cheaper to compare.</details>
#
# ## Where next
#
# [03 · Bias-based routing](03_bias_based_routing.ipynb) turns to the other half of a layer: which experts a token visits, and
# why none of them is overrun. Or read [dsv3lib/layers/attention.py](../dsv3lib/layers/attention.py): you have met all that it
# does.
