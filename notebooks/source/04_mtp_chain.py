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
# # 04 · One token further, and one more
#
# **You will have shown**
#
# 1. **that each depth sees one token more than the one before, and never its own target**; <!-- claim: sees -->
# 2. **that the modules are a chain: the second cannot begin before the first has ended**; <!-- claim: sequential -->
# 3. **that a chain guesses further tokens far better than independent heads of the same size**. <!-- claim: chain -->
#
# About 60 minutes. Paper: *DeepSeek-V3 Technical Report* (2024), §2.2, Equations 21 to 25, and §4.5.1. The idea is called
# *multi-token prediction* (MTP). You should know what a decoder block and cross-entropy are.

# %% tags=["parameters"]
STEPS = 100  # of each of the three small trainings
SEED = 1234
DEVICE = "cpu"
FAST = False  # True: fewer steps

# %%
import torch
import torch.nn.functional as F  # noqa: F401  (an answer may use it)

from dsv3lib import DeepSeekV3, ModelConfig
from dsv3lib.course import check, exercise, measured, predict, reveal, setup, symbols, table
from dsv3lib.viz import mtp as figures
from dsv3lib.viz import style
from dsv3lib.viz.live import live

session = setup(seed=SEED, notebook="04_mtp_chain", device=DEVICE)
v3, tiny = ModelConfig.preset("v3-671b"), ModelConfig.preset("tiny")
draw = session.generator

# %% [markdown]
# ## Change one token
#
# A language model predicts the next token. V3 is trained to predict the one after that as well, by a small module behind the
# main model. We give `tiny` *two* such modules, let it read 12 tokens, change token `8` (counted from `0`), and look whose
# predictions move. <!-- claim: sees -->

# %%
model = DeepSeekV3(tiny.replace(num_nextn_predict_layers=2), draw).double().eval()
ids = torch.randint(tiny.vocab_size, (1, 12), generator=draw)


@torch.no_grad()
def logits_of(ids):
    """Logits of the main model and of depth 1 and 2; depth k has k positions fewer."""
    out = model(ids, return_mtp=True)
    return [one[0] for one in (out.logits, *out.mtp_logits)]


def whose_move(changed):
    other = ids.clone()
    other[0, changed] = (other[0, changed] + 1) % tiny.vocab_size
    pairs = zip(logits_of(ids), logits_of(other), strict=True)  # a row for each depth
    return [((a - b).abs().amax(-1) > 1e-9).tolist() for a, b in pairs]


# %%
predict(
    "mtp.p1",
    "Token 8 is changed. Which is the first position whose logits move at depth 2?",
    options=["8", "7", "6", "10"],
)

# %% tags=["claim:sees"]
grid = whose_move(8)
style.show(*figures.moved(grid, 8))
for changed in range(12):
    for k, row in enumerate(whose_move(changed)):
        first = max(changed - k, 0)
        assert not any(row[:first]) and all(row[first:][:1])
assert [row.index(True) for row in grid] == [8, 7, 6] and len(ids[0]) == 12
reveal("mtp.p1", "6", because="At position 6 depth 2 is shown tokens 7 and 8 in addition.")

# %% [markdown]
# **Each depth sees one token more than the one before**, at every position, and predicts the token after that one. Whichever
# token is changed, nothing further left moves: that is *causality at every depth*. <!-- claim: sees --> It is kept because a
# training target must be something that the position cannot look up.
#
# ## The mechanism
#
# A module joins two vectors: the hidden state of the depth before, and the embedding of *one token further on*. Then comes an
# ordinary block, a norm, and the **main model's own head**. Embedding and head exist once.

# %%
with torch.no_grad():
    main_depth, modules = model.model.n_main, model.model.layers[model.model.n_main :]
    embedded = model.model.embed_tokens(ids)
    states = [model.model(embedded, model.begin(ids))[0]]
    for k, module in enumerate(modules, start=1):
        rest = embedded[:, k:]
        states.append(module.advance(states[-1][:, :-1], rest, model.begin(ids[:, k:]))[0])
i = 4
numbers = [h[0, i, :2].tolist() for h in states]
shown = [embedded[0, i + k, :3].tolist() for k in (1, 2)]
style.show(*figures.chain(numbers, shown))

# %% [markdown]
# The letters, with V3's and `tiny`'s sizes:

# %%
symbols(
    *("V", "d", "D"),
    ("h_i^k", "states[k]", "[d]", "what depth k knows at position i; k = 0 is the main model"),
    ("Emb(t_{i+k})", "embedded", "[d]", "embedding of the token k places ahead, shared"),
    ("M_k", "eh_proj", "[d, 2*d]", "joins the two, a matrix for each module"),
    ("OutHead", "lm_head", "[V, d]", "logits of all depths, shared"),
    ("λ", "weight", "", "how much the modules' loss counts: 0.3, later 0.1 (§4.2)"),
)

# %% [markdown]
# Step through a text: choose a position and a depth.

# %%
words = "the cat sat on the mat and slept there until noon .".split()


def draw_seen(depth, position):
    return figures.seen(words, position, depth)


live(draw_seen, depth=range(4), position=range(8), start={"depth": 2, "position": 4})

# %% [markdown]
# ## Write it yourself
#
# First what goes in and what is to come out.

# %%
exercise("mtp.1")


# %%
def aligned(tokens, k): ...


aligned = check("mtp.1", aligned)

# %% [markdown]
# Then the joint. Both vectors are normalised first, for a hidden state is many times longer than an embedding.

# %%
exercise("mtp.2")


# %%
def join(h, e, gain_h, gain_e, M): ...


join = check("mtp.2", join)

# %% [markdown]
# ## The real thing
#
# The library's module is [mtp.py](../dsv3lib/layers/mtp.py). Put your joint into it, run the chain by hand, and compare.

# %% tags=["claim:same"]
with torch.no_grad():
    h, mine = states[0], []
    for k, module in enumerate(modules, start=1):
        step, parts = model.begin(ids[:, k:]), (module.hnorm.weight, module.enorm.weight)
        x = join(h[0, :-1], embedded[0, k:], *parts, module.eh_proj.weight)
        h = module.leave(module(x[None], step)[0], step)
        mine.append(model.lm_head(h)[0])
    theirs = logits_of(ids)[1:]
worst = max(float((a - b).abs().max()) for a, b in zip(mine, theirs, strict=True))
assert worst < 1e-6
print("depths:", len(mine), "· your chain is the library's:", worst < 1e-6)

# %% [markdown]
# Your joint in the library's chain gives the library's logits. <!-- claim: same --> Is it really a chain? Give only the *first* module other weights.

# %%
from dsv3lib.studies import mtp_ways
from dsv3lib.studies.mtp_ways import depth_logits

predict(
    "mtp.p2",
    "Only module 1 is changed. Whose predictions change?",
    options=["depth 1's", "depth 1's and 2's", "the main model's too"],
)

# %% tags=["claim:sequential"]
small, text = mtp_ways.model_of(SEED), torch.randint(256, (2, 24), generator=draw)
with torch.no_grad():
    before = depth_logits(small, text, "chain")[0]
    small.model.layers[small.model.n_main].eh_proj.weight.neg_()
    after = depth_logits(small, text, "chain")[0]
change = [float((a - b).abs().max()) for a, b in zip(before, after, strict=True)]
table(["depth", "logits changed"], [[k, c > 0] for k, c in enumerate(change)])
assert change[0] == 0 and change[1] > 1e-3 and change[2] > 1e-3
reveal("mtp.p2", "depth 1's and 2's", because="Depth 2 starts from what depth 1 handed on.")

# %% [markdown]
# **The second module cannot begin before the first has ended**, for its input is the first one's output.
# <!-- claim: sequential --> The main model does not notice: the modules can be taken off.
#
# ## The loss
#
# $$\mathcal{L} = \mathcal{L}_{main} + \frac{\lambda}{D}\sum_k \mathcal{L}_{MTP}^k$$

# %%
exercise("mtp.3")


# %%
def chain_loss(logits, tokens, weight): ...


chain_loss = check("mtp.3", chain_loss)

# %%
model.aux_loss_alpha = 0.0  # the balance loss is lesson 03's
out = model(ids, labels=ids)
added = chain_loss([one[0] for one in out.mtp_logits], ids[0], model.mtp_loss_weight)
assert torch.allclose(out.losses["main"] + added, out.loss)
print("main + yours is the library's loss:", True)

# %% [markdown]
# Embedding and head now get gradients from every depth. Each use counts once; a test checks the sum over copies, use by use,
# in FP64 ([test_mtp_sharing.py](../tests/layers/test_mtp_sharing.py)).
#
# ## Chain against independent heads
#
# There is a simpler way: heads that all start from the main model's state and *see no further token* (Medusa works so). We
# train both, two depths each, of the same size, from the same weights, on the same text: bytes of Python's manual, and sums.

# %%
from dsv3lib.course import bar
from dsv3lib.model import next_token_loss
from dsv3lib.studies.small_models import manual, rows_of

unseen = rows_of(manual()[1], 32, 128, torch.Generator().manual_seed(9))


def trained(kind):
    """A small model with two depths, trained for STEPS steps."""
    steps = 3 if FAST else STEPS
    with bar(kind, total=steps) as tick:
        for model, loss in mtp_ways.train_one(kind, 0, steps):  # noqa: B007
            tick(note=f"loss {loss:.2f}")
    return model


# %%
@torch.no_grad()
def by_depth(model, kind):
    """Nats per byte of unseen text, of the main model and of each depth."""
    logits = depth_logits(model, unseen, kind)[0]
    return [next_token_loss(one, unseen, k).item() for k, one in enumerate(logits, start=1)]


# %%
ways = {"chain": trained("chain"), "independent heads": trained("heads")}
losses = {n: by_depth(m, k) for (n, m), k in zip(ways.items(), ("chain", "heads"), strict=True)}
predict(
    "mtp.p3",
    "How does the chain's loss change from the main model to depth 2?",
    options=["it rises steeply", "it doubles", "it hardly rises, or falls"],
)

# %%
style.show(*figures.by_depth(losses, "Loss on unseen text, by depth", "nats per byte"))
rise = {name: values[2] - values[0] for name, values in losses.items()}
measured("; ".join(f"{name}: {value:+.2f} nats" for name, value in rise.items()))
assert FAST or rise["chain"] < 0.5 * rise["independent heads"]
reveal("mtp.p3", "it hardly rises, or falls", because="It has read all up to its target.")

# %% [markdown]
# A chain at depth $k$ is asked what the main model is asked $k$ places later, with the same tokens read. It goes through $k$
# more blocks, which counts where the main model has only two. A head has to guess over a gap instead.
#
# One training proves little. The study `python -m dsv3lib.studies.mtp_ways` made five times as many steps from five seeds;
# its record lies in `data/studies`.

# %% tags=["claim:chain"]
from dsv3lib.studies.log import read
from dsv3lib.studies.mtp_ways import by_seed, difference

study, seeds = read("mtp_ways"), mtp_ways.SEEDS


def spread(values):
    return f"{sum(values) / len(values):.3f} ({min(values):.3f} to {max(values):.3f})"


rows = []
for k in range(2):
    each = [by_seed(study, one, lambda r, k=k: r["greedy"][k]) for one in ("chain", "heads")]
    rows.append([f"depth {k + 1}", *map(spread, each)])
    assert min(a - b for a, b in zip(*each, strict=True)) > 0.2 and len(each[0]) == 5
table(["same likeliest token as the main model", "chain", "independent heads"], rows)

# %% [markdown]
# **The chain guesses further tokens far better than independent heads**: it agrees with the main model in at least a fifth
# of all places more, from each of the five seeds. <!-- claim: chain --> It costs the order: heads can run at once. And a
# caution: at depth 2 this table shows the module the *true* token; a drafter would have to show it its own guess.
# Lesson 07 counts what is left then.
#
# How is it in a model that learnt for longer? `tiny-v3`, which comes with the course, has 12 blocks and two modules. <!-- claim: longer -->
# Its modules went on learning when the model was done, from its predictions (lesson 07 says why), so they follow it closely:

# %% tags=["claim:longer"]
from dsv3lib.training.text.tokenizer import Tokenizer

tiny_v3 = DeepSeekV3.from_pretrained("tiny-v3").eval()
spelling = Tokenizer.from_pretrained("tiny-v3")
tokens = spelling.encode(bytes(manual()[1][:24_000].tolist()).decode(errors="ignore"))
batch = torch.tensor(tokens[: 16 * 256]).view(16, 256)
with torch.no_grad():
    out = tiny_v3(batch, return_mtp=True)
each = [next_token_loss(x, batch, k) for k, x in enumerate([out.logits, *out.mtp_logits], 1)]
rows = [[k, round(x.item(), 2)] for k, x in enumerate(each)]
table(["depth", "nats per token"], rows, varies=True)
assert tiny_v3.config.num_hidden_layers == 12 and len(each) == 3
assert abs(each[2] - each[0]) < 0.5 * each[0]

# %% [markdown]
# ## Which hidden state, and which half first
#
# Two things the paper leaves open, and released code answers differently. *Is the state handed on before the final norm or
# after it?* V3's inference code hands on the normalised one, and so do we; some trainers hand on the other. The module
# normalises again, so that they differ by the final norm's gain alone. Both were trained, and each was run the other's way:

# %% tags=["claim:norm"]
kinds = {"after the norm": "chain", "before it": "before_norm"}
rows, wrongly = [], []
for name, kind in kinds.items():
    own = by_seed(study, kind, lambda r: r["sampled"][0])
    other = by_seed(study, kind, lambda r: r["handed_wrongly"]["sampled"][0])
    rows.append([name, spread(own), spread(other)])
    wrongly += [abs(a - b) for a, b in zip(own, other, strict=True)]
table(["trained with the state", "accepted so", "accepted the other way"], rows)
gain = difference(study, "before_norm", lambda r: r["sampled"][0], "chain")
assert min(gain) < 0 < max(gain) and max(wrongly) < 0.01

# %% [markdown]
# At this size neither is better from all seeds, and mixing them up costs less than a hundredth. <!-- claim: norm --> Gains of
# a large model lie further apart, so do not mix them up there: nothing would say so.
#
# *Which half of `eh_proj` is first?* Eq. 21 writes the hidden state first, the released files have the embedding first. Move
# the columns and the input, and nothing changes. Move one of them:

# %% tags=["claim:halves"]
first, width = modules[0], tiny.hidden_size
parts = states[0][0, :-1], embedded[0, 1:], first.hnorm.weight, first.enorm.weight
swapped = first.eh_proj.weight.roll(width, 1)
with torch.no_grad():
    right = join(*parts, first.eh_proj.weight)
    both = join(parts[1], parts[0], parts[3], parts[2], swapped)
assert torch.allclose(right, both)
chain = ways["chain"]
with torch.no_grad():
    chain.model.layers[2].eh_proj.weight.copy_(chain.model.layers[2].eh_proj.weight.roll(64, 1))
    loss = by_depth(chain, "chain")
    chain.model.layers[2].eh_proj.weight.copy_(chain.model.layers[2].eh_proj.weight.roll(64, 1))
measured(f"one moved: depth 1 from {losses['chain'][1]:.2f} to {loss[1]:.2f} nats per byte")
assert FAST or loss[1] > losses["chain"][1] + 0.3

# %% [markdown]
# So it is layout only, and a file read the wrong way round raises no error: its modules are merely bad. <!-- claim: halves -->
#
# ## Does it make the model plan?
#
# The paper hopes that MTP lets the model *pre-plan its representations for better prediction of future tokens* (§2.2). That
# can be put to a test. The study asks three things of the main model, modules taken off: its loss on new text; the leading
# digit of sums such as `37+48=085`, which hangs on a carry worked out later; and how well a *linear probe* reads the token
# two places ahead off the hidden state.

# %%
questions = {
    "loss on text": lambda r: r["text_loss"],
    "wrong leading digits": lambda r: 1 - r["digits"][0],
    "two places ahead": lambda r: r["probe"]["2"],
    "three places ahead": lambda r: r["probe"]["3"],
}
against = {
    question: {kind: difference(study, kind, value) for kind in ("chain", "heads")}
    for question, value in questions.items()
}
predict(
    "mtp.p4",
    "Where is the chain better than no MTP from all five seeds?",
    options=["loss on text", "leading digits", "two places ahead", "everywhere"],
)

# %% tags=["claim:plan"]
style.show(*figures.paired(against, "difference"))
better = {question: max(kinds["chain"]) < 0 for question, kinds in against.items()}
table(["question", "better from every seed"], [[q, yes] for q, yes in better.items()])
assert [q for q, yes in better.items() if yes] == ["two places ahead"] and len(seeds) == 5
assert all(max(against[q]["heads"]) < 0 for q in ("two places ahead", "loss on text"))
reveal("mtp.p4", "two places ahead", because="That is what module 1 needs of the state.")

# %% [markdown]
# **The chain's state holds a little more of the token after next**, from all five seeds; three places ahead, on the sums and
# on the text nothing is sure. By chance five agree once in sixteen times, and we asked four questions; but the heads show the
# same. They alone also lower the loss on text from every seed, which the chain does not. <!-- claim: plan -->
#
# So the small model passes the weakest form of the claim and fails the useful one. The paper's ablation (Table 4) finds gains
# at 15.7B and 228.7B parameters; this does not contradict it.
#
# ## What it costs
#
# Parameters of V3 first, counted without memory; then the study's time.

# %% tags=["claim:costs"]
with torch.device("meta"):
    counts = DeepSeekV3(v3).parameter_counts()
small_time = [by_seed(study, kind, lambda r: r["seconds"]) for kind in ("none", "chain")]
times = sum(small_time[1]) / sum(small_time[0])
text_gain = difference(study, "longer", questions["loss on text"], "chain")
table(["what", ""], [
    ["V3: one module (billions)", round(counts["mtp"] / 1e9, 1)],
    ["of the main model (%)", round(100 * counts["mtp"] / counts["main"], 1)],
    ["study: time of a step with two modules behind two blocks", f"{times:.1f} times"],
    ["study: loss if that time goes into more text", spread(text_gain)],
])  # fmt: skip
assert round(counts["mtp"] / 1e9, 1) == 11.6 and times > 2 and max(text_gain) < -0.1

# %% [markdown]
# One module is 11.6 billion parameters, one block beside 61. In our small model two modules double the work, and without MTP
# *the same time* buys far more by reading more text. <!-- claim: costs --> Compare on equal tokens, and say so; V3 pays a
# sixtieth, not a double.
#
# ## Documents' borders
#
# Rows of training text hold several documents. A target must not lie in another one.

# %%
exercise("mtp.4")


# %%
def targets_within(documents, k): ...


targets_within = check("mtp.4", targets_within)

# %% tags=["claim:border"]
documents = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
left = [int(targets_within(documents, k).sum()) for k in range(4)]
print("targets at depth 0 to 3:", left)
assert left == [6, 4, 2, 0]

# %% [markdown]
# Two documents of four tokens lose two targets more at each depth. <!-- claim: border -->
#
# ## Break it
#
# **A module that is shown its own target.** One place too far, an easy slip. Train it so, then use it as it must be
# used, where the target does not exist yet: <!-- claim: peek -->

# %% tags=["claim:peek"]
peeking = trained("own_target")
train_loss, used = by_depth(peeking, "own_target"), by_depth(peeking, "chain")
columns = losses["chain"], train_loss, used
rows = [[f"depth {k}", *(round(x[k], 2) for x in columns)] for k in (1, 2)]
table(["nats per byte", "chain", "own target: in training", "in use"], rows, varies=True)
honest = losses["chain"][1]
assert FAST or (train_loss[1] < 0.6 * honest and used[1] > honest + 0.5)

# %% [markdown]
# The loss looks splendid, and the module is worthless: it has learnt to copy. A training loss that is too good is a sign to
# run the test with the changed token.
#
# **A shift by one.** The same slip, seen without any training: <!-- claim: shift -->

# %% tags=["claim:shift"]
from unittest import mock

from dsv3lib.layers.mtp import MTPModule

right, shift = MTPModule.advance, -1
slip = lambda self, h, e, step: right(self, h, e.roll(shift, 1), step)  # noqa: E731
with mock.patch.object(MTPModule, "advance", slip):
    slipped = whose_move(8)
figure, alt, _ = figures.moved(slipped, 8)
style.show(figure, alt=alt, caption="Beside the first grid: one place too early.")
assert slipped[1].index(True) == 6 and grid[1].index(True) == 7

# %% [markdown]
# ## On trial
#
# *"The MTP modules work in parallel."* A common reading of the paper's Figure 3, where they stand side by side. Changing the
# first moved the second's output; what needs another's output cannot run beside it. Refuted. <!-- claim: sequential -->
# (All *positions* of one module do run at once in training.)
#
# *"The number of MTP modules adapts."* Look at what the configuration says, and whether any input changes it:

# %% tags=["claim:adapts"]
depths = {len(logits_of(torch.randint(tiny.vocab_size, (1, n)))) - 1 for n in (4, 8, 12)}
rows = [["V3", v3.num_nextn_predict_layers], ["model above", len(modules)]]
table(["model", "modules"], rows)
assert depths == {len(modules)} == {2} and v3.num_nextn_predict_layers == 1

# %% [markdown]
# Refuted: D is a number in the configuration, 1 in V3, and the same for every text. <!-- claim: adapts --> How many
# drafts are *used* when text is written may adapt; that is lesson 07.
#
# *"Taking the modules off changes the model."* Train with them, drop them, ask again:

# %% tags=["claim:dropped"]
bare = DeepSeekV3(tiny.replace(num_nextn_predict_layers=0)).double().eval()
weights = {n: w for n, w in model.state_dict().items() if n in bare.state_dict()}
bare.load_state_dict(weights)
with torch.no_grad():
    apart = float((bare(ids).logits[0] - logits_of(ids)[0]).abs().max())
print("the main model's logits are the same:", apart < 1e-12)
assert apart < 1e-12

# %% [markdown]
# Refuted. They are a training aid and a drafter, no part of the answer. <!-- claim: dropped -->
#
# *"MTP makes every model better."* Undecided here, and in doubt: of five seeds some gain on text and some lose. <!-- claim: plan -->
#
# ## At scale
#
# A module is a block like the others, so it runs on the block's kernels, and has none of its own. DualPipe puts
# the first and the last layers of V3 on the same rank, so that the module finds embedding and head there and shares both
# physically, gradients too (§3.2.3; lesson 06). Speeds of MTP on a GPU were not measured here.

# %% tags=["folded"]
from dsv3lib.course import at_scale, progress

at_scale("gemm_fp8 bf16", operations=("gemm_fp8",))
progress()

# %% [markdown]
# ## What can go wrong
#
# - *The module's loss falls far below the main one's.* It sees its target; change a token and look.
# - *Acceptance near chance after loading.* Halves of `eh_proj` swapped, or the wrong hidden state handed on.
# - *Embedding and head loaded twice.* Released files repeat them in the module; they must be the main model's.
# - *The last positions.* Depth $k$ has no target at the last $k + 1$: cut them, never wrap round.
#
# ## Do you recall?
#
# <details><summary>What does depth $k$ see at position $i$, and what does it predict?</summary>
# Tokens up to $i + k$; token $i + k + 1$.</details>
#
# <details><summary>Why does a chain beat independent heads?</summary>
# It is shown the tokens between; a head has to guess over the gap.</details>
#
# <details><summary>What do the modules own, and what do they share?</summary>
# Own: two norms, the joining matrix, a block, a last norm. Shared: embedding and head.</details>
#
# ## Where next
#
# Lesson 07 lets the chain draft, and shows that the text does not change. Train with three modules:
# `ModelConfig.preset("nano").replace(num_nextn_predict_layers=3)`.
