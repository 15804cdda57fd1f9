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
# # 05 · Eight bits, one scale for each tile
#
# **You will have shown**
#
# 1. **that a scale of its own for each tile confines an outlier to that tile**; <!-- claim: tile -->
# 2. **that a short accumulator loses whole per cents of a long sum, and promotion gives them back**; <!-- claim: promotion -->
# 3. **that all three products of a linear layer run on eight bits, and the gradient hardly turns**. <!-- claim: three -->
#
# About 75 minutes. Paper: *DeepSeek-V3 Technical Report* (2024), §3.3, Figures 6 and 7. The subject is called *FP8 training
# with fine-grained (block-wise) quantisation*. You should know what a linear layer's backward pass is.

# %% tags=["parameters"]
STEPS = 40  # of the small training that makes a real activation
SEED = 1234
DEVICE = "cpu"
FAST = False  # True: fewer steps

# %%
import torch

from dsv3lib import DeepSeekV3, ModelConfig
from dsv3lib.course import check, exercise, measured, predict, reveal, setup, symbols, table
from dsv3lib.fp8 import formats
from dsv3lib.viz import fp8 as figures
from dsv3lib.viz import style
from dsv3lib.viz.live import live

session = setup(seed=SEED, notebook="05_fp8_tile_quantization", device=DEVICE)
v3, tiny = ModelConfig.preset("v3-671b"), ModelConfig.preset("tiny")
draw = session.generator

# %% [markdown]
# ## All the numbers there are
#
# V3's matrix products see numbers of one byte: **E4M3**, four bits of exponent, three of mantissa. That leaves so few values
# that one can draw every single one.

# %%
predict(
    "fp8.p1",
    "E4M3 reaches from 1/512 to 448. How many of its values lie from 256 to 448?",
    options=["7", "28", "64", "193"],
)

# %% tags=["claim:values"]
values = formats.values(formats.E4M3)
top = int(((values >= 256) & (values <= 448)).sum())
style.show(*figures.number_line())
near_one = values[(values >= 1) & (values <= 1.5)].tolist()
print(
    "sizes:",
    len(values),
    "· from 1 to 1.5:",
    near_one,
    "· the last ones:",
    values[-3:].tolist(),
)
assert (top, len(values)) == (7, 127)
reveal("fp8.p1", "7", because="Eight in each doubling, one fewer in the last: 256, 288, … 448.")

# %% [markdown]
# A value is rounded to its nearest neighbour, at worst by a sixteenth of itself. Below $2^{-6}$ the steps stop shrinking, and
# what is smaller than $2^{-10}$ becomes zero; what is larger than 448 is cut off. <!-- claim: values -->
#
# Activations are not made for that range, so each is divided by a **scale** before it is stored and multiplied by it after.
# The whole lesson is about who shares a scale.
#
# ## The mechanism
#
# Six values of one token on their way through a tile. The largest of the tile becomes `448`, the others follow, each falls on
# its nearest E4M3 value, and the scale brings them back.

# %%
from dsv3lib.viz.diagram import diagram

x = torch.randn(128, generator=draw)
scale = x.abs().max() / 448
stored = (x / scale).to(torch.float8_e4m3fn).float()
d, boxes = diagram("One tile: divide, round, multiply back", width=10, height=3.6), []
for y, name, row in ((2.6, "x", x), (1.4, "E4M3", stored), (0.2, "x again", stored * scale)):
    boxes.append(d.box(1.2, y + 0.25, name, "[128]", meaning="content"))
    d.numbers(3.4, y, [round(float(v), 3) for v in row[:6]], meaning="content")
d.arrow(boxes[0], boxes[1], "/ scale")
d.arrow(boxes[1], boxes[2], "× scale")
said = "Three rows of six numbers: as they are, as E4M3 stores them, and nearly as before."
told = f"This tile's scale is {float(scale):.5f}: its largest value becomes 448."
style.show(*d.done(alt=said, caption=told))

# %% [markdown]
# The letters, with V3's and `tiny`'s sizes. Every weight $W$ stands in *three* products, and each sums over another
# dimension.

# %%
symbols(
    *("d", "d_e"),
    ("N_C", "TILE", "", "values that share a scale; elements between two promotions"),
    ("Fprop", "x Wᵀ", "[T, d_e]", "forward: sums over the inputs d"),
    ("Dgrad", "dy W", "[T, d]", "gradient of the input: sums over the outputs d_e"),
    ("Wgrad", "dyᵀ x", "[d_e, d]", "gradient of the weight: sums over the tokens T"),
)

# %% [markdown]
# ## Write it yourself

# %%
exercise("fp8.1")


# %%
def quantize(x): ...


quantize = check("fp8.1", quantize)

# %% [markdown]
# ## The real thing
#
# The library's quantiser is [tiles_and_blocks.py](../dsv3lib/kernels/quantize/tiles_and_blocks.py), with a Triton kernel for a
# GPU and a reference for a CPU. It gives the same bytes as yours, up to the last bit of a scale.

# %%
from dsv3lib.kernels import quantize_blocks, quantize_tiles

x = torch.randn(64, 1024, generator=draw) * torch.logspace(-3, 3, 64)[:, None]
(mine, my_scales), (theirs, their_scales) = quantize(x), quantize_tiles(x)
assert torch.allclose(my_scales, their_scales)
same = float((mine.float() == theirs.float()).double().mean())
assert same > 0.999
print(f"values alike: {100 * same:.1f} %", "· scales:", list(their_scales.shape))

# %% [markdown]
# ## A real activation
#
# Now one that a model made. We train `tiny` on real text for a few dozen steps and catch what its first layer hands to
# `down_proj`: the product of SwiGLU, where large values grow.

# %%
from dsv3lib.course import bar
from dsv3lib.training.loop.settings import TrainingConfig
from dsv3lib.training.loop.trainer import Trainer
from dsv3lib.training.text.data import PackedStream
from dsv3lib.training.text.folder import open_domains
from dsv3lib.training.text.tokenizer import default_tokenizer

tokenizer, (domains, _) = default_tokenizer(), open_domains()
small = tiny.replace(vocab_size=tokenizer.vocab_size, num_nextn_predict_layers=0)
model = DeepSeekV3(small, torch.Generator().manual_seed(SEED))
stream = PackedStream(domains, tokenizer, seq_len=64, seed=SEED)

# %%
steps = 3 if FAST else STEPS
recipe = TrainingConfig(
    steps=steps, seed=SEED, batch_size=4, ema_decay=0, validation_batches=0, threads=1
)
with bar("training", total=steps) as step:
    for record in Trainer(model, stream, recipe):
        step(note=f"loss {record['losses']['main']:.2f}")
ids = stream.next_batch(4).input_ids
caught = []
down = model.model.layers[0].mlp.down_proj
handle = down.register_forward_pre_hook(lambda _m, inputs: caught.append(inputs[0].detach()))
model(ids)
handle.remove()
activation = caught[0].flatten(0, 1)[:96, :640].float().clone()
print("activation:", list(activation.shape), "· tiles a token:", activation.shape[1] // 128)

# %% [markdown]
# Models of billions of parameters grow *massive activations*: at a few tokens one channel is many thousand times larger than
# the rest. A model that trained for a minute does not, so two are planted: token `20` in channel `300`, token `60` in channel `50`.

# %%
size = 1e6 * activation.std()
activation[20, 300], activation[60, 50] = size, -size
predict(
    "fp8.p2",
    "Two of 61,440 values are huge. With one scale for all, how much of the rest is lost?",
    options=["the two tokens' values", "a tenth of all values", "nearly every value"],
)

# %% tags=["claim:tile"]
errors = figures.maps_of(activation)
gone = {name: float((e > 0.5).double().mean()) for name, e in errors.items()}
style.show(*figures.error_maps(activation, errors))
rows = [[n, round(100 * g, 1)] for n, g in gone.items()]
table(["scaling", "values lost (%)"], rows, varies=True)
whole, row, tile = gone.values()
assert whole > 0.9 and 0.01 < row < 0.1 and tile < row / 2
reveal("fp8.p2", "nearly every value", because="They fall under the smallest step of E4M3.")

# %% [markdown]
# **A scale of its own confines an outlier to its 128 values**: per tensor nearly all is lost, per row what shares
# the two tokens, per tile what shares the two tiles. <!-- claim: tile --> Weights get 128 × 128 blocks instead, since
# they have no such tokens and one block serves all three products.
#
# How large may an outlier be before it hurts? Move it.

# %%
clean = torch.randn(32, 512, generator=draw)
SIZES = [10.0**k for k in range(9)]


def others_lost(size, scaling):
    """Error of all other values, in per cent of their length, when one value has this size."""
    x = clean.clone()
    x[7, 200] = size
    kept = torch.ones_like(x, dtype=torch.bool)
    kept[7, 200] = False
    error = figures.maps_of(x)[scaling] * x.abs()
    return float(100 * error[kept].norm() / x[kept].norm())


curves = {name: [others_lost(size, name) for size in SIZES] for name in figures.SCALINGS}


# %% tags=["claim:outlier"]
def draw_outlier(outlier):
    return figures.outlier_errors(SIZES, curves, outlier)


live(draw_outlier, outlier=SIZES, start={"outlier": 1e5})
assert curves["one scale per tensor"][3] < 5 < 90 < curves["one scale per tensor"][7]
assert curves["one per tile"][7] < 0.2 * curves["one scale per tensor"][7]

# %% [markdown]
# Up to a thousand times the rest an outlier costs nothing: the exponent takes it. <!-- claim: outlier --> That is what
# separates FP8 from eight-bit integers. Beyond, only the tile saves the others.
#
# Is `amax/448` the best scale? It cuts nothing off, but it may round more than it has to.

# %%
exercise("fp8.2")


# %%
def best_scale(tile, candidates): ...


best_scale = check("fp8.2", best_scale)

# %% [markdown]
# ## Sums of many terms
#
# Hopper's FP8 tensor cores keep about 14 bits while they add (§3.3.2). They shift all terms to the largest exponent and cut
# off what falls out at the right. `accumulate_fp8` does the same, bit for bit as stated in
# [accumulate.py](../dsv3lib/fp8/accumulate.py).

# %%
from dsv3lib.fp8.accumulate import accumulate_fp8, relative_error


def worst(k, bits=14, promote_every=None, n=8):
    """Largest error of n x n sums of k products, relative to the sum of sizes."""
    seeds = (torch.Generator().manual_seed(s) for s in (1, 2))
    a, b = (torch.rand(n, k, generator=s).to(torch.float8_e4m3fn) for s in seeds)
    return float(relative_error(accumulate_fp8(a, b, bits, promote_every), a, b).max())


predict(
    "fp8.p3",
    "4096 products of numbers from 0 to 1 are summed with 14 bits. How large is the error?",
    options=["about 0.001 %", "about 0.1 %", "a few per cent", "about 30 %"],
)

# %% tags=["claim:promotion"]
KS = [128, 256, 512, 1024, 2048, 4096]
sums = {f"{bits} bits": [worst(k, bits) for k in KS] for bits in (14, 22, 25)}
sums["14 bits, promoted every 128"] = [worst(k, promote_every=128) for k in KS]
style.show(*figures.error_against_k(KS, sums))
short, mended = sums["14 bits"], sums["14 bits, promoted every 128"]
assert 0.01 < short[-1] < 0.05 and short[-1] > 10 * short[0]
assert mended[-1] < short[-1] / 50 and mended[-1] < 2 * mended[0]
reveal("fp8.p3", "a few per cent", because="The sum grows; what is added falls off its end.")

# %% [markdown]
# **A short accumulator loses whole per cents of a long sum**, the more the longer it is, and starting anew after each 128
# elements keeps it flat. <!-- claim: promotion --> Readers of the released code keep asking what other widths would do:

# %% tags=["claim:bits"]
widths = {bits: worst(2048, bits) for bits in (13, 14, 15, 22, 25, 34)}
every = {n: worst(2048, 14, n) for n in (64, 128, 256)}
rows = [[f"{b} bits, never promoted", f"{100 * e:.5f}"] for b, e in widths.items()]
rows += [[f"14 bits, every {n}", f"{100 * e:.5f}"] for n, e in every.items()]
table(["accumulator, K = 2048", "largest error (%)"], rows)
assert widths[13] > 1.7 * widths[14] > 1.7 * 1.7 * widths[15]
assert widths[25] == widths[34] and every[64] < every[128] < every[256]

# %% [markdown]
# Each bit halves the error. From 25 on nothing changes here, because the register itself is FP32. <!-- claim: bits -->
# 34 is what makes *any* 32 products exact: the exponents of two E4M3 values sum to at most 16, the smallest
# product is $2^{-18}$. Now write the loop that V3 runs instead.

# %%
exercise("fp8.3")


# %%
def promoted(a, b, n_c, short): ...


promoted = check("fp8.3", promoted)

# %%
a, b = torch.rand(4, 1024, generator=draw), torch.rand(4, 1024, generator=draw)
a, b = a.to(torch.float8_e4m3fn).float(), b.to(torch.float8_e4m3fn).float()
loop = promoted(a, b, 128, lambda x, y: accumulate_fp8(x, y, 14, None).float())
assert torch.allclose(loop.double(), accumulate_fp8(a, b, 14, 128), rtol=1e-6)
print("your loop is the library's promotion:", True)

# %% [markdown]
# ## A whole layer, a whole model
#
# `Recipe.named("tile")` puts the paper's recipe under every linear layer but the few that stay: inputs and gradients in
# tiles, weights in blocks, both quantised anew along each product's own sum
# ([recipe.py](../dsv3lib/fp8/recipe.py), [products.py](../dsv3lib/fp8/products.py)).

# %%
from collections import Counter
from unittest import mock

from dsv3lib.fp8 import Recipe, products
from dsv3lib.fp8.effect import effects, using


def count_products(recipe):
    """How often each FP8 product is taken in one training step."""
    calls, plain = Counter(), {name: getattr(products, name) for name in products.NAMES}
    spies = {n: lambda *x, n=n, f=f: calls.update([n]) or f(*x) for n, f in plain.items()}
    with using(model, recipe), mock.patch.multiple(products, **spies):
        model(ids, labels=ids).loss.backward()
    return calls


# %% tags=["claim:three"]
three = Recipe.named("tile")
calls = count_products(three)
tile = effects(model, ids, {"tile": three})["tile"]
kinds = ("fprop", "dgrad", "wgrad")
rows = [[kind, calls.get(kind, 0), calls.get(f"grouped_{kind}", 0)] for kind in kinds]
table(["product", "of single layers", "of the experts"], rows)
layers = small.num_hidden_layers
assert [row[1] for row in rows] == [8 * layers] * 3
assert [row[2] for row in rows] == [2 * (layers - small.first_k_dense_replace)] * 3
assert tile.cosine["all"] > 0.9 and abs(tile.loss_error) < 0.01
measured(
    f"loss error {100 * tile.loss_error:+.4f} %, gradients' cosine {tile.cosine['all']:.4f}"
)

# %% [markdown]
# **All three products run on eight bits**, in every layer and for the experts, and the gradient keeps its direction.
# <!-- claim: three --> But does a *run* notice?
#
# ## Does it change the loss?
#
# Comparing two runs is harder than it looks: routing amplifies every rounding, so that after some steps two runs differ
# whatever their arithmetic. A recorded study (`benchmarks/fp8_loss.py`) therefore asks three ways. First, along one FP32 run,
# on its own weights and the same batch, so that nothing can drift:

# %%
import json

from dsv3lib.course import data_folder

newest = sorted((data_folder() / "results").glob("fp8-loss-*.json"))[-1]
study = json.loads(newest.read_text())
arms = ("tile", "tensor", "tile+block_gradients", "two bits", "one bit")
style.show(*figures.along_the_run(study["weights"], arms, study["about"]["claim"]))

# %% tags=["claim:study"]
bound = study["about"]["claim"]
found = {arm: [row["effects"][arm] for row in study["weights"]] for arm in arms}
worst_loss = {arm: max(abs(e["loss_error"]) for e in found[arm]) for arm in arms}
turn = {arm: [1 - e["cosine"]["experts"] for e in found[arm]] for arm in arms}
angle = {arm: sum(turn[arm]) / len(turn[arm]) for arm in arms}
table(
    ["recipe", "largest loss error (%)", "1 - cosine, experts, mean"],
    [[arm, round(100 * worst_loss[arm], 3), round(angle[arm], 4)] for arm in arms],
)
assert max(worst_loss["tile"], worst_loss["tensor"]) < bound
assert angle["two bits"] > 2 * angle["tile"]

# %% [markdown]
# The paper's recipe stays within its 0.25 % at every step; the control with two bits of mantissa turns the experts' gradient
# more than twice as far. <!-- claim: study --> So does one scale for a whole tensor: a model so small
# and young has no outliers. <!-- claim: study --> So plant some, as trained models have them: one channel, one token in 32, larger and larger. <!-- claim: planted -->

# %% tags=["claim:planted"]
head = [f"{r} ({what})" for r in ("tile", "tensor") for what in ("loss error, %", "cosine")]
rows, worse = [], {}
for row in study["outliers"]:
    effects_of = [row["effects"][arm] for arm in ("tile", "tensor")]
    worse[row["size"]] = [(abs(e["loss_error"]), e["cosine"]["all"]) for e in effects_of]
    cells = [x for e in effects_of for x in (100 * e["loss_error"], e["cosine"]["all"])]
    rows.append([f"{row['size']:.0e}", *(round(x, 3) for x in cells)])
table(["times larger", *head], rows)
assert study["about"]["plan"]["outliers"]["every_token"] == 32
(tile_loss, tile_cosine), (tensor_loss, tensor_cosine) = worse[2e5]
assert tile_loss < bound < tensor_loss and tensor_cosine < 0.8 < 0.95 < tile_cosine

# %% [markdown]
# **Where outliers are large, tiles keep the loss within the paper's bound and one scale for the tensor does not**
# <!-- claim: planted -->; the gradient's direction goes first. Further on the gradient is lost for tiles too: nothing is
# robust to everything. Second, run against run, over seeds, beside a control *without any FP8* whose
# start differs by a millionth:

# %% tags=["claim:runs"]
style.show(*figures.losses_with_band(study))
models = {"runs": "nano", "dense": "nano, dense", "tiny": "tiny"}
rows = [
    [f"{models[part]}: {arm}", s["seeds"],
     *(round(100 * s[k], 3) for k in ("mean", "low", "high")), s["verdict"]]
    for part in models for arm, s in study[part]["summary"].items() if "mean" in s
]  # fmt: skip
table(["model and arm", "seeds", "mean (%)", "from", "to", "about 0.25 %"], rows)
by = {(part, arm): s for part in models for arm, s in study[part]["summary"].items()}
assert by["runs", "tile"]["verdict"] == by["dense", "tile"]["verdict"] == "within"
assert by["runs", "tile"]["seeds"] == by["dense", "tile"]["seeds"] == 16
assert by["runs", "two bits"]["verdict"] == by["tiny", "tile"]["verdict"] == "undecided"
assert by["dense", "two bits"]["verdict"] == "within"
assert by["dense", "jitter"]["deviation"] < 0.01 * by["runs", "jitter"]["deviation"]

# %% [markdown]
# Look at the jittered rows first: with routing, runs that differ in nothing end far apart; without, they stay together.
# **Over 16 seeds the paper's recipe is within its bound, with routing and without.** <!-- claim: runs --> But so are two bits of
# mantissa without routing, which the first measure told apart at once: sixty steps of a small model are a blunt instrument, and
# alone would prove nothing. At `tiny`, with three seeds, nothing is decided. Gradients in blocks, with which DeepSeek saw a
# large model diverge, do nothing of the sort here. <!-- claim: runs -->
#
# ## What is kept for the backward pass
#
# Wgrad needs the layer's input once more. It is kept in FP8, and its tiles lie the wrong way: along the inputs, where
# Wgrad sums over the tokens. So they are turned, for which their scales are powers of two.

# %% tags=["claim:bytes"]
import copy

from dsv3lib.fp8.activations import activation_bytes

half = copy.deepcopy(model).bfloat16()
kept = {"FP32": activation_bytes(model, ids), "BF16": activation_bytes(half, ids)}
with using(half, Recipe.named("tile")):
    kept["FP8 in BF16"] = activation_bytes(half, ids)
style.show(*figures.bytes_by_part(kept))
saved = {name: sum(parts.values()) / 2**20 for name, parts in kept.items()}
print(" · ".join(f"{name}: {mib:.1f} MiB" for name, mib in saved.items()))
assert kept["FP8 in BF16"]["experts"] < 0.6 * kept["BF16"]["experts"]

# %% [markdown]
# The experts' share falls to less than 0.6 of what BF16 keeps; what attention and the norms keep for themselves stays.
# <!-- claim: bytes -->
#
# ## Break it
#
# **The tile not turned.** Use the cached tiles in Wgrad as they are, their scales applied along the wrong
# dimension: <!-- claim: turned -->

# %% tags=["claim:turned"]
from dsv3lib.fp8.operands import Operand, along_columns, along_rows, restored

x = torch.randn(256, 256, generator=draw) * torch.logspace(-2, 2, 256)[:, None]
dy = torch.randn(256, 128, generator=draw)
exact = dy.T @ x
cached = along_rows(x, power_of_two=True)
turned = along_columns(restored(cached), power_of_two=True)
wrong = Operand(turned.values, cached.scales)  # the scales of the tiles before they were turned
off = {}
for name, operand in (("turned", turned), ("scales not turned", wrong)):
    made = products.wgrad(along_columns(dy), operand, torch.float32)
    off[name] = float((made - exact).norm() / exact.norm())
table(["Wgrad", "error (%)"], [[name, round(100 * e, 1)] for name, e in off.items()])
assert off["turned"] < 0.08 and off["scales not turned"] > 0.5

# %% [markdown]
# **Ordinary scales for what is turned.** With powers of two nothing changes but what underflows; with amax/448 every
# value is rounded a second time. <!-- claim: underflow -->

# %% tags=["claim:underflow"]
changed = {}
for power_of_two in (True, False):
    before = restored(along_rows(x, power_of_two=power_of_two))
    after = restored(along_columns(before, power_of_two=power_of_two)).T
    moved = after != before
    changed[power_of_two] = (
        float(moved.double().mean()),
        float((after - before).norm() / before.norm()),
    )
rows = [
    [name, *(round(100 * share, 3) for share in changed[key])]
    for name, key in (("powers of two", True), ("amax/448", False))
]
table(["scales", "values changed (%)", "error (%)"], rows)
assert changed[True][1] < 1e-3 < changed[False][1]

# %% [markdown]
# **Yesterday's maximum.** Some recipes take the scale from earlier steps, to save a pass. Today's values may be larger: <!-- claim: yesterday -->

# %% tags=["claim:yesterday"]
yesterday = clean.abs().max() / 448
today = clean * 3
cut = (today / yesterday).to(torch.float8_e4m3fn).float() * yesterday
beyond = float((today.abs() > 448 * yesterday).double().mean())
loss = float((cut - today).norm() / today.norm())
online = float((restored(along_rows(today)) - today).norm() / today.norm())
rows = [["yesterday's", round(100 * loss, 1)], ["online", round(100 * online, 1)]]
table(["scale", "error (%)"], rows)
assert beyond > 0 and loss > 2 * online

# %% [markdown]
# ## On trial
#
# *"FP8 halves the accuracy."* Half the bits of BF16; is it half of anything that matters?

# %% tags=["claim:halves"]
w = torch.randn(256, 512, generator=draw) / 512**0.5
off = (restored(along_rows(clean)) - clean).abs() / clean.abs().clamp(min=1e-6)
one_value = float(off.median())
y = products.fprop(along_rows(clean), Operand(*quantize_blocks(w)), torch.float32)
product = float((y - clean @ w.T).norm() / (clean @ w.T).norm())
rows = [["a value, median", round(100 * one_value, 1)]]
rows += [["a product, K = 512", round(100 * product, 1)]]
rows += [["the loss, at worst (recorded)", round(100 * worst_loss["tile"], 3)]]
table(["what", "error (%)"], rows)
assert worst_loss["tile"] < one_value / 5

# %% [markdown]
# Refuted: a value is off by per cents, the loss by less than a fifth of one value's error, because errors of many
# signs are summed. <!-- claim: halves -->
#
# *"Everything is FP8."* Count what is not:

# %% tags=["claim:everything"]
from dsv3lib.linear import PLAIN, Linear

tile_recipe = Recipe.named("tile")
named = [name for name, module in model.named_modules() if isinstance(module, Linear)]
high = [name for name in named if tile_recipe.at(name) is PLAIN]
gates = [name for name, _ in model.named_modules() if name.endswith(".gate")]
assert "lm_head" in high and all(tile_recipe.at(name) is PLAIN for name in gates)
print("linear layers:", len(named), "· not FP8:", high, "· gates, not FP8:", len(gates))

# %% [markdown]
# Refuted: head, gates, embedding, norms and attention's own products stay <!-- claim: everything -->, and so do master
# weights and their gradients; Adam's moments are BF16 (§3.3.3).
#
# *"Fine-grained scales are free."* Count bytes. *"Sums in FP32 are exact enough anyway."* Of FP8 products, on a tensor core?

# %% tags=["claim:free", "claim:fp32"]
per_value = {"BF16": 2.0, "FP8, tiles of 128": 1 + 4 / 128, "FP8, tiles of 32": 1 + 4 / 32}
rows = [[n, round(b, 4), f"{100 * (b / 1 - 1):.1f} %"] for n, b in per_value.items()]
table(["stored as", "bytes a value", "over one byte"], rows)
assert abs(per_value["FP8, tiles of 128"] - 1.03125) < 1e-9
in_fp32, in_14_bits = worst(4096, 34), worst(4096)
rows = [["34 bits, an FP32 register", f"{100 * in_fp32:.6f}"]]
rows += [["as Hopper sums", f"{100 * in_14_bits:.2f}"]]
table(["sum of 4096", "largest error (%)"], rows)
assert in_fp32 < 1e-5 and in_14_bits > 0.01

# %% [markdown]
# Scales are nearly free in memory: 3.1 % more. <!-- claim: free --> Not in time: each slice of 128 needs its own scaling and
# addition outside the tensor cores, one fused operation for each of its results, and that is what a Hopper kernel has to
# hide. How well ours does was not measured yet. And exact enough is true of FP32, which is not what the unit has inside.
# <!-- claim: fp32 -->
#
# *"E5M2 is for gradients."* The habit before V3: gradients range further, so give them the fifth exponent bit. With a
# scale for each tile, is the range still needed?

# %% tags=["claim:e5m2"]
spread = torch.randn(64, 512, generator=draw) * torch.logspace(-4, 4, 64)[:, None]
tiles = spread.unflatten(-1, (-1, 128))
lost = {}
for format in (formats.E4M3, formats.E5M2):
    scales = tiles.abs().amax(-1, keepdim=True).double() / format.largest
    back = formats.round_to(tiles / scales, format) * scales
    lost[format.name] = float((back - tiles).norm() / tiles.double().norm())
table(["gradients in", "error (%)"], [[name, round(100 * e, 2)] for name, e in lost.items()])
assert lost["E5M2"] > 1.8 * lost["E4M3"]

# %% [markdown]
# Refuted, given tiles: the range is the scale's business, and the mantissa bit halves the error. <!-- claim: e5m2 -->
#
# ## What stays in high precision
#
# Which parts would cost most? You decide, from measured errors.

# %%
exercise("fp8.4")


# %%
def keep_high(errors, budget): ...


keep_high = check("fp8.4", keep_high)

# %% [markdown]
# ## At scale
#
# The Triton quantiser reads a tile once, finds its largest size among bit patterns (they sort as the sizes do, with NaN on
# top), and multiplies by one inverse a tile; a division for each value would cost more than the memory it saves. In
# [tiles_and_blocks.py](../dsv3lib/kernels/quantize/tiles_and_blocks.py), line by line: `tile` numbers the tiles of a program;
# `widened(tl.load(…))` fetches `[TILES, 128]`; `scale_and_inverse(tl.max(size_bits(tiles), 1), …)` is the one division;
# `to_e4m3(tiles * inverse[:, None])` rounds; two stores write values and scales. The product then scales each slice of `128` as
# it is promoted ([fp8_slices.py](../dsv3lib/kernels/matmul/fp8_slices.py)).

# %%
from dsv3lib.course import at_scale, progress

operations = ("quantize_tiles", "gemm_fp8")
at_scale("quantize_tiles e4m3 bf16", "gemm_fp8 bf16", operations=operations)
progress()

# %% [markdown]
# ## What can go wrong
#
# - *Values come back divided by the scale twice.* `weight_scale_inv` is what one multiplies by, in spite of its name.
# - *NaN in one tile.* A quantiser that drops NaN in its maximum hides it; ours makes the whole tile NaN.
# - *Odd widths.* V3's `kv_a_proj_with_mqa` has `576` rows, no multiple of `128`: its last block is cut short, not padded away.
# - *A GPU without FP8 units.* Below compute capability `8.9` the recipe is refused; a CPU computes the same in FP32.
#
# ## Do you recall?
#
# <details><summary>Why tiles for activations and blocks for weights?</summary>
# Activations have outliers at single tokens, and a tile confines them. Weights have none, and a square block serves all three
# products, transposed or not.</details>
#
# <details><summary>Why are the scales of cached inputs powers of two?</summary>
# The tiles are turned for Wgrad. Between two powers of two a value only changes its exponent, so it is not rounded
# again unless it underflows.</details>
#
# <details><summary>What does promotion do, and why after `128`?</summary>
# It moves the sum out of the short register into FP32. A scale is right for `128` elements anyway, so the slice has to be
# taken out there to be scaled.</details>
#
# ## Where next
#
# Train with it: `dsv3 train --preset nano --steps 200 --fp8 tile`. The cache of latents can be FP8 too:
# `LatentCache(cfg, format="fp8")` ([cache.py](../dsv3lib/layers/cache.py)).
