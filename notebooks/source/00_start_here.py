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
# 1. that DeepSeek-V3 has 671 billion parameters, and that a token meets 5 % of them;
# 2. that the model which you train here, on this machine, is the same architecture with smaller numbers;
# 3. that it learns from real text: its loss falls below that of a rival that knows how common each token is,
#    and it writes.
#
# About 30 minutes. Paper: *DeepSeek-V3 Technical Report* (2024), §2 (architecture), §4.2 (sizes and training), Table 1
# (cost). You should know what a transformer, an embedding and a cross-entropy are. Nothing else is assumed.
#
# **How to use the course.** Run a cell with Shift+Enter. Where a question is asked, commit to an answer before you run
# the next cell: being wrong there is how the idea sticks. Exercises are cells with `...` in them. An open exercise
# never stops *Run All*.

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
from dsv3lib.course import measured
from dsv3lib.doctor import examine

for finding in examine():
    value = finding.value if "/" not in finding.value else finding.status  # no paths of one machine
    measured(f"`{finding.name}` {value}")

# %% [markdown]
# ## 671 billion, in a second and in no memory
#
# PyTorch has a device called `meta`: tensors there have a shape and no content. So the whole of DeepSeek-V3 can be built
# on your laptop. What follows is not a description of the model, it is the model.

# %%
import torch

from dsv3lib import DeepSeekV3, ModelConfig

v3 = ModelConfig.preset("v3-671b")
with torch.device("meta"):
    big = DeepSeekV3(v3)
counts = big.parameter_counts()
print(f"{counts['main']:,} parameters in the main model")
print(f"{counts['active']:,} of them work on one token: {100 * counts['active'] / counts['main']:.1f} %")

# %% [markdown]
# How can a model use 5 % of itself? Its feed-forward networks are split into **experts**: in most layers there are 256
# small networks, and a *router* sends each token to 8 of them. One more, the *shared* expert, works for every token. This
# is a *mixture of experts*.
#
# ## The symbols
#
# These names stand in the paper, in the code and in every notebook after this one. Both columns of numbers are read from
# the configurations. `tiny` is the model that you will train.

# %%
tiny = ModelConfig.preset("tiny")
rows = [
    ("d", "hidden_size", "width of the stream from layer to layer"),
    ("L", "num_hidden_layers", "layers"),
    ("n_h", "num_attention_heads", "attention heads"),
    ("d_c", "kv_lora_rank", "width of the cached latent (notebook 01)"),
    ("d_h^R", "qk_rope_head_dim", "dimensions that carry the position (02)"),
    ("N_r", "n_routed_experts", "experts that a layer can choose from (03)"),
    ("K_r", "num_experts_per_tok", "experts that a token is sent to (03)"),
    ("D", "num_nextn_predict_layers", "further tokens predicted (04)"),
    ("V", "vocab_size", "tokens in the vocabulary"),
]
print(f"{'paper':6} {'code':25} {'V3':>7} {'tiny':>6}  meaning")
for symbol, name, meaning in rows:
    print(f"{symbol:6} {name:25} {getattr(v3, name):7,} {getattr(tiny, name):6,}  {meaning}")

# %% [markdown]
# ## The idea in twenty lines: count it yourself
#
# A layer is attention, then a feed-forward network. Each is made of matrices, and a matrix has rows × columns
# parameters. A feed-forward network here is a *SwiGLU*, `down(silu(gate(x)) * up(x))`: three matrices. Attention has five,
# which notebook 01 takes apart.
#
# $$\text{parameters} = \underbrace{2Vd}_{\text{embedding, head}} + \sum_{\text{layers}} \big(\text{attention} +
# \text{feed-forward}\big)$$

# %%
def count_matrices(c):
    """Parameters of all matrices of the main model, from the sizes alone."""
    heads, d = c.num_attention_heads, c.hidden_size
    attention = (
        d * c.q_lora_rank + c.q_lora_rank * heads * c.qk_head_dim  # queries, down and up
        + d * (c.kv_lora_rank + c.qk_rope_head_dim)  # what will be cached
        + c.kv_lora_rank * heads * (c.qk_nope_head_dim + c.v_head_dim)  # keys and values
        + heads * c.v_head_dim * d  # output
    )  # fmt: skip
    expert = 3 * d * c.moe_intermediate_size
    mixture = (c.n_routed_experts + c.n_shared_experts) * expert + c.n_routed_experts * d  # and the router
    dense, n_moe = 3 * d * c.intermediate_size, c.num_hidden_layers - c.first_k_dense_replace
    layers = c.num_hidden_layers * attention + c.first_k_dense_replace * dense + n_moe * mixture
    return 2 * c.vocab_size * d + layers


print(f"{count_matrices(v3):,}")

# %% [markdown]
# Before you compare the two: what is the difference?

# %%
from dsv3lib.course import predict, reveal

predict(
    "start.p1",
    "Your count leaves out the norms (a scale for each channel) and the routers' biases. What share of V3 is that?",
    options=["about 1 %", "about 0.01 %", "less than 0.001 %"],
)

# %%
left_out = counts["main"] - count_matrices(v3)
biases = sum(router.e_score_correction_bias.numel() for router in big.routers()[: v3.num_hidden_layers - 3])
assert left_out == counts["norms"] + biases
print(f"left out: {left_out:,} = {counts['norms']:,} in norms + {biases:,} in biases")
print(f"as a share of the model: {100 * left_out / counts['main']:.5f} %")
reveal("start.p1", "less than 0.001 %", because="Nearly all of a transformer is matrices.")

# %% [markdown]
# Your twenty lines and the library agree to the last parameter. The library's own model is
# [dsv3lib/model.py](../dsv3lib/model.py); its layers are one file each in
# [dsv3lib/layers](../dsv3lib/layers/__init__.py).
#
# ## The map
#
# Where are the parameters, and where does the work go? Work is counted in floating-point operations (a multiplication and
# an addition are two). The two pictures differ, and that difference is the whole point of a mixture of experts.

# %%
predict(
    "start.p2",
    "Routed experts hold 97 % of V3's parameters. What share of the operations for one token do they take, when it "
    "looks back on 4,096 tokens?",
    number=(0, 100, "%"),
)

# %%
from dsv3lib.viz import model_map, style

figure, alt = model_map.model_map({"DeepSeek-V3": v3, "tiny": tiny}, context=4096)
style.show(figure, alt)
_, operations = model_map.parts(v3, context=4096)
share = round(100 * operations["routed_experts"] / sum(operations.values()))
reveal("start.p2", share, unit="%", because="A token visits 8 experts of 256 in a layer, and all of its attention.")

# %% [markdown]
# Attention has two bars. Its *projections* cost the same for every token. Its *scores and values* cost more the further
# a token looks back. Move the slider (Tab to it, then the arrow keys) and see who wins.

# %%
from dsv3lib.viz.live import live


def draw(context):
    return model_map.model_map({"DeepSeek-V3": v3}, context=context)


live(draw, context=[1024, 4096, 16384, 65536, 131072], start={"context": 16384}, labels={"context": "context (tokens)"})

# %% [markdown]
# At 131,072 tokens, V3's longest trained context, attention to the past is most of the work. What of the past must be kept
# for that, and how little it can be, is notebook 01.
#
# ## Real text, from this machine
#
# Nothing is downloaded. The text is what your installation already holds: Python's own source code and manual, the
# translations of JupyterLab into four languages, and arithmetic exercises that are made up as they are needed.

# %%
from dsv3lib.training.text.data import PackedStream
from dsv3lib.training.text.folder import open_domains
from dsv3lib.training.text.tokenizer import default_tokenizer

tokenizer = default_tokenizer()
domains, _ = open_domains()
stream = PackedStream(domains, tokenizer, seq_len=128, batch_size=8, seed=SEED)
for name in stream.domain_names:
    sample = stream.validation_batches(name, 1, 1)[0].input_ids[0, 1:24]
    measured(f"`{name}` {tokenizer.decode(sample).splitlines()[0][:90]}")

# %% [markdown]
# A **token** is a piece of text, often a word or a part of one. The model sees token numbers, and its only task is to
# say which token comes next. How good it is at that is the **cross-entropy**: minus the logarithm of the probability that
# it gave to the token that came. A model that knows nothing gives each of the $V$ tokens the probability $1/V$.

# %%
import math

text = "The router sends each token to its experts."
ids = tokenizer.encode(text)
print(len(text), "characters,", len(ids), "tokens:", "|".join(tokenizer.decode([i]) for i in ids))
assert tokenizer.decode(ids) == text
print(f"loss of a model that knows nothing: ln {tiny.vocab_size} = {math.log(tiny.vocab_size):.2f}")

# %% [markdown]
# ## Train it
#
# This is DeepSeek-V3 with every part: latent attention, routed experts with their bias, and a module that predicts one
# token further. It has never seen a word.

# %%
from dsv3lib.training.loop.settings import TrainingConfig
from dsv3lib.training.loop.trainer import Trainer

model = DeepSeekV3(tiny, torch.Generator().manual_seed(SEED)).to(session.device)
steps = 6 if FAST else STEPS
trainer = Trainer(model, stream, TrainingConfig(steps=steps, seed=SEED, validation_batches=0))
own = model.parameter_counts()
print(f"{own['main']:,} parameters in the main model, {own['mtp']:,} in the module")

# %%
predict(
    "start.p3",
    f"The loss starts near ln V = {math.log(tiny.vocab_size):.1f}. Where is it after the next cell, which "
    "takes about half a minute on two cores?",
    options=["between 7 and 8", "between 6 and 7", "between 5 and 6", "below 5"],
)

# %%
from dsv3lib.course.waiting import bar
from dsv3lib.training.loop.evaluate import evaluate

before = evaluate(model, stream, batches=1)
records = []
with bar("training", total=steps) as step:
    for record in trainer:
        records.append(record)
        step(note=f"loss {record['losses']['main']:.2f}, {record['tokens_per_second']:,.0f} tokens/s")
after = evaluate(model, stream, batches=1)
assert abs(records[0]["losses"]["main"] - math.log(tiny.vocab_size)) < 0.5

# %%
figure, ax = style.figure("The loss falls as the model learns", "training step", "cross-entropy (nats per token)")
for name, meaning, label in (("main", "forward", "next token"), ("mtp_1", "content", "the token after it")):
    stroke = style.line(meaning) | {"marker": ""}
    ax.plot([r["step"] for r in records], [r["losses"][name] for r in records], **stroke, label=label)
ax.axhline(math.log(tiny.vocab_size), **style.line("neutral") | {"marker": ""}, label="knows nothing: ln V")
ax.legend()
style.show(figure, "Two falling curves that start at ln V: the loss of the next token and of the one after.")
tail = [r["losses"]["main"] for r in records[-5:]]
final = sum(tail) / len(tail)
bins = {7: "between 7 and 8", 6: "between 6 and 7", 5: "between 5 and 6"}
reveal("start.p3", bins.get(int(final), "below 5"), because=f"The last steps average {final:.2f}.", varies=True)

# %% [markdown]
# The second curve belongs to the module that predicts one token further, which is harder (notebook 04). Below are texts that
# the model was not trained on, domain by domain. The measure is now *bits per byte*, which can be compared between
# languages: eight means that nothing is known of a byte.

# %%
import numpy as np

names = list(after.domains)
figure, ax = style.figure("Every domain is learnt, and not equally fast", None, "validation loss (bits per byte)")
for shift, result, meaning, label in ((-0.2, before, "neutral", "untrained"), (0.2, after, "forward", "trained")):
    heights = [result.domains[name].bits_per_byte for name in names]
    ax.bar(np.arange(len(names)) + shift, heights, width=0.4, **style.bar(meaning), label=label)
ax.set_xticks(range(len(names)), names)
ax.legend()
style.show(figure, "Pairs of bars, one pair a domain: in every pair the trained model's is lower.")
assert FAST or all(after.domains[n].loss < before.domains[n].loss - 0.5 for n in names)

# %% [markdown]
# ## Let it write
#
# Half a minute on a laptop is not two months on two thousand GPUs, and you will see that. Look for what is there all the
# same (indents, brackets, questions with numbers in them) and for what is not yet: does German stay German?

# %%
def write(prompt, tokens=40):
    ids = torch.tensor([tokenizer.encode(prompt, bos=True)], device=session.device)
    draw = torch.Generator(session.device).manual_seed(SEED)
    out = model.generate(ids, max_new_tokens=tokens, temperature=0.7, top_p=0.9, generator=draw)
    return tokenizer.decode(out[0, ids.shape[1] :].tolist())


for prompt in ("def __init__(self,", "The value of", "Die Datei", "Question: Tom has"):
    measured(f"`{prompt}`{write(prompt)}")

# %% [markdown]
# ## Break it
#
# Has it learnt only which tokens are common? Two tests. First, a rival that knows exactly that: it gives each token the
# share that it has in the training text, whatever came before.

# %%
seen = torch.bincount(stream.next_batch(256).input_ids.flatten(), minlength=tiny.vocab_size).double() + 0.1
share = seen / seen.sum()
held_out = torch.cat([stream.validation_batches(name, 1, 8)[0].input_ids for name in names])
rival = -share[held_out].log().mean().item()
measured(f"knows nothing {math.log(tiny.vocab_size):.2f}, knows what is common {rival:.2f} nats per token")

# %% [markdown]
# Second, take from your model what it may have learnt beyond that. Shuffle the tokens of the validation texts and ask
# again: if the order matters to it, this must go wrong.

# %%
def loss_of(shuffled):
    draw, total = torch.Generator().manual_seed(SEED), []
    for name in names:
        ids = stream.validation_batches(name, 1, 8)[0].input_ids
        if shuffled:
            ids = ids[:, torch.randperm(ids.shape[1], generator=draw)]
        with torch.no_grad():
            total.append(model(ids.to(session.device), labels=ids.to(session.device)).losses["main"].item())
    return sum(total) / len(total)


in_order, out_of_order = loss_of(shuffled=False), loss_of(shuffled=True)
measured(f"your model: in order {in_order:.2f}, shuffled {out_of_order:.2f} nats per token")
print("better than the rival:", FAST or in_order < rival - 0.3)
print("worse when shuffled:", FAST or out_of_order > in_order + 0.3)

# %% [markdown]
# ## On trial
#
# **"A model that fits on a laptop is another model."** Compare the names and ranks of all tensors, layer numbers aside.

# %%
import re


def tensors(m):
    return {(re.sub(r"\d+", "N", name), value.ndim) for name, value in m.state_dict().items()}


print("kinds of tensor in V3:", len(tensors(big)), "· in tiny:", len(tensors(model)))
print("the same kinds:", tensors(big) == tensors(model))

# %% [markdown]
# Refuted: it is the same code with other numbers in `config.json`.
#
# **"671 billion parameters, so each token costs two operations for each of them."** Two operations for a parameter is the
# right rule; the question is for which parameters.

# %%
from dsv3lib.model.costs import forward_flops

per_token = forward_flops(v3, context=4096)
products = sum(per_token.values()) - per_token["attention_core"]
print(f"if all worked: {2 * counts['main'] / 1e9:,.0f} billion operations a token")
back = per_token["attention_core"] / 1e9
print(f"as it is:      {products / 1e9:,.0f} billion, and {back:,.0f} to look back 4,096 tokens")
print(f"a factor of {2 * counts['main'] / products:.0f}")

# %% [markdown]
# Refuted.
#
# **"The download has 685 billion parameters, so 671 is wrong."** Both are right. The file adds the module that predicts one
# token further (a whole layer), and that module's own copies of embedding and head.

# %%
on_disk = counts["main"] + counts["mtp"] + counts["embedding"] + counts["head"]
print(f"main {counts['main'] / 1e9:.2f}B + module {counts['mtp'] / 1e9:.2f}B + copies = {on_disk / 1e9:.2f}B")

# %% [markdown]
# ## At scale
#
# V3 saw 14.8 trillion tokens. What would that take here? Your speed was measured above; the rest is arithmetic. The paper's
# figure is 2,664,000 hours of H800 GPUs for pre-training (Table 1), on 2,048 of them.

# %%
from dsv3lib.model.costs import training_flops

speed = float(np.median([r["tokens_per_second"] for r in records[-10:]]))
tokens_v3, gpu_seconds = 14.8e12, 2_664_000 * 3600
needed = training_flops(v3, tokens=int(tokens_v3), context=2048)  # on average a token looks back half of 4,096
mine = speed * training_flops(tiny, tokens=1, context=64)  # its own half of 128
print(f"V3's training: {needed:.1e} operations, {needed / gpu_seconds / 1e12:.0f} trillion a second on each GPU")
print(f"that is {gpu_seconds / 2048 / 86400:.0f} days on 2,048 GPUs")
years = needed / mine / (365 * 86400)
measured(f"This machine: {mine / 1e9:.0f} billion operations a second; V3 would take it {years:,.0f} years.")

# %% [markdown]
# Nothing here ran on a GPU unless the first cell named one. But the kernels that would are in this library, and a GPU is not
# needed to see what they became: the next cell compiles one for Hopper, the generation of the H800. It rounds what goes into
# V3's matrix products to eight bits, with one scale for each 128 values. Later notebooks do the same with theirs.

# %%
from dsv3lib.course import at_scale

at_scale("quantize_tiles e4m3 bf16 sm_90", operations=("quantize_tiles", "gemm_fp8"))

# %% [markdown]
# ## Exercises

# %%
from dsv3lib.course import check, exercise

exercise("start.1")

# %%
def expert_parameters(hidden_size, intermediate_size):
    ...


check("start.1", expert_parameters)

# %%
exercise("start.2")

# %%
def active_experts_share(experts, chosen, shared):
    ...


check("start.2", active_experts_share)

# %%
exercise("start.3")

# %%
def untrained_loss(vocab_size):
    ...


check("start.3", untrained_loss)

# %%
from dsv3lib.course import progress

progress()

# %% [markdown]
# ## What can go wrong
#
# - *The loss starts far from ln V.* Then the initial weights are wrong. It starts below? Then the model sees its answers.
# - *The loss is "nan".* The trainer stops with an error that names the step. A lower learning rate is the usual way out.
# - *Out of memory.* `tiny` needs about 1 GiB. Close other kernels (Kernel → Shut Down All).
#
# ## Do you recall?
#
# <details><summary>Why can V3 have 671B parameters and cost like a model of 37B?</summary>
# Because of 256 routed experts in a layer a token visits 8. The others do not work for it.</details>
#
# <details><summary>Which part of the work grows when the context grows?</summary>
# Attention's scores and values: a token is compared with every token before it.</details>
#
# <details><summary>What is the loss of a model that knows nothing, and why?</summary>
# ln V: each of the V tokens gets the probability 1/V, and the loss is minus the logarithm of that.</details>
#
# ## Where next
#
# [01 · The latent cache](01_mla_latent_cache.ipynb): attention must remember the past, and V3 remembers it in 70 KB a
# token where others take megabytes. To train longer than half a minute: `dsv3 train --preset tiny --minutes 10` in a
# terminal, and then `dsv3 generate runs/tiny`.
