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
# 1. that DeepSeek-V3 keeps 70,272 bytes of each token it has read, 71 times less than its 128 heads would need, measured
#    on real tensors;
# 2. that it never has to unpack them: the same attention, computed in another order, works on the packed form, with about
#    121 times fewer operations for each cached token;
# 3. what the packing costs and what it does not: why the position travels outside of it, and what a trained model keeps.
#
# About 60 minutes. Paper: *DeepSeek-V3 Technical Report* (2024), §2.1.1, Equations 1 to 11. The idea is called *multi-head
# latent attention*, **MLA**.

# %% tags=["parameters"]
STEPS = 240  # of the two small trainings
SEED = 1234
DEVICE = "auto"  # or "cpu", "cuda"
FAST = False  # True: fewer steps, shorter contexts

# %%
import torch

from dsv3lib import DeepSeekV3, LatentCache, ModelConfig
from dsv3lib.course import check, exercise, measured, predict, reveal, setup
from dsv3lib.viz import cache as figures
from dsv3lib.viz import style

session = setup(seed=SEED, notebook="01_mla_latent_cache", device=DEVICE)
v3, tiny = ModelConfig.preset("v3-671b"), ModelConfig.preset("tiny")

# %% [markdown]
# ## One conversation, eight GPUs
#
# A transformer writes one token at a time (it *decodes*), and each new token looks back at all tokens before it. It compares
# its *query* with a *key* of each of them and mixes their *values*. Keys and values of the past do not change, so they are kept, in
# every head of every layer. That store is the **KV cache**.
#
# V3 has 61 layers of 128 heads; a key has 192 numbers, a value 128. A number in BF16 takes two bytes. How much would the
# cache of one conversation of 131,072 tokens take, kept in the ordinary way?

# %%
context = 131_072
key_and_value = v3.qk_head_dim + v3.v_head_dim
ordinary = v3.num_hidden_layers * v3.num_attention_heads * key_and_value * 2
print(f"a token: {ordinary:,} bytes")
print(f"{context:,} tokens: {figures.readable_bytes(ordinary * context)}")
print(f"that is the whole memory of {ordinary * context / 80e9:.1f} GPUs of 80 GB")
predict("mla.p1", "How much does V3 really keep for those 131,072 tokens?", number=(1.0, 1000.0, "GiB"))

# %%
from dsv3lib.model.costs import cache_bytes_per_token

kept = cache_bytes_per_token(v3)
assert kept == 70_272 and round(ordinary / kept, 1) == 71.1
print(f"a token: {kept:,} bytes, {ordinary / kept:.1f} times less")
reveal("mla.p1", round(kept * context / 2**30, 2), unit="GiB", because="It fits into a corner of one GPU.")

# %% [markdown]
# The rest of this notebook is about how that can work.
#
# ## The symbols
#
# A **latent** is a short vector from which longer ones are made. MLA has a latent for keys and values *together*, and
# another one for queries. Only the first is cached. These are the sizes, read from the two configurations:

# %%
sizes = [
    ("d", "hidden_size", "width of h, what a layer reads for a token"),
    ("n_h", "num_attention_heads", "heads"),
    ("d_h", "qk_nope_head_dim", "content numbers in a head's query and key"),
    ("d_h^R", "qk_rope_head_dim", "numbers beside them that carry the position"),
    ("", "v_head_dim", "numbers in a head's value (the paper: d_h too)"),
    ("d_c", "kv_lora_rank", "the latent of keys and values, cached"),
    ("d_c'", "q_lora_rank", "the latent of queries, not cached"),
]
print(f"{'paper':6} {'code':20} {'V3':>6} {'tiny':>5}  meaning")
for symbol, name, meaning in sizes:
    print(f"{symbol:6} {name:20} {getattr(v3, name):6,} {getattr(tiny, name):5}  {meaning}")

# %% [markdown]
# And these are the matrices, read from one layer of each model. A name like $W^{DKV}$ says what it does: **D**own to the
# latent of **K**eys and **V**alues; **U** is up again; **R** makes the part that gets the position. Where two share one
# matrix in the code, their rows stand one above the other.

# %%
from dsv3lib.layers.attention import MultiHeadLatentAttention, Step

with torch.device("meta"):  # shapes without memory
    big = MultiHeadLatentAttention(v3, layer=0)
attention = MultiHeadLatentAttention(tiny, layer=0).double()
names = {"q_a_proj": "W^DQ", "q_b_proj": "W^UQ, W^QR", "kv_a_proj_with_mqa": "W^DKV, W^KR"}
names |= {"kv_b_proj": "W^UK, W^UV", "o_proj": "W^O"}
print(f"{'paper':12} {'code':19} {'V3':>15} {'tiny':>11}")
for name, symbols in names.items():
    shapes = [list(getattr(layer, name).weight.shape) for layer in (big, attention)]
    print(f"{symbols:12} {name:19} {shapes[0]!s:>15} {shapes[1]!s:>11}")

# %% [markdown]
# ## The idea, in plain PyTorch
#
# What a token leaves behind is its latent, and beside it one short key for the position (Eqs. 1 and 3):
#
# $$\mathbf c_t = W^{DKV}\mathbf h_t, \qquad \mathbf k^R_t = \mathrm{RoPE}(W^{KR}\mathbf h_t)$$
#
# **RoPE** writes a position into a vector: it turns pairs of its numbers by angles that grow with the position. The product
# of two turned vectors depends on their distance alone. Notebook 02 is about it; here it is a finished function. $\mathbf
# k^R$ belongs to no head: all share it.
#
# Each head $i$ makes its key and its value from the latent (Eqs. 2, 4, 5), and then attends as usual (Eq. 10):
#
# $$\mathbf k_{t,i} = [W^{UK}_i\mathbf c_t;\ \mathbf k^R_t], \qquad \mathbf v_{t,i} = W^{UV}_i\mathbf c_t, \qquad
# \mathbf o_{t,i} = \sum_{j\le t} \mathrm{softmax}_j\!\left(\frac{\mathbf q_{t,i}^{\top}\mathbf k_{j,i}}{\sqrt{d_h +
# d_h^R}}\right) \mathbf v_{j,i}$$
#
# The query goes through a latent of its own, $W^{DQ}$ and $W^{UQ}$ (Eqs. 6 to 9). Both latents are normalised to length
# $\sqrt{\text{width}}$ before they are used (§4.2); that is `norm`. (It has a learned factor for each number, which is 1 here.)

# %%
d_c, d_h, d_r, heads = tiny.kv_lora_rank, tiny.qk_nope_head_dim, tiny.qk_rope_head_dim, tiny.num_attention_heads
w = {name: getattr(attention, name).weight.detach() for name in names}
W_DKV, W_KR = w["kv_a_proj_with_mqa"].split([d_c, d_r])
W_UK, W_UV = w["kv_b_proj"].unflatten(0, (heads, -1)).split([d_h, tiny.v_head_dim], 1)  # a matrix for each head
W_UQ, W_QR = w["q_b_proj"].unflatten(0, (heads, -1)).split([d_h, d_r], 1)
W_DQ, W_O = w["q_a_proj"], w["o_proj"]
scale = (d_h + d_r) ** -0.5


def norm(c):
    return c * (c.square().mean(-1, keepdim=True) + tiny.rms_norm_eps).rsqrt()

# %%
from dsv3lib.layers.rope import RotaryEmbedding, apply_rope


def compress(h, turns):
    """What is cached of each token (Eqs. 1, 3): [tokens, d_c + d_h^R]."""
    return torch.cat([norm(h @ W_DKV.T), apply_rope(h @ W_KR.T, turns)], -1)


def queries(h, turns):
    """Each head's query, content and position (Eqs. 6 to 9): [tokens, heads, d_h], [tokens, heads, d_h^R]."""
    c = norm(h @ W_DQ.T)
    content, position = (torch.einsum("tc,hkc->thk", c, W) for W in (W_UQ, W_QR))
    return content, apply_rope(position, turns[:, None])

# %%
def attend_expanded(q_content, q_position, cached):
    """One token's query against all cached tokens, after unpacking them (Eqs. 2, 4, 5, 10): [heads, value]."""
    c, k_position = cached.split([d_c, d_r], -1)
    k = torch.einsum("sc,hkc->hsk", c, W_UK)
    v = torch.einsum("sc,hvc->hsv", c, W_UV)
    scores = torch.einsum("hk,hsk->hs", q_content, k) + q_position @ k_position.T
    return torch.einsum("hs,hsv->hv", (scores * scale).softmax(-1), v)


tokens = 48
h = torch.randn(tokens, tiny.hidden_size, generator=session.generator, dtype=torch.float64)
turns = RotaryEmbedding(tiny).table(tokens, h)
cached, (q_content, q_position) = compress(h, turns), queries(h, turns)
expanded = attend_expanded(q_content[-1], q_position[-1], cached)
print("cached:", list(cached.shape), "· keys:", [heads, tokens, d_h + d_r], "· output:", list(expanded.shape))

# %% [markdown]
# ## Never unpack
#
# So the cache is small. But now every new token unpacks the whole past again. Look at the content part of a score: a query,
# a matrix, a latent.
#
# $$\mathbf q^{\top}\,(W^{UK}\mathbf c_j) \;=\; (W^{UK\top}\mathbf q)^{\top}\,\mathbf c_j$$
#
# On the right, the matrix has moved to the query. There is one query and there are thousands of latents. The same can be
# done on the other side: mix the latents first, then apply $W^{UV}$ once to the mixture. This is called **absorption**.

# %%
predict(
    "mla.p2",
    "Between the two products stands a softmax, which is not linear. What happens to the output of a head when both "
    "matrices are moved?",
    options=["it stays the same", "it changes a little", "it is wrong: a matrix cannot move past a softmax"],
)

# %%
def attend_absorbed(q_content, q_position, cached):
    """The same attention on the latents as they lie: no key and no value is ever made."""
    c, k_position = cached.split([d_c, d_r], -1)
    q_latent = torch.einsum("hk,hkc->hc", q_content, W_UK)
    scores = q_latent @ c.T + q_position @ k_position.T
    mixture = (scores * scale).softmax(-1) @ c
    return torch.einsum("hc,hvc->hv", mixture, W_UV)


absorbed = attend_absorbed(q_content[-1], q_position[-1], cached)
torch.testing.assert_close(absorbed, expanded)
print("equal to ten digits:", bool((absorbed - expanded).abs().max() < 1e-10))
reveal("mla.p2", "it stays the same", because="One matrix moves before the softmax, one after it; none moves past it.")

# %% [markdown]
# In the absorbed form all heads look at the same vectors: keys of $d_c + d_h^R$ numbers and values of $d_c$ (576 and 512 in
# V3). Attention with one key and one value for all heads is known as *multi-query attention*. V3 decodes as that, and still
# each head has keys of its own, hidden in its query.
#
# ## The real thing
#
# The library has both forms in [dsv3lib/layers/attention.py](../dsv3lib/layers/attention.py) (`expanded`, `absorbed`) and
# takes the one that costs less. Here it is on the same weights and the same tokens.

# %%
with torch.no_grad():
    x = h[None]  # a batch of one
    latents = attention.latents(x, Step(turns))
    q = attention.queries(x, Step(turns))
    torch.testing.assert_close(latents[0], cached)
    torch.testing.assert_close(attention.expanded(q[:, :, -1:], latents)[0, 0], expanded)
    torch.testing.assert_close(attention.absorbed(q[:, :, -1:], latents)[0, 0], expanded)
    whole = attention(x, Step(turns))[0, -1]
torch.testing.assert_close(whole, W_O @ expanded.flatten())  # Eq. 11
print("cache, expanded, absorbed, whole layer: all four equal yours")

# %% [markdown]
# And this is a whole model with its cache, [dsv3lib/layers/cache.py](../dsv3lib/layers/cache.py). It grows as tokens come
# and can be cropped, which is how a model takes tokens back (notebook 07 needs that).

# %%
model = DeepSeekV3(tiny, session.generator).eval()
cache = LatentCache(tiny)
prompt = torch.randint(6, tiny.vocab_size, (1, 100), generator=session.generator)
with torch.inference_mode():
    model(prompt, cache=cache)
    print(f"{len(cache)} tokens: {cache.nbytes:,} bytes")
    for token in range(20):
        model(prompt[:, token : token + 1], cache=cache)
    print(f"{len(cache)} tokens: {cache.nbytes:,} bytes")
cache.crop(100)
print(f"{len(cache)} tokens: {cache.nbytes:,} bytes")
assert cache.nbytes == 100 * cache_bytes_per_token(tiny, bytes_per_value=4)

# %% [markdown]
# ## Four ways to keep the past
#
# | | what is kept of a token in a layer |
# |---|---|
# | **MHA**, multi-head attention | a key and a value for each head |
# | **GQA-8**, grouped queries | 8 keys and 8 values; the heads of a group share one pair |
# | **MQA**, multi-query | one key and one value for all heads |
# | **MLA** | one latent and one position key, from which each head makes its own |

# %%
predict("mla.p3", "With V3's heads, which of the four keeps the fewest bytes?", options=["MHA", "GQA-8", "MQA", "MLA"])

# %% [markdown]
# The next cell does not calculate. It runs a real layer of each kind over 1 and over 64 tokens, and asks its cache how many
# bytes it holds. (The layers are in [dsv3lib/layers/variants.py](../dsv3lib/layers/variants.py).)

# %%
from dsv3lib.model.variants import cached_layer_bytes

one, many = cached_layer_bytes(v3, tokens=1), cached_layer_bytes(v3, tokens=64)
assert many == {name: 64 * size for name, size in one.items()}  # so it grows in proportion
per_token = {name: v3.num_hidden_layers * size for name, size in one.items()}
assert per_token["MLA"] == 70_272 and per_token["MHA"] == ordinary
for name, size in per_token.items():
    print(f"{name:6} {size:>9,} bytes a token, {size / per_token['MLA']:5.2f} times MLA's")
reveal("mla.p3", min(per_token, key=per_token.get), because="MLA keeps as much as 1.8 shared key-value pairs would take.")

# %% [markdown]
# MLA is not the smallest. MQA is, but there all heads must make do with the same keys and values. Under MLA each head has
# its own. What that is worth can only be found by training; the DeepSeek-V2 report did so before V3 was built on it.
#
# Move the slider (Tab to it, then the arrow keys) and watch where each line meets the memory of one GPU.

# %%
from dsv3lib.viz.live import live


def draw(tokens):
    return figures.cache_by_context(per_token, tokens)


live(draw, tokens=figures.CONTEXTS, start={"tokens": 16384}, labels={"tokens": "context (tokens)"})

# %% [markdown]
# ## What unpacking would cost
#
# Both forms give the same numbers. They do not take the same time. An *operation* is one multiplication or one addition.

# %%
predict(
    "mla.p4",
    "For each cached token, how many times more operations does a new token need at V3's sizes if it unpacks the latents "
    "instead of absorbing?",
    number=(1, 1000, "times"),
)

# %%
from dsv3lib.model.costs import attention_flops_per_cached_token

flops = {form: attention_flops_per_cached_token(v3, form) for form in ("expanded", "absorbed")}
ratio = flops["expanded"] / flops["absorbed"]
for form, count in flops.items():
    print(f"{form}: {count / 1e6:.3g} million operations for a cached token in a layer")
assert [round(flops["expanded"] / 1e6, 1), round(flops["absorbed"] / 1e6, 3), round(ratio)] == [33.6, 0.279, 121]
reveal("mla.p4", round(ratio), unit="times", because="Unpacking makes 128 keys and 128 values from each latent.")

n_h, contexts = v3.num_attention_heads, [64, 128, 256] if FAST else [64, 128, 256, 512, 1024]
once = 2 * n_h * v3.kv_lora_rank * (v3.qk_nope_head_dim + v3.v_head_dim)  # absorbing: W^UK and W^UV, one time each
counted = {"expanded": [n * flops["expanded"] / 1e6 for n in contexts]}
counted["absorbed"] = [(once + n * flops["absorbed"]) / 1e6 for n in contexts]

# %% [markdown]
# Counted is not measured. So here is one layer of V3's attention with all its 128 heads, timed on your machine: one new
# token, both forms, more and more cached tokens. (Only the layer's input is made narrow. That saves memory, and the part that
# is timed does not depend on it.)

# %%
from functools import partial

from dsv3lib.course.stopwatch import milliseconds

layer = MultiHeadLatentAttention(v3.replace(hidden_size=64, q_lora_rank=None), layer=0).to(session.device)
q = torch.randn(1, n_h, 1, v3.qk_head_dim, device=session.device)
past = torch.randn(1, contexts[-1], v3.latent_dim, device=session.device)
times = {form: [] for form in ("expanded", "absorbed")}
for form, row in times.items():
    attend = getattr(layer, form)
    row += [milliseconds(partial(attend, q, past[:, :n]), session.device) for n in contexts]
style.show(*figures.decode_by_context(contexts, times, counted))
faster, fewer = times["expanded"][-1] / times["absorbed"][-1], counted["expanded"][-1] / counted["absorbed"][-1]
measured(f"{contexts[-1]} cached tokens: absorbed is {faster:.0f} times faster, with {fewer:.0f} times fewer operations.")

# %% [markdown]
# Absorption has a price that does not grow: two matrices applied to the query and to the mixture, as much as unpacking a
# single token. That is why its curve starts flat, and why the ratio nears 121 only at long contexts. When a prompt is read
# (*prefill*), its many queries share one unpacking, and the expanded form wins. The library counts both and chooses.
#
# ## What a latent keeps
#
# Why can 512 numbers stand for 32,768 (128 heads, 128 numbers each in key and value)? Because the keys and values of a
# trained model do not use all that room. You can see it on a small model of your own. It reads bytes of Python's manual. Its
# latent is as wide as its hidden state, 64 numbers, so *nothing* forces it to compress.

# %%
from pydoc_data.topics import topics

text = torch.tensor(list("\n".join(topics.values()).encode()), device=session.device)
text, unseen = text[:-8192], text[-8192:].view(32, 256)
small = ModelConfig.preset("nano").replace(
    vocab_size=256, num_hidden_layers=2, first_k_dense_replace=2, num_nextn_predict_layers=0, initializer_range=0.05
)  # fmt: skip


def fresh(rank):
    return DeepSeekV3(small.replace(kv_lora_rank=rank), torch.Generator().manual_seed(SEED)).to(session.device)


steps = min(STEPS, 20) if FAST else STEPS
torch.set_num_threads(1)  # for so small a model, sharing the work between cores costs more than it saves
print(f"{small.num_hidden_layers} layers, {small.num_attention_heads} heads, hidden size {small.hidden_size}")

# %%
from dsv3lib.course.waiting import bar


def train(rank, top=5e-3):
    model, draw = fresh(rank), torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    with bar(f"training with a latent of {rank}", total=steps) as step:
        for s in range(steps):
            optimizer.param_groups[0]["lr"] = top * min(1, (s + 1) / 20) * (1 - s / steps)  # up, then down
            starts = torch.randint(len(text) - 128, (8, 1), generator=draw)
            batch = text[(starts + torch.arange(128)).to(session.device)]
            optimizer.zero_grad()
            model(batch, labels=batch).loss.backward()
            optimizer.step()
            step()
    return model.eval()


wide, tight = train(rank=64), train(rank=8)

# %% [markdown]
# Now collect the keys and values of all heads over text that the model has not seen, 128 numbers for each of 8,192 bytes, and
# ask how many *directions* they need. The singular value decomposition finds the best ones, in order. The control is the
# same model before training.

# %%
@torch.no_grad()
def keys_and_values(model, layer, ids):
    """Content keys and values of all heads, as rows: [tokens, heads × (d_h + value)]."""
    block, seen = model.model.layers[layer].self_attn, []
    hook = block.kv_a_layernorm.register_forward_hook(lambda module, given, latent: seen.append(latent))
    model(ids)
    hook.remove()
    return block.kv_b_proj(seen[0]).flatten(0, 1).cpu().double()


def variance_kept(rows):
    variance = torch.linalg.svdvals(rows - rows.mean(0)).square()
    return (variance.cumsum(0) / variance.sum()).tolist()


spectra = {"trained": wide, "untrained": fresh(64)}
spectra = {name: variance_kept(keys_and_values(m, 1, unseen))[:64] for name, m in spectra.items()}

# %% [markdown]
# Variance is not yet meaning. So cut the trained model's keys and values down to a few directions and see what its loss says:
# once to the best directions, once to random ones. Look at the code: `basis.T @ W` leads down to a few numbers and `basis`
# up again. The *rank* of a matrix is the number of directions that it can make, and a matrix of low rank *is* a way down and a
# way up.

# %%
import copy


@torch.no_grad()
def loss_with(model, directions=None, best=True):
    model = copy.deepcopy(model)
    for i, layer in enumerate(model.model.layers if directions else []):
        W = layer.self_attn.kv_b_proj.weight
        if best:
            rows = keys_and_values(wide, i, text[:8192].view(32, 256))
            basis = torch.linalg.svd(rows, full_matrices=False).Vh[:directions].T.to(W)
        else:
            basis = torch.linalg.qr(torch.randn(len(W), directions, generator=session.generator)).Q.to(W)
        W.copy_(basis @ (basis.T @ W))
    return model(unseen, labels=unseen).loss.item()

# %%
cuts = (1, 2, 4, 8, 16, 32)
losses = {"best directions": {r: loss_with(wide, r) for r in cuts}}
losses["random directions"] = {r: sum(loss_with(wide, r, best=False) for _ in range(3)) / 3 for r in cuts}
floors = {"whole model": loss_with(wide), "trained with a latent of 8": loss_with(tight)}
style.show(*figures.kept_by_directions(spectra, losses, floors))
enough = {name: 1 + sum(share < 0.9 for share in shares) for name, shares in spectra.items()}
measured(f"90 % of the variance: {enough['trained']} directions when trained, {enough['untrained']} before.")
best, random = (row[8] for row in losses.values())
measured(f"Loss: whole {floors['whole model']:.2f}, best 8 directions {best:.2f}, random 8 {random:.2f}.")
measured(f"Trained with a latent of 8 from the start: {floors['trained with a latent of 8']:.2f}.")

# %% [markdown]
# Three findings. Training itself makes keys and values low-rank. A few directions carry what the loss needs, but they must be
# the right ones. And a model that has to live with 8 numbers from the start finds its 8. (A small model on an easy text: this
# shows *why* it can work, not that 512 is enough for V3. That took DeepSeek's own training runs.)
#
# ## Break it
#
# **The position inside the latent.** Why the extra key? Suppose the content keys were turned by RoPE, as in most models: the
# score becomes $(R_t\mathbf q)^{\top} R_j W^{UK} \mathbf c_j$, with a turn $R_j$ that depends on the cached token. It stands
# between $\mathbf q$ and $W^{UK}$. Try to absorb in spite of it:

# %%
turned = RotaryEmbedding(tiny.replace(qk_rope_head_dim=d_h)).table(tokens, h)
c = cached[:, :d_c]
q, k = q_content[-1], torch.einsum("sc,hkc->hsk", c, W_UK)
true = torch.einsum("hk,hsk->hs", apply_rope(q, turned[-1]), apply_rope(k, turned))
absorbing = torch.einsum("hk,hkc->hc", q, W_UK) @ c.T
error = (absorbing - true).norm(dim=0) / true.norm(dim=0)  # for each cached token, over the heads
for distance in (0, 1, 4, 16):
    print(f"distance {distance:2}: the absorbed score is off by {100 * error[-1 - distance]:3.0f} %")
assert error[-1] < 1e-10 and error[:-1].mean() > 0.5

# %% [markdown]
# Right only at distance 0, where both turns are the same. To be right elsewhere, every latent would have to be unpacked,
# turned, and compared: the 33.6 million operations again.
#
# **Then turn the latent itself, before it is cached.** Absorption works again. But values are made from the same latent. The
# test: the same text, 100 positions later. Nothing should change, because all distances are the same.

# %%
def last_output(offset, turn_latent):
    at = RotaryEmbedding(tiny).table(offset + tokens, h)[offset:]
    cached, (content, position) = compress(h, at), queries(h, at)
    if turn_latent:
        here = RotaryEmbedding(tiny.replace(qk_rope_head_dim=d_c)).table(offset + tokens, h)[offset:]
        cached = torch.cat([apply_rope(cached[:, :d_c], here), cached[:, d_c:]], -1)
    return attend_expanded(content[-1], position[-1], cached)


for turn_latent in (False, True):
    before, after = last_output(0, turn_latent), last_output(100, turn_latent)
    change = 100 * (after - before).norm() / before.norm()
    print(f"{'latent turned' if turn_latent else 'as in V3':14}: the output changes by {change:3.0f} %")
assert change > 50

# %% [markdown]
# **Cache 512 numbers instead of 576.** Leave the position key out; after all it is only a ninth of the cache. The test: read
# the past backwards, with the last token in its place. Words in another order mean something else.

# %%
def reads(h, factor):
    cached, (content, position) = compress(h, turns), queries(h, turns)
    cached[:, d_c:] *= factor  # 0: as if the position keys had never been stored
    return attend_absorbed(content[-1], position[-1], cached)


backwards = torch.cat([h[:-1].flip(0), h[-1:]])
for what, factor in (("512 + 64", 1), ("512 alone", 0)):
    change = (reads(backwards, factor) - reads(h, factor)).norm() / reads(h, 1).norm()
    off = (reads(h, factor) - reads(h, 1)).norm() / reads(h, 1).norm()
    print(f"{what:9}: off by {100 * off:4.1f} %; read backwards, the output changes by {100 * change:4.1f} %")
assert change < 1e-10 and off > 0.05
blind = copy.deepcopy(wide)
for layer in blind.model.layers:
    layer.self_attn.kv_a_proj_with_mqa.weight.data[-small.qk_rope_head_dim :] = 0.0
measured(f"Your trained model: loss {loss_with(wide):.2f}; without position keys {loss_with(blind):.2f}.")

# %% [markdown]
# Without the position key, attention sees a bag of words.
#
# ## On trial
#
# Four things that people say of MLA.
#
# **"RoPE is applied to both latents."** Move the same tokens 100 positions on, and see which of the numbers change.

# %%
far = RotaryEmbedding(tiny).table(100 + tokens, h)[100:]
same = (compress(h, far) == compress(h, turns)).all(0)
print(f"cached: {same[:d_c].sum()} of {d_c} latent numbers stay, {same[d_c:].sum()} of {d_r} position numbers")
content, position = ((a == b).flatten(1).all(0) for a, b in zip(queries(h, far), queries(h, turns), strict=True))
print(f"queries: {content.sum()} of {heads * d_h} content numbers stay, {position.sum()} of {heads * d_r} position numbers")

# %% [markdown]
# **Refuted.** Both latents, and all that is made from them as content, are the same at every position, to the bit. Only the
# decoupled numbers turn.
#
# **"There are two latents, one for content and one for keys and values."** Nudge each latent and see what moves.

# %%
nudge = 0.1 * torch.randn(tokens, max(d_c, tiny.q_lora_rank), generator=session.generator, dtype=torch.float64)
c_kv, c_q = norm(h @ W_DKV.T), norm(h @ W_DQ.T)
made = {"queries": (c_q, W_UQ), "keys": (c_kv, W_UK), "values": (c_kv, W_UV)}
for name, nudged in (("W^DQ h", c_q), ("W^DKV h", c_kv)):
    moved = []
    for what, (latent, W) in made.items():
        other = latent + nudge[:, : latent.shape[1]] if latent is nudged else latent
        moved.append(f"{what} {'move' if not torch.equal(other @ W.mT, latent @ W.mT) else 'stay'}")
    print(f"{name:8} nudged: {', '.join(moved)}")

# %% [markdown]
# **Refuted.** One latent is for queries, and is forgotten at once. The other is for keys and values *jointly*: no key can be
# had without the latent of its value. That joint compression is the point.
#
# **"Absorption multiplies the weights together in advance."** One could: $W^{UQ}$ and $W^{UK}$ of a head make one matrix. What
# would it give, and what would it cost?

# %%
merged = torch.einsum("hkq,hkc->hqc", W_UQ, W_UK)  # [heads, d_c', d_c]
together = torch.einsum("q,hqc->hc", norm(h @ W_DQ.T)[-1], merged)
apart = torch.einsum("hk,hkc->hc", q_content[-1], W_UK)
torch.testing.assert_close(together, apart)
n_h, c_q, c_kv, head = v3.num_attention_heads, v3.q_lora_rank, v3.kv_lora_rank, v3.qk_nope_head_dim
in_turn, at_once = n_h * head * (c_q + c_kv), n_h * c_q * c_kv
print(f"V3, one layer: {in_turn:,} weights in turn, {at_once:,} merged: {at_once / in_turn:.1f} times as many to read")
assert at_once == 3 * in_turn

# %% [markdown]
# **Refuted.** It would give the same result from three times as many weights, which are read for every token. What is called
# absorption is only the order of the products. `attend_absorbed` above made no new matrix.
#
# **"The compression keeps all information."** Look at the model whose latent has 8 numbers. How many independent directions do
# its keys and values have? And how much of the hidden state can be told from the latent, by the best linear guess?

# %%
@torch.no_grad()
def told_by_latent(model):
    """Share of the variance of the layer's input that the best linear map of the latent explains."""
    block, seen = model.model.layers[1].self_attn, []
    hook = block.kv_a_proj_with_mqa.register_forward_hook(lambda m, given, out: seen.extend([given[0], out]))
    model(unseen)
    hook.remove()
    h, c = (one.flatten(0, 1).cpu().double() for one in seen)
    h, c = h - h.mean(0), (c - c.mean(0))[:, : model.config.kv_lora_rank]
    unexplained = h - c @ torch.linalg.lstsq(c, h).solution
    return 1 - (unexplained.square().sum() / h.square().sum()).item()


rows = keys_and_values(tight, 1, unseen)
print(f"keys and values: {rows.shape[1]} numbers a token, rank {int(torch.linalg.matrix_rank(rows, rtol=1e-5))}")
measured(f"The latent tells {100 * told_by_latent(tight):.0f} % of the hidden state.")
measured(f"Loss: {loss_with(tight):.2f} with a latent of 8, {loss_with(wide):.2f} with one of 64.")

# %% [markdown]
# **Refuted.** A bottleneck loses information: a part of the hidden state cannot be told from the latent. Training decides which
# part may be lost, and here the loss does not suffer.
#
# ## At scale
#
# Is absorbed decoding limited by arithmetic or by reading the cache? Divide the operations by the bytes that they read, and
# compare with the same ratio of a GPU. An H800 has 989 trillion BF16 operations and 3.35 trillion bytes a second (its data
# sheet). The cell then lists the decoding speeds that this project has measured.

# %%
import json
from pathlib import Path

from dsv3lib.course import at_scale

balance = 989e12 / 3.35e12
for n in (128, 16):
    flop = attention_flops_per_cached_token(v3.replace(num_attention_heads=n), "absorbed")
    intensity = flop / (2 * v3.latent_dim)
    print(f"{n:3} heads: {intensity:3.0f} operations a byte, {100 * intensity / balance:.0f} % of the GPU's {balance:.0f}")
results = {one.name: json.loads(one.read_text()) for one in sorted(Path("../data/results").glob("cpu-*.json"))}
rows = [(name, row) for name, result in results.items() for row in result["columns"] if row["work"] == "decode"]
say = "{} · {:,} cached: {:.0f} tokens/s, {:.1f} × transformers.".format
measured("\n".join(say(name, r["context"], r["ours_tokens_per_s"], r["ratio"]) for name, r in rows))
at_scale("mla_decode sm_90", "mla_decode_fp8 sm_90", operations=("mla_decode", "mla_decode fp8"))

# %% [markdown]
# With all 128 heads on one GPU, decoding is close to the point where arithmetic limits it. If the heads are split over eight
# GPUs, each still reads the whole latent, which cannot be split by heads: then memory limits it.
#
# The speeds are what this project has measured on a CPU (the file names the date, and holds the machine).
#
# The table shows the kernel that decodes on a GPU,
# [dsv3lib/kernels/attention/mla_decode.py](../dsv3lib/kernels/attention/mla_decode.py), compiled for Hopper while you wait; no GPU is needed for
# that. It brings a page of 64 latents into fast memory once and uses it twice, as keys and as values: that is absorption at
# work. *Rows* are heads times new tokens, *bytes* those of a number; *registers* hold a thread's numbers, *spilled* ones did
# not fit; *shared* is that fast memory; `wgmma` is Hopper's matrix instruction. With 16
# heads there are too few rows to fill it, so that form turns the product around and lets the tokens fill it instead.
#
# ## Exercises
#
# One dot is a warm-up, three need paper. Letters at the end of a name are its dimensions: **B** sequences, **T** cached tokens,
# **H** heads, **N** content numbers ($d_h$), **R** position numbers ($d_h^R$), **C** latent numbers ($d_c$). As in the released
# code, `nope` ("no position") is the content part and `rope` the position part; the position key is called *rotary key*.

# %%
exercise("mla.1")

# %%
def cache_bytes(layers, kv_rank, rope_dim, bytes_per_value):
    ...


check("mla.1", cache_bytes)

# %%
exercise("mla.2")

# %%
def absorbed_scores(q_BHN, latent_BTC, w_uk_HNC):
    ...


check("mla.2", absorbed_scores)

# %%
exercise("mla.3")

# %%
def attention_scores(q_nope, q_rope, k_nope, k_rope):
    ...


check("mla.3", attention_scores)

# %%
exercise("mla.4")

# %%
def decode_flops(heads, nope, rope, value, kv_rank):
    ...


check("mla.4", decode_flops)

# %% [markdown]
# ## What can go wrong
#
# - *The scale.* In the absorbed form keys have 576 numbers, but the scale is still that of 192. It belongs to the score, not
#   to the vectors that it is computed from. (At long contexts V3 multiplies it by a correction, notebook 02.)
# - *The order of norm and cache.* The latent is cached after its norm, the position key after its turn. Cache them before, and
#   both must be done again for each old token.
# - *"MLA makes training faster."* In training nothing is cached. There the latent costs a little; decoding earns it back.
# - *Splitting heads over GPUs.* It splits the weights but not the cache: every GPU needs the whole latent.
#
# ## Do you recall?
#
# <details><summary>What exactly is cached for a token, in one layer of V3?</summary>
# 512 numbers of the latent of keys and values, after its norm, and 64 numbers of the position key, after its turn.</details>
#
# <details><summary>Which equation makes absorption possible?</summary>
# q·(W c) = (Wᵀq)·c: a matrix between two vectors can be applied to either. Nothing is multiplied in advance.</details>
#
# <details><summary>Why does the position need 64 numbers of its own?</summary>
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
