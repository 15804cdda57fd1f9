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
# # 00 · Start here: the map of DeepSeek-V3
#
# **You will have shown**
#
# 1. **that DeepSeek-V3's published size follows from its configuration, and that a token meets a small part of it;**
#    <!-- claim: size -->
# 2. **that the model which you train here, on this machine, is the same architecture with smaller numbers;**
#    <!-- claim: same -->
# 3. **that it learns more from real text than which tokens are common: their order matters to it.**
#    <!-- claim: learns -->
#
# About 55 minutes. Paper: *DeepSeek-V3 Technical Report* (2024), §2 (architecture), §4.2 (sizes and training), Table 1
# (cost). You should know what a transformer, an embedding and a cross-entropy are. Nothing else is assumed.
#
# ## How to use the course
#
# Run a cell with Shift+Enter. Where a question is asked, commit to an answer before you run the next cell: being wrong
# there is how the idea sticks. What the next cell shows stays folded until you have. Exercises are cells with `...` in
# them, where a piece of the model is missing. An open exercise never stops *Run All*: the cells after it go on with the
# reference.

# %% tags=["parameters"]
STEPS = 70
SEED = 1234
DEVICE = "auto"
FAST = False

# %%
from dsv3lib.course import setup

session = setup(seed=SEED, notebook="00_start_here", device=DEVICE)

# %% [markdown]
# ## Is your machine ready?
#
# The same check-up is `dsv3 doctor` in a terminal. Each line says what you have; where something is missing, it says
# what works without it. Two processor cores and no GPU are enough for every notebook.

# %%
from dsv3lib.course import table
from dsv3lib.doctor import examine

rows = [
    # no paths of one machine
    (finding.name, finding.value if "/" not in finding.value else finding.status)
    for finding in examine()
]
table(["part", "what you have"], rows, varies=True)

# %% [markdown]
# ## The whole model, in a second and in no memory
#
# PyTorch has a device called `meta`: tensors there have a shape and no content. So the whole of DeepSeek-V3 can be built
# on your laptop. What follows is not a description of the model, it is the model.

# %%
from dsv3lib.course import predict, reveal

predict(
    "start.p1",
    "DeepSeek-V3 is known for 671 billion parameters. What share of them works on one token?",
    options=["about all of them", "about a half", "about a fifth", "about a twentieth"],
)

# %% tags=["claim:size"]
import torch

from dsv3lib import DeepSeekV3, ModelConfig

v3 = ModelConfig.preset("v3-671b")
with torch.device("meta"):
    big = DeepSeekV3(v3)
counts = big.parameter_counts()
share = 100 * counts["active"] / counts["main"]
print(f"{counts['main']:,} parameters in the main model")
print(f"{counts['active']:,} of them work on one token: {share:.1f} %")
assert round(counts["main"] / 1e9) == 671 and share < 6
reveal("start.p1", "about a twentieth", because="That is what this notebook is about.")

# %% [markdown]
# How can a model leave nearly all of itself unused? Its feed-forward networks are split into **experts**: in most layers
# there are many small networks, and a **router** sends each token to a few of them. One more, the **shared** expert, works
# for every token. This is a **mixture of experts**.
#
# Here is one token on its way through one such layer. The model is `tiny`, the one that you will train; the numbers are
# its own. An *affinity* says how well an expert suits the token, between nothing and one. The best are taken, and their
# affinities, scaled, are the *gates* by which their results are multiplied.

# %%
from dsv3lib.viz import model_map, style
from dsv3lib.viz.token_route import token_route

tiny = ModelConfig.preset("tiny")
model = DeepSeekV3(tiny, torch.Generator().manual_seed(SEED)).to(session.device)
router = model.routers()[0]
token = torch.randn(1, tiny.hidden_size, generator=torch.Generator().manual_seed(SEED))
with torch.no_grad():
    chosen, gates, affinities = (one[0].tolist() for one in router(token.to(session.device)))
style.show(*token_route(affinities, chosen, gates, tiny.hidden_size))

# %% [markdown]
# ## The symbols
#
# These names stand in the paper, in the code and in every notebook after this one. Both columns of numbers are read from
# the configurations.

# %%
from dsv3lib.course import symbols

symbols("d", "L", "n_h", "d_c", "d_h^R", "N_r", "N_s", "K_r", "d_e", "D", "V")

# %% [markdown]
# ## Count it yourself
#
# A layer is attention, then a feed-forward network. Each is made of matrices, and a matrix has rows × columns parameters.
# A feed-forward network here is a **SwiGLU**, `down(silu(gate(x)) * up(x))`. An expert is one of them. How many parameters
# it has is the first thing that you write.

# %%
from dsv3lib.course import check, exercise

exercise("start.1")

# %%
def expert_parameters(hidden_size, intermediate_size):
    ...


expert_parameters = check("start.1", expert_parameters)

# %% [markdown]
# And how much of a mixture works for one token?

# %%
exercise("start.2")

# %%
def active_experts_share(experts, chosen, shared):
    ...


active_experts_share = check("start.2", active_experts_share)

# %% [markdown]
# Now the whole model. Attention has five matrices, which notebook 01 takes apart. With your function for the rest:
#
# $$\text{parameters} = \underbrace{2Vd}_{\text{embedding, head}} + \sum_{\text{layers}} \big(\text{attention} +
# \text{feed-forward}\big)$$

# %%
def count_matrices(c):
    """Parameters of all matrices of the main model, from the sizes alone."""
    heads, d = c.num_attention_heads, c.hidden_size
    queries = d * c.q_lora_rank + c.q_lora_rank * heads * c.qk_head_dim  # down and up
    cached = d * (c.kv_lora_rank + c.qk_rope_head_dim)  # what is kept of each token
    keys_values = c.kv_lora_rank * heads * (c.qk_nope_head_dim + c.v_head_dim)
    attention = queries + cached + keys_values + heads * c.v_head_dim * d  # and the output
    experts = c.n_routed_experts + c.n_shared_experts
    mixture = experts * expert_parameters(d, c.moe_intermediate_size) + c.n_routed_experts * d
    dense = expert_parameters(d, c.intermediate_size)  # the first layers have one network each
    n_dense, n_layers = c.first_k_dense_replace, c.num_hidden_layers
    layers = n_layers * attention + n_dense * dense + (n_layers - n_dense) * mixture
    return 2 * c.vocab_size * d + layers


print(f"{count_matrices(v3):,}")

# %%
predict(
    "start.p2",
    "Your count leaves out the norms (a scale for each channel) and the routers' biases. What "
    "share of V3 is that?",
    options=["about 1 %", "about 0.01 %", "less than 0.001 %"],
)

# %%
left_out = counts["main"] - count_matrices(v3)
routers = big.routers()[: v3.num_hidden_layers - v3.first_k_dense_replace]
biases = sum(one.e_score_correction_bias.numel() for one in routers)
assert left_out == counts["norms"] + biases
print(f"left out: {left_out:,} = {counts['norms']:,} in norms + {biases:,} in biases")
print(f"as a share of the model: {100 * left_out / counts['main']:.5f} %")
reveal("start.p2", "less than 0.001 %", because="Nearly all of a transformer is matrices.")

# %% [markdown]
# Your count and the library agree to the last parameter. The library's own model is
# [dsv3lib/model](../dsv3lib/model/deepseek_v3.py); its layers are one file each in
# [dsv3lib/layers](../dsv3lib/layers/__init__.py).
#
# ## The map
#
# Where are the parameters, and where does the work go? Work is counted in floating-point operations (a multiplication and
# an addition are two). The two pictures differ, and that difference is the whole point of a mixture of experts.

# %%
style.show(*model_map.model_map({"DeepSeek-V3": v3, "tiny": tiny}, context=4096))

# %% [markdown]
# Attention has two bars. Its *projections* cost the same for every token. Its *scores and values* cost more the further
# a token looks back.

# %%
predict(
    "start.p3",
    "Here a token looks back on 4,096 tokens. V3's longest trained context is 131,072. Which "
    "part of V3 does the most work there?",
    options=["the routed experts", "attention's projections", "attention's scores and values"],
)

# %% tags=["claim:looking-back"]
style.show(*model_map.model_map({"DeepSeek-V3": v3}, context=131_072))
_, far = model_map.parts(v3, context=131_072)
assert far["attention_core"] > sum(far.values()) / 2
reveal("start.p3", "attention's scores and values", because="It does more than all the rest.")

# %% [markdown]
# Move the slider (Tab to it, then the arrow keys) and see where it overtakes the experts.

# %%
from dsv3lib.viz.live import live


def draw(context):
    return model_map.model_map({"DeepSeek-V3": v3}, context=context)


contexts = [1024, 4096, 16384, 65536, 131072]
live(draw, context=contexts, start={"context": 4096}, labels={"context": "context (tokens)"})

# %% [markdown]
# **So looking back is what becomes dear, and not the experts.** <!-- claim: looking-back --> What of the past must be kept
# for that, and how little it can be, is notebook 01.
#
# ## Real text, from this machine
#
# Nothing is downloaded. The text is what your installation already holds: Python's own source code and manual, the
# translations of JupyterLab into four languages, and arithmetic exercises that are made up as they are needed. It is read in
# **tokens**: pieces of text, often a word or a part of one.

# %%
from dsv3lib.training.text.data import PackedStream
from dsv3lib.training.text.folder import open_domains
from dsv3lib.training.text.tokenizer import default_tokenizer

tokenizer = default_tokenizer()
domains, _ = open_domains()
stream = PackedStream(domains, tokenizer, seq_len=128, batch_size=8, seed=SEED)
names = list(stream.domain_names)
held_out = {name: stream.validation_batches(name, 1, 8)[0].input_ids for name in names}
rows = [(n, tokenizer.decode(held_out[n][0, 1:24]).splitlines()[0][:70]) for n in names]
table(["domain", "how a text of it begins"], rows, varies=True)
ids = tokenizer.encode("The router sends each token to its experts.")
print(f"{len(ids)} tokens:", "|".join(tokenizer.decode([i]) for i in ids))

# %% [markdown]
# The model sees token numbers, and its only task is to say which token comes next. How good it is at that is the
# **cross-entropy**: minus the logarithm of the probability that it gave to the token that came.

# %%
exercise("start.3")

# %%
def untrained_loss(vocab_size):
    ...


untrained_loss = check("start.3", untrained_loss)

# %% [markdown]
# ## Two rivals
#
# A model must be better than something. One rival knows nothing: your function gives its loss. The other knows exactly
# how common each token is in the training text, and gives it that share whatever came before.

# %%
nothing = untrained_loss(tiny.vocab_size)
seen = stream.next_batch(256).input_ids.flatten()
common = torch.bincount(seen, minlength=tiny.vocab_size).double() + 0.1
log_share = (common / common.sum()).log()
rival = -log_share[torch.cat([*held_out.values()])].mean().item()
rows = [("knows nothing", f"{nothing:.2f}"), ("knows what is common", f"{rival:.2f}")]
table(["rival", "loss (nats per token)"], rows, varies=True)

# %% [markdown]
# ## Train it
#
# This is DeepSeek-V3 with every part: latent attention, routed experts with their bias, and a module that predicts one
# token further. It has never seen a word.

# %%
predict(
    "start.p4",
    "The loss starts near that of the rival who knows nothing. Where is it after the next "
    "cell, which takes about half a minute on two cores?",
    options=[
        "still between the two rivals",
        "about that of the rival who knows what is common",
        "clearly below both",
    ],
)

# %%
from dsv3lib.course.waiting import bar
from dsv3lib.training.loop.evaluate import evaluate
from dsv3lib.training.loop.settings import TrainingConfig
from dsv3lib.training.loop.trainer import Trainer

steps = 6 if FAST else STEPS
settings = TrainingConfig(steps=steps, seed=SEED, validation_batches=0)
before, records = evaluate(model, stream, batches=1), []
with bar("training", total=steps) as step:
    for record in Trainer(model, stream, settings):
        records.append(record)
        step()
losses = [record["losses"]["main"] for record in records]
assert abs(losses[0] - nothing) < 0.5

# %%
from dsv3lib.viz import learning

lines = {"knows nothing": nothing, "knows what is common": rival}
style.show(*learning.loss_curve(losses, lines))
final = sum(losses[-5:]) / len(losses[-5:])
assert FAST or final < rival - 0.3
because = f"The last steps average {final:.2f}; the better rival has {rival:.2f}."
reveal("start.p4", "clearly below both", because=because, varies=True)

# %% [markdown]
# Is that true of every kind of text? Below are texts that the model was not trained on, domain by domain. Nats per token
# cannot be compared between languages, because a token of one stands for more text than a token of another; *bits per
# byte* can. Nothing is known of any domain before training, and yet the grey bars differ: what knowing nothing costs a
# byte is the cost of a token, shared by the bytes that the token stands for. So compare within a pair.

# %%
after = evaluate(model, stream, batches=1)
start, end = ({n: one.domains[n].bits_per_byte for n in names} for one in (before, after))
style.show(*learning.domain_bars(start, end))
assert FAST or all(end[name] < 0.9 * start[name] for name in names)

# %% [markdown]
# ## Let it write
#
# Half a minute on a laptop is not two months on two thousand GPUs, and you will see that. Look for what is there all the
# same (indents, brackets, questions with numbers in them) and for what is not yet: does German stay German?

# %%
def write(prompt, by, spelling, tokens=40):
    ids = torch.tensor([spelling.encode(prompt, bos=True)], device=session.device)
    draw = torch.Generator(session.device).manual_seed(SEED)
    out = by.generate(ids, max_new_tokens=tokens, temperature=0.7, top_p=0.9, generator=draw)
    return spelling.decode(out[0, ids.shape[1] :].tolist())


prompts = ("def __init__(self,", "The value of", "Die Datei", "Question: Tom has")
rows = [(one, write(one, model, tokenizer)) for one in prompts]
table(["it was given", "it wrote"], rows, varies=True)

# %% [markdown]
# The same program, run for more than an hour on more of the same kind of text, made `tiny-v3`, which comes with the course and
# which later lessons use where only a trained model has something to show. Its own tokenizer knows 2,048 tokens. It is judged
# beside three rivals that read the very same tokens: one who knows what is common; its *dense twin*, which has no experts to
# choose from and does as much work for a token; and a *5-gram*, a table that looks up what followed the last four tokens
# wherever they stood. <!-- claim: longer -->

# %% tags=["claim:longer"]
import json

from dsv3lib.course import data_folder
from dsv3lib.training.text.tokenizer import Tokenizer

trained = DeepSeekV3.from_pretrained("tiny-v3", dtype=torch.float32).to(session.device)
spelling = Tokenizer.from_pretrained("tiny-v3")
rows = [(one, write(one, trained, spelling)) for one in prompts]
table(["it was given", "tiny-v3 wrote"], rows, varies=True)
card = json.loads((data_folder() / "checkpoints/tiny-v3/results.json").read_text())
bits = card["bits_per_byte"]["all"]
names_of = {"unigram": "knows what is common", "dense": "the dense twin",
            "model": "tiny-v3", "five_gram": "the 5-gram"}  # fmt: skip
table(["who", "bits per byte"], [[who, round(bits[one], 2)] for one, who in names_of.items()])
assert bits["five_gram"] < bits["model"] < bits["dense"] < bits["unigram"]
assert spelling.vocab_size == trained.config.vocab_size == 2048

# %% [markdown]
# **With the same work for a token, the model with experts needs fewer bits than its dense twin** <!-- claim: longer -->. And the
# table of what stood where still beats both: on little text, looking up is hard to beat, and a model that has read so little knows
# nothing. <!-- claim: longer --> What it writes has the manner of its texts, and no sense. Its
# [card](../data/checkpoints/tiny-v3/README.md) says what was measured, and what it cannot do.
#
# ## Break it
#
# A model could be below both rivals and still know nothing but a richer table of what is common. So take from it what it
# may have learnt beyond that: shuffle the tokens of the validation texts and ask again. If their order matters to it, this
# must go wrong.

# %%
def loss_of(shuffled):
    draw, total = torch.Generator().manual_seed(SEED), []
    for ids in held_out.values():
        order = torch.randperm(ids.shape[1], generator=draw) if shuffled else slice(None)
        asked = ids[:, order].to(session.device)
        with torch.no_grad():
            total.append(model(asked, labels=asked).losses["main"].item())
    return sum(total) / len(total)

# %% tags=["claim:learns"]
in_order, out_of_order = loss_of(shuffled=False), loss_of(shuffled=True)
rows = [("in order", f"{in_order:.2f}"), ("shuffled", f"{out_of_order:.2f}")]
table(["texts", "loss (nats per token)"], rows, varies=True)
assert FAST or in_order < rival - 0.3, "no better than knowing what is common"
assert FAST or out_of_order > in_order + 0.3, "the order does not matter to it"

# %% [markdown]
# ## On trial
#
# What people say of this model, each with an experiment that could have gone the other way.
#
# **"A model that fits on a laptop is another model."** <!-- claim: same --> Said wherever small models are used to teach.
# Compare the names and ranks of all tensors, layer numbers aside.

# %% tags=["claim:same"]
import re


def tensors(m):
    return {(re.sub(r"\d+", "N", name), value.ndim) for name, value in m.state_dict().items()}


print(f"kinds of tensor in V3: {len(tensors(big))}, in tiny: {len(tensors(model))}")
assert tensors(big) == tensors(model)

# %% [markdown]
# Refuted: it is the same code with other numbers in `config.json`.
#
# **"So many parameters mean two operations for each of them, for each token."** <!-- claim: each --> A rule of thumb from
# models without experts. Two operations for a parameter is right; the question is for which parameters.

# %% tags=["claim:each"]
from dsv3lib.model.costs import forward_flops

per_token = forward_flops(v3, context=4096)
products = sum(per_token.values()) - per_token["attention_core"]
back = per_token["attention_core"]
rows = [
    ("if all parameters worked", round(2 * counts["main"] / 1e9)),
    ("as it is", round(products / 1e9)),
    ("to look back on 4,096 tokens, besides", round(back / 1e9)),
]
table(["what", "billion operations for one token"], rows)
assert 2 * counts["main"] > 15 * products

# %% [markdown]
# Refuted.
#
# **"The download has 685 billion parameters, so 671 is wrong."** <!-- claim: download --> Asked under the release again
# and again. The files add the module that predicts one token further (a whole layer) with its own copies of embedding and
# head. And because the weights are stored in eight bits, each block of them has a scale, which is counted too.

# %% tags=["claim:download"]
import math

matrices = [v for k, v in big.state_dict().items() if "_proj" in k and "eh_proj" not in k]
areas = [[-(-side // 128) for side in one.shape[-2:]] + [*one.shape[:-2]] for one in matrices]
blocks = sum(math.prod(area) for area in areas)
on_disk = {
    "main model": counts["main"],
    "module": counts["mtp"],
    "its copies": counts["embedding"] + counts["head"],
    "scales": blocks,
}
rows = [(name, f"{value / 1e9:.2f}") for name, value in on_disk.items()]
table(["part", "billion"], [*rows, ("together", f"{sum(on_disk.values()) / 1e9:.2f}")])
assert round(sum(on_disk.values()) / 1e9) == 685

# %% [markdown]
# Both numbers are right; they count different things.
#
# ## At scale
#
# V3 saw 14.8 trillion tokens, which took 2,664,000 hours of H800 GPUs (Table 1), on 2,048 of them. What would that take
# here? Your speed was measured above; the rest is arithmetic.

# %%
from dsv3lib.model.costs import training_flops

speed = sorted(record["tokens_per_second"] for record in records)[len(records) // 2]
tokens_v3, gpu_seconds = 14.8e12, 2_664_000 * 3600
# on average a token looks back on half of its text: 2,048 there, 64 here
needed = training_flops(v3, tokens=int(tokens_v3), context=2048)
mine = speed * training_flops(tiny, tokens=1, context=64)
print(f"V3's training: {needed:.1e} operations")
print(f"{needed / gpu_seconds / 1e12:.0f} trillion a second on each GPU")
print(f"that is {gpu_seconds / 2048 / 86400:.0f} days on 2,048 GPUs")
from dsv3lib.course import measured

years = needed / mine / (365 * 86400)
measured(f"This machine: {mine / 1e9:.0f} billion operations a second, so {years:,.0f} years.")

# %% [markdown]
# Nothing here ran on a GPU unless the first cell named one. But the kernels that would are in this library, and a GPU is not
# needed to see what they became. Each later notebook closes with a folded cell like the next one: it compiles a kernel for
# Hopper, the generation of the H800. *Registers* are the numbers that one thread holds at hand; *spilled* are those for
# which there was no room, which should be none; *shared memory* is what the threads of a block pass to each other.

# %% tags=["folded"]
from dsv3lib.course import at_scale

at_scale("quantize_tiles e4m3 bf16 sm_90", operations=("quantize_tiles", "gemm_fp8"))

# %% [markdown]
# ## Further exercises

# %%
exercise("start.4")

# %%
def bits_per_byte(nats_per_token, bytes_per_token):
    ...


bits_per_byte = check("start.4", bits_per_byte)

# %%
exercise("start.5")

# %%
def gpus_to_hold(parameters, bytes_each, gpu_bytes):
    ...


gpus_to_hold = check("start.5", gpus_to_hold)

# %%
from dsv3lib.course import progress

progress()

# %% [markdown]
# ## What can go wrong
#
# - *The loss starts far from ln V.* Then the initial weights are wrong. It starts below? Then the model sees its answers.
# - *The loss is "nan".* The trainer stops with an error that names the step. A lower learning rate is the usual way out.
# - *Out of memory.* Close other kernels (Kernel → Shut Down All).
#
# ## Do you recall?
#
# <details><summary>Why can V3 have so many parameters and cost like a model of a twentieth of them?</summary>
# Because of all routed experts in a layer a token visits a few. The others do not work for it.</details>
#
# <details><summary>Which part of the work grows when the context grows?</summary>
# Attention's scores and values: a token is compared with every token before it.</details>
#
# <details><summary>What is the loss of a model that knows nothing, and why?</summary>
# ln V: each of the V tokens gets an equal probability, and the loss is minus the logarithm of that.</details>
#
# ## Where next
#
# [01 · The latent cache](01_mla_latent_cache.ipynb): attention must remember the past, and V3 remembers it in a small part
# of what others need. To train longer than half a minute: `dsv3 train --preset tiny --minutes 10` in a terminal, and then
# `dsv3 generate runs/tiny`.
