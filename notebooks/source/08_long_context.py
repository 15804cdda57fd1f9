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
# # 08 · A longer context
#
# **You will have shown**
#
# 1. **that a longer context takes two corrections, one of the angles and one of the softmax**; <!-- claim: two -->
# 2. **that a model without them falls apart behind the length that it was trained at, and that a few steps with them are
#    enough to read on**; <!-- claim: extended -->
# 3. **that a perfect needle map says little of how well a long text is read**. <!-- claim: needle -->
#
# About 60 minutes. Paper: *DeepSeek-V3 Technical Report* (2024), §4.3 and Figure 8; *YaRN* (Peng et al., 2023). V3 was trained
# at 4,096 tokens and reads 131,072.

# %% tags=["parameters"]
STEPS = 150  # of the small training
SEED = 1234
DEVICE = "auto"  # or "cpu", "cuda"
FAST = False  # True: fewer steps

# %%
import math

import torch

from dsv3lib import ModelConfig
from dsv3lib.course import bar, check, exercise, predict, reveal, setup, symbols, table
from dsv3lib.viz import long_context as figures
from dsv3lib.viz import needle as maps
from dsv3lib.viz import style
from dsv3lib.viz.live import live

session = setup(seed=SEED, notebook="08_long_context", device=DEVICE)
v3 = ModelConfig.preset("v3-671b")
draw = session.generator

# %% [markdown]
# ## In more company
#
# A token in the context is just what the next word needs. Its score stands out so far that it gets *half* of the attention among
# 4,096 tokens; all the others have a score of 0. Now the context is 131,072 tokens long, and the same token has the same score.
# <!-- claim: company -->

# %%
predict(
    "long.p1",
    "How much attention does it still get?",
    options=["half, as before", "about a third", "about a tenth", "about 3 percent"],
)

# %% tags=["claim:company"]
def share(score, tokens):
    return 1 / (1 + (tokens - 1) * math.exp(-score))


lead = math.log(4095)  # e^lead weighs as much as the 4,095 others together
print(f"a score of {lead:.2f}: {share(lead, 4096):.0%} of 4,096 tokens' attention,")
print(f"{share(lead, 131_072):.1%} of 131,072 tokens'")
assert round(share(lead, 131_072), 2) == 0.03
reveal("long.p1", "about 3 percent", because="There are 32 times as many others to share with.")

# %% [markdown]
# So a long context has two troubles. One is *where* a token stands: its angles. [02](02_decoupled_rope.ipynb) ended with pairs
# that never turn round while a model is trained; further on they would meet angles that nobody has ever trained. The other is *how
# sharply* attention looks, as you have just seen. **YaRN** has a correction for each, and they are easily confused.
#
# ## The mechanism
#
# V3 has 32 rotary pairs, the first fast and the last slow. Here is how long each takes for a turn, as trained and in three ways
# to stretch the context 40 times. <!-- claim: ramp -->

# %%
from dsv3lib.layers.rope import rope_frequencies, yarn_ramp
from dsv3lib.training.loop.context_extension import extended_config

plain = v3.replace(rope_scaling=None, max_position_embeddings=4096)
ways = {"YaRN": "yarn", "interpolation": "interpolation", "NTK-aware": "ntk"}
speeds = {"as trained": rope_frequencies(plain)[0]} | {
    name: rope_frequencies(extended_config(plain, way, 4096, 163_840, 40.0))[0]
    for name, way in ways.items()
}
style.show(
    *figures.wavelengths({name: v.tolist() for name, v in speeds.items()}, 4096, 163_840)
)

# %% [markdown]
# *Position interpolation* slows every pair alike: no angle is new, but neighbours are now 40 times closer together, and the model
# has learnt to tell neighbours by its fast pairs. *NTK-aware* scaling takes a larger base, so that the slowest pair is slowed 40
# times and the fastest not at all. *YaRN* goes by parts: a pair that turns more than 32 times within the trained context stays as
# it is, one that does not even turn once is slowed by the whole factor, and between them lies a ramp.
# <!-- claim: angles, ramp -->

# %%
turns = [4096 * v / (2 * math.pi) for v in speeds["as trained"].tolist()]
numbers = (0, 5, 10, 14, 18, 22, 23, 31)
table(
    ["pair of V3's 32", *map(str, numbers)],
    [["turns within 4,096 tokens", *(f"{turns[n]:.1f}" for n in numbers)]],
)

symbols(
    ("s", "factor", "", "how many times longer the context becomes, 40 in V3"),
    ("L", "trained", "", "tokens of the context trained before, 4,096 in V3"),
    "d_h", "d_h^R",
    (r"\theta_i", "speeds", "[d_h^R / 2]", "radians a token of pair i"),
    (r"\gamma", "ramp", "[d_h^R / 2]", "0 keeps a pair's speed, 1 divides it by s"),
    ("t", "temperature", "", "0.1 ln s + 1"),
)  # fmt: skip

# %% [markdown]
# ## The first correction: angles
#
# $$\theta_i' = (1-\gamma_i)\,\theta_i + \gamma_i\,\theta_i / s$$

# %%
exercise("long.1")


# %%
def yarn_speeds(speeds, low, high, factor): ...


yarn_speeds = check("long.1", yarn_speeds)

# %% [markdown]
# Where do the two ends lie for V3? Pair $i$ turns $L\theta_i/2\pi$ times; the released code rounds the first end down and the
# second one up.

# %% tags=["claim:ramp"]
low = max(i for i, n in enumerate(turns) if n >= 32)
high = next(i for i, n in enumerate(turns) if n < 1)
print(f"pairs 0 to {low} stay, pairs {high} to 31 are slowed 40 times")
mine = yarn_speeds(speeds["as trained"], low, high, 40.0)
torch.testing.assert_close(mine, speeds["YaRN"], rtol=1e-6, atol=0)
torch.testing.assert_close(rope_frequencies(v3)[0], speeds["YaRN"])
assert (low, high) == (10, 23)

# %% [markdown]
# **The ramp lies between pairs 10 and 23 of 32.** <!-- claim: ramp --> Move the two settings, and see which pairs are slowed.

# %%
from dsv3lib.rope_settings import YarnScaling


def draw_ramp(factor, trained):
    ramp = yarn_ramp(YarnScaling(float(factor), trained), 64, 10_000.0)
    slowed = 1 / (1 - ramp + ramp / factor)
    return figures.ramp_of(slowed.tolist(), factor, trained)


live(draw_ramp, factor=[1, 2, 4, 8, 16, 32, 40, 64], trained=[512, 1024, 2048, 4096, 8192],
     start={"factor": 40, "trained": 4096}, labels={"trained": "trained context"})  # fmt: skip

# %% [markdown]
# What does each way do to the angles? Take the slow pairs at the end of the long context, and the fast pairs of two neighbours.

# %%
predict(
    "long.p2",
    "Which way leaves the fast pairs as they were, and meets no new angle far away?",
    options=["interpolation", "NTK-aware", "YaRN", "none of them"],
)

# %% tags=["claim:angles"]
seen = 4096 * speeds["as trained"]  # the largest angle of each pair while training
rows, kept, new = [], {}, {}
for name, v in {"no change": speeds["as trained"], **speeds}.items():
    if name == "as trained":
        continue
    fast, slow = v[:11] / speeds["as trained"][:11], 163_840 * v[23:] / seen[23:]
    kept[name], new[name] = float(fast.min()), float(slow.max())
    rows.append([name, f"{kept[name]:.3f}", f"{new[name]:.2f}"])
table(["way", "fast pairs: least speed left", "slow pairs: largest angle over trained"], rows)
assert kept["YaRN"] == 1 and new["YaRN"] < 1.001
assert kept["interpolation"] < 0.03 and new["no change"] > 39 and new["NTK-aware"] > 1.5
reveal("long.p2", "YaRN", because="By parts: fast pairs are let alone, slow ones slowed.")

# %% [markdown]
# **By parts, fast pairs keep their speed and slow pairs meet no angle that training did not show.** <!-- claim: angles --> (The
# pairs on the ramp are a compromise; they turned at least once, so no single angle is new to them.)
#
# ## The second correction: the softmax
#
# How much does a token have to stand out in a longer context? Solve for it.

# %%
exercise("long.3")


# %%
def score_needed(share, tokens): ...


score_needed = check("long.3", score_needed)

# %% [markdown]
# A trained model has learnt scores for its own length. YaRN makes all of them larger by one number, which was found by
# experiment: queries and keys are each multiplied by $t = 0.1 \ln s + 1$.

# %%
exercise("long.2")


# %%
def softmax_scale(width, factor): ...


softmax_scale = check("long.2", softmax_scale)

# %% tags=["claim:two"]
width = v3.qk_nope_head_dim + v3.qk_rope_head_dim
times = softmax_scale(width, 40.0) * math.sqrt(width)
on_cos_and_sin = rope_frequencies(v3)[1]
print(f"cos and sin are multiplied by {on_cos_and_sin}, scores by {times:.5f}")
print(f"so the softmax's scale is {v3.softmax_scale:.6f} instead of {width**-0.5:.6f}")
assert on_cos_and_sin == 1.0 and round(times, 5) == 1.87385
assert math.isclose(softmax_scale(width, 40.0), v3.softmax_scale)
assert not torch.equal(rope_frequencies(v3)[0], speeds["as trained"])

# %% [markdown]
# **Two corrections, in two places: the speeds of the pairs, and the scale of the softmax.** <!-- claim: two --> A port may look
# for the temperature at cos and sin, where YaRN's own code has it and where V3's factor is exactly 1: `mscale` and
# `mscale_all_dim` are equal, and their quotient stands there. Were it at cos and sin, it would multiply only the rotary part of a
# score. V3 wants all of it.

# %% tags=["claim:square"]
contexts = [4096 * 2**k for k in range(6)]
scales = {"no temperature": 1.0, "once": times**0.5, "squared, as in V3": times}
shares = {name: {n: share(lead * x, n) for n in contexts} for name, x in scales.items()}
style.show(*figures.share_of_attention(shares))
ends = [row[131_072] for row in shares.values()]
print(*(f"{name}: {100 * x:.0f} %" for name, x in zip(shares, ends, strict=True)), sep="; ")
assert ends[0] < 0.04 and ends[1] < 0.5 < 0.9 < ends[2]

# %% [markdown]
# **Without the square the token of the beginning does not keep its half at 128K; with it, it gets more.** <!-- claim: square -->
#
# ## Does position 0 show it?
#
# A port is often tested on a short prompt. Compare the turns of YaRN with those of the frequencies as they were:

# %% tags=["claim:zero"]
differ = {}
for position in (0, 1, 8, 100, 5000):
    a, b = position * speeds["YaRN"], position * speeds["as trained"]
    differ[position] = float(torch.hypot(a.cos() - b.cos(), a.sin() - b.sin()).max())
rows = [["largest difference of a turn", *(f"{x:.3f}" for x in differ.values())]]
table(["position", *map(str, differ)], rows)
assert differ[0] == 0 and differ[8] < 0.1 < 1 < differ[5000]

# %% [markdown]
# **At position 0 every way is the same, and in the first few positions nearly so.** <!-- claim: zero --> A test has to look far
# out. (The library's own goes to position 163,839, in FP64.)
#
# ## Extend a model yourself
#
# V3 was extended (§4.3) in two phases of 1,000 steps each, at 32K and then at 128K tokens, with YaRN set for the whole way from the
# beginning and the learning rate that training had ended with. The command does the same with any run that you have trained:
#
# ```
# dsv3 train --from runs/mine --extend 4096 --yarn-factor 8
# ```
#
# Here is a model that is small enough to be trained now: at 64 tokens, on Python's manual. Then it reads 512, once with no
# change and once with YaRN, before and after a few steps. <!-- claim: small -->

# %%
from dsv3lib import DeepSeekV3
from dsv3lib.studies import needle_study
from dsv3lib.studies.needle import loss_by_position
from dsv3lib.studies.small_models import manual, rows_of, small_config, train
from dsv3lib.training.loop.context_extension import phases

torch.set_num_threads(1)  # for so small a model, sharing the work costs more than it saves
text, unseen = manual()
short = small_config(256, 16, max_position_embeddings=64, rope_theta=500.0)
small, rows = DeepSeekV3(short, draw), torch.Generator().manual_seed(SEED)


def text_loss(model, length):
    ids = rows_of(text, 1024 // length, length, rows)
    return model(ids, labels=ids).loss


# %%
steps = min(STEPS, 20) if FAST else STEPS
with bar("training at 64 tokens", total=steps) as step:
    for loss in train(small, steps, lambda model, _: text_loss(model, 64)):
        step(note=f"loss {loss:.2f}")

# %%
new = rows_of(unseen, 8, 512, torch.Generator().manual_seed(SEED))
plan = phases(64, 512, 2 if FAST else 12, 1024)
before, after = {}, {}
with bar("extending", total=2 * sum(phase.steps for phase in plan)) as step:
    for way in ("none", "yarn"):
        longer = extended_config(short, way, 64, 512, 8.0)
        model = needle_study.with_config(small, longer)
        before[way] = loss_by_position(model, new, 8)
        for n, count in [(phase.length, phase.steps) for phase in plan]:
            losses = lambda model, _, n=n: text_loss(model, n)  # noqa: E731
            for _ in train(model, count, losses, peak=5e-4, constant=True):
                step()
        after[way] = loss_by_position(model, new, 8)

# %% tags=["claim:small"]
lines = [[way, when, *(f"{x:.2f}" for x in found)]
         for when, one in (("before", before), ("after", after))
         for way, found in one.items()]  # fmt: skip
head = ["way", "extension", *(f"from {64 * k}" for k in range(8))]
table(head, lines, caption="Loss by position (nats a byte)", varies=True)
if not FAST:
    assert before["none"][-1] > before["none"][0] + 0.1
    assert after["yarn"][-1] < before["none"][-1]

# %% [markdown]
# ## Needle in a haystack
#
# The paper's Figure 8 is a map: a sentence is hidden at some depth of a text of some length, and the model is asked for it. V3
# finds it everywhere, up to 128K. You can make such a map with a model of your own. The recorded study trains small models at
# 128 tokens on text with *needles*, single tokens that say "key k has value v"; at the end of a row stands a question. Six
# needles stand in each row, and behind the one that is asked for there is always another, so that the last value is always
# wrong. You can repeat it with `python -m dsv3lib.studies.needle_study`.

# %%
from dsv3lib.course import data_folder
from dsv3lib.studies.log import read
from dsv3lib.studies.needle import NEEDLES
from dsv3lib.studies.needle import unseen as never_trained

study = read("needle_study", data_folder() / "studies")
methods, depths = list(study[0]["methods"]), needle_study.DEPTHS
print(f"{len(study)} seeds, {study[0]['steps']} steps at 128 tokens,")
print(f"then 2 x {study[0]['extension_steps']} steps of extension to 1,024")


def found(of, key="map", length="1024"):
    """A number a seed: the share of right answers, over all depths."""
    shares = [of(run)[key][length] for run in study]
    return [sum(x) / len(x) if isinstance(x, list) else x for x in shares]


def way(method, when):
    return lambda run: run["methods"][method][when]


# %%
predict(
    "long.p3",
    "YaRN's settings alone, before any step of extension: how much of what was found at "
    "128 tokens is found at 1,024?",
    options=["next to nothing", "about half", "nearly all"],
)

# %%
shown = {
    when: {m: maps.mean_map([way(m, when)(run)["map"] for run in study]) for m in methods}
    for when in ("before", "after")
}
marks = [never_trained(depth) for depth in depths]
style.show(*maps.needle_maps(shown["before"], shown["after"], depths, marks))
reveal("long.p3", "nearly all", because="No slow pair meets a new angle.")


# %% tags=["claim:found"]
def span(shares):
    return f"{100 * min(shares):.0f} to {100 * max(shares):.0f} %"


home = found(lambda run: run["trained"], length="128")
yarn, plain = found(way("yarn", "before")), found(way("none", "before"))
print(f"found at 128: {span(home)}")
print(f"found at 1,024: {span(yarn)} with YaRN, {span(plain)} without change")
for h, y, n in zip(home, yarn, plain, strict=True):
    assert y > 0.9 * h and n < 0.8 * h

# %% [markdown]
# **With YaRN's settings the needle is found eight times further than the model was trained, from every seed; with no change a
# fifth or more of them is lost.** <!-- claim: found --> The rest is still found, since a key is matched by its content, which
# has no angle.
#
# Is it a lookup, or some trick? Two controls: depths at which training had no needle (marked at the edge of the maps), and the
# same rows with their keys handed round, where the former answer is wrong.

# %% tags=["claim:lookup"]
after_yarn = way("yarn", "after")
new_ones = [i for i, mark in enumerate(marks) if mark]
far = [after_yarn(run)["map"]["1024"] for run in study]
there = [sum(row[i] for i in new_ones) / len(new_ones) for row in far]
everywhere, handed_round = found(after_yarn), found(after_yarn, "shuffled")
chance = 1 / NEEDLES
lines = [["all depths", span(everywhere)], ["depths never trained", span(there)],
         ["keys handed round", span(handed_round)],
         ["by chance", f"{100 * chance:.0f} %"]]  # fmt: skip
table(["YaRN, extended, at 1,024 tokens", "right, over seeds"], lines)
assert min(there) > 0.7 and max(handed_round) < chance

# %% [markdown]
# **It is a lookup by key.** <!-- claim: lookup --> Now the text itself: the loss by position, before the extension and after it.

# %%
def text_loss_of(of, part):
    """A number a seed: the loss in one of 16 parts of a row."""
    return [of(run)["loss_by_position"][part] for run in study]


for when in ("before", "after"):
    curves = {m: [way(m, when)(run)["loss_by_position"] for run in study] for m in methods}
    style.show(*maps.loss_by_position(curves, 128, 1024, when))


# %% tags=["claim:extended"]
for_each = [(m, when) for when in ("before", "after") for m in methods]
lines = []
for m, when in for_each:
    ends = [text_loss_of(way(m, when), part) for part in (0, -1)]
    lines.append([m, when, *(f"{min(x):.2f} to {max(x):.2f}" for x in ends)])
table(["way", "extension", "loss, first 64 tokens", "loss, last 64 of 1,024"], lines)
near, far = (text_loss_of(way("none", "before"), part) for part in (0, -1))
assert all(b > a + 0.5 for a, b in zip(near, far, strict=True))
near, far = (text_loss_of(after_yarn, part) for part in (0, -1))
assert all(b < a for a, b in zip(near, far, strict=True))

# %% [markdown]
# **With no change the loss is more than half a nat higher far behind the trained length; with YaRN and 100 steps the far end is
# read better than the beginning, from every seed.** <!-- claim: extended --> NTK-aware scaling comes near. Interpolation stays
# behind: it has moved neighbours too close together, and 100 steps do not mend that at this size.
#
# ## Break it
#
# The extended model has the right weights. Let a port read it with wrong settings; each of these mistakes is an easy one to make.

# %%
predict(
    "long.p4",
    "Which mistake would the needle map at 1,024 tokens show?",
    options=["the square forgotten", "interpolation in place of YaRN", "pairs not slowed"],
)

# %%
names = {
    "not_squared": "the square forgotten",
    "no_temperature": "no temperature",
    "on_the_rotary_part_alone": "temperature at cos and sin",
    "interpolation": "interpolation for YaRN",
    "not_stretched": "pairs not slowed",
}


def added(key, factor, what):
    """A number a seed: what the port with this mistake has more than the right one."""
    ports = [lambda run, k=k: run["mistakes"][factor][k] for k in (key, "right")]
    return [a - b for a, b in zip(*map(what, ports), strict=True)]


# %%
far_end = lambda of: text_loss_of(of, -1)  # noqa: E731
lost = {name: added(key, "8", far_end) for key, name in names.items()}
at_40 = {name: added(key, "40", far_end) for key, name in names.items()}
needles = {name: [-x for x in added(key, "8", found)] for key, name in names.items()}
unit = "added loss, last 64 of 1,024 tokens (nats a byte)"
style.show(*figures.what_ports_lose(lost, unit))

# %% tags=["claim:ports"]
lines = [[name, *(f"{min(x):.3f} to {max(x):.3f}" for x in (lost[name], at_40[name])),
          f"{100 * max(needles[name]):.0f}"] for name in lost]  # fmt: skip
head = ["mistake", "added loss, factor 8", "factor 40", "needles lost (%)"]
table(head, lines, caption="Nats a byte; the most needles lost from any seed, at 8")
assert all(min(x) > 0 for x in lost.values())
assert [name for name, x in needles.items() if max(x) > 0.1] == ["pairs not slowed"]
assert max(lost["the square forgotten"]) < min(lost["no temperature"])
reveal("long.p4", "pairs not slowed", because="The others cost loss, and hardly a needle.")

# %% [markdown]
# **Each mistake costs loss at the far end, from every seed, and all but one leave the needle map nearly as it was.** <!-- claim: ports -->
# The forgotten square is the cheapest of them. Nothing fails and nothing warns, which is how it could stay in ports.
#
# ## On trial
#
# **"128K works without extension: RoPE tells distances, and distances have no end."** The recorded models have decided
# it: look at *none*, before, in the table of losses. **Refuted.** <!-- claim: extended --> Distances have no end, but a model knows those that it was trained with.
#
# **"YaRN is free."** A pass takes no longer with it. But how are short texts read, which the model was made for?

# %% tags=["claim:free"]
was = text_loss_of(way("none", "before"), 0)  # as it was trained
for when in ("before", "after"):
    change = [b - a for a, b in zip(was, text_loss_of(way("yarn", when), 0), strict=True)]
    print(f"first 64 tokens, {when}: {min(change):+.2f} to {max(change):+.2f} nats a byte")
    assert min(change) > 0 if when == "before" else max(map(abs, change)) < 0.05

# %% [markdown]
# **Refuted: short texts are read worse, until the model has been trained with it.** <!-- claim: free --> V3 paid two phases of
# 1,000 steps (§4.3).
#
# **"A perfect needle map means that long texts are understood."** Two witnesses. Interpolation, before the extension, finds as
# many needles as YaRN: how does it read? And a question for which *two* needles are needed: "key k is as key l" and "key l has
# value v". <!-- claim: needle -->

# %% tags=["claim:needle"]
lines, both = [], {}
for m in ("yarn", "interpolation"):
    both[m] = found(way(m, "before")), text_loss_of(way(m, "before"), -1)
    lines.append([m, span(both[m][0]), f"{min(both[m][1]):.2f} to {max(both[m][1]):.2f}"])
table(["before, at 1,024 tokens", "needles found", "loss of text (nats a byte)"], lines)
two = found(after_yarn, "linked")
print(f"questions that need two needles: {span(two)}; by chance {100 * chance:.0f} %")
for (a, b), (x, y) in zip(*(zip(*both[m], strict=True) for m in both), strict=True):
    assert abs(a - x) < 0.1 and y > b + 0.3
assert max(two) < chance < 0.7 < min(everywhere)

# %% [markdown]
# **The map is as good for a model whose text has fallen apart, and for one that cannot put two facts together.** <!-- claim: needle -->
# (These small models never learned such questions, at any length. That is the point: the map does not ask.) How V3 does at
# either, no small model can tell.
#
# ## Where MLA ends
#
# MLA makes the cache small. Reading a prompt still compares every token with all before it. Count the products of one of V3's
# layers.

# %%
predict(
    "long.p5",
    "A prompt of 131,072 tokens. Which share of a layer's products is scores and values?",
    options=["about a tenth", "about a third", "more than three quarters"],
)

# %% tags=["claim:quadratic"]
from dsv3lib.model.costs import cache_bytes_per_token, forward_flops
from dsv3lib.studies.context_cost import counted, one_layer

lengths = [1024, 4096, 8192, 32_768, 65_536, 131_072]
moe = v3.replace(num_hidden_layers=1, first_k_dense_replace=0)
prompt = {n: n * forward_flops(moe, (n + 1) // 2)["attention_core"] for n in lengths}
others = sum(x for name, x in forward_flops(moe, 0).items() if name != "head")
rest = {n: n * others for n in lengths}
token = {n: counted(one_layer(), "decode", "absorbed", n) for n in lengths}
style.show(*figures.costs(lengths, *(list(x.values()) for x in (prompt, rest, token))))
part = {n: prompt[n] / (prompt[n] + rest[n]) for n in lengths}
print(*(f"{n:,}: {100 * x:.0f} %" for n, x in part.items()), sep="; ")
assert prompt[131_072] / prompt[65_536] > 3.99 and part[131_072] > 0.75
reveal("long.p5", "more than three quarters", because="It grows with the square.")

# %% [markdown]
# **Attention of a prompt grows with the square of its length.** <!-- claim: quadratic --> Writing one more token grows in a line,
# and so does the cache. This is what one machine needed for one layer at V3's head sizes:

# %%
costs = read("context_cost", data_folder() / "studies")
lines = [
    [r["phase"], r["form"], f"{r['context']:,}", f"{r['cache_bytes'] / 2**20:.0f}",
     f"{r['flops'] / 1e9:,.0f}", f"{r['seconds']:.2f}", r["load"]]
    for r in costs if r["seconds"] is not None and r["context"] in lengths
]  # fmt: skip
head = ["phase", "form", "tokens", "cache (MiB, FP32)", "GFLOP", "seconds", "load"]
table(head, lines, caption=f"{costs[0]['threads']} threads of a CPU ({costs[0]['machine']})")
gib = 131_072 * cache_bytes_per_token(v3) / 2**30
print(f"V3's whole cache at 131,072 tokens, BF16: {gib:.1f} GiB")

# %% [markdown]
# What comes after MLA leaves out most of those comparisons: *sparse attention* lets each token look at a chosen few of all
# cached ones. Native Sparse Attention (Yuan et al., arXiv 2502.11089) chooses blocks, by summaries of them that are learnt; DeepSeek-V3.2
# (2025) puts a small *indexer* before MLA that picks 2,048 tokens for each query, so that the product with the latents no longer
# grows with the context. The indexer's own scores still do, at a much smaller width.
#
# ## At scale
#
# The kernels that a long prompt and a long cache meet, as they compile for Hopper. YaRN costs them nothing: its speeds stand in
# the table of turns, its temperature in the softmax's scale.

# %% tags=["folded"]
from dsv3lib.course import at_scale

at_scale("mla_prefill sm_90", "mla_decode sm_90", operations=("mla_prefill", "mla_decode"))

# %% [markdown]
# ## What can go wrong
#
# - *The square.* The temperature belongs to queries *and* keys: scores get its square.
# - *The wrong place.* `mscale` over `mscale_all_dim` stands at cos and sin, the square of `mscale_all_dim`'s temperature at the
#   softmax. V3 has 1 at the first and 1.87 at the second. <!-- claim: two -->
# - *The ramp's ends.* They are rounded outwards to whole pairs, and belong to the *original* context, not to the new one.
# - *Short tests.* Position 0 shows nothing, the first few positions hardly anything. <!-- claim: zero -->
# - *A factor that is too small.* It has to reach as far as the text: the library refuses a target beyond factor times the trained
#   length.
# - *A needle map alone.* It hardly sees any of this.
#
# ## Do you recall?
#
# <details><summary>Which pairs does YaRN slow, and which not?</summary>
# Those that do not turn once within the trained context, by the whole factor; those that turn more than 32 times, not at all;
# between them lies a ramp. <!-- claim: ramp --></details>
#
# <details><summary>Why does the softmax need a correction too?</summary>
# One token's share of the attention shrinks as others join; larger scores give it back.</details>
#
# <details><summary>What does interpolation do to neighbours?</summary>
# It moves them closer together, by the whole factor, for the fast pairs as well.</details>
#
# <details><summary>What can a needle map not tell?</summary>
# How well the text between needles is read, and whether two facts can be put together.</details>
#
# ## Where next
#
# You have been through the whole course. Extend a run of your own (`dsv3 train --help`, *context extension*), or read
# [dsv3lib/layers/rope.py](../dsv3lib/layers/rope.py) and [dsv3lib/training/loop/context_extension.py](../dsv3lib/training/loop/context_extension.py).
