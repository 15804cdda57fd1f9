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
# # 07 · Draft, verify, and keep the distribution
#
# **You will have shown**
#
# 1. **that speculation writes the very text that plain decoding writes, in fewer passes of the model**;
#    <!-- claim: lossless -->
# 2. **that with the right rule the model's distribution comes out exactly, whatever the drafter proposes**;
#    <!-- claim: exact -->
# 3. **that a second token is not free, so that costs decide whether passes saved are time saved**. <!-- claim: free -->
#
# About 50 minutes. Paper: *DeepSeek-V3 Technical Report* (2024), §2.2, §5.4.3. The subject is called *speculative decoding*
# (Leviathan et al., 2023, arXiv:2211.17192). You should know what an MTP module is (notebook 04) and what the cache holds
# (notebook 01).

# %% tags=["parameters"]
STEPS = 64  # that are written for each prompt
SEED = 1234
DEVICE = "cpu"
FAST = False  # True: fewer prompts

# %%
import torch

from dsv3lib.course import check, exercise, measured, predict, reveal, setup, symbols, table
from dsv3lib.inference.request import Request
from dsv3lib.inference.sampling import Sampler
from dsv3lib.inference.speculative import SpeculationStatistics, speculate, verify
from dsv3lib.studies.shipped_model import open_shipped
from dsv3lib.viz import speculation as figures
from dsv3lib.viz import style
from dsv3lib.viz.live import live

session = setup(seed=SEED, notebook="07_speculative_decoding", device=DEVICE)
model, texts = open_shipped(seed=SEED)
draw, LENGTH = session.generator, max(STEPS, 48)  # tokens

# %% [markdown]
# ## Why drafting can pay
#
# To write one token a model reads all its weights that the token needs, and then does little with them. Reading takes the
# time. Ten tokens that are *given* can be scored in one pass over the same weights, but the tokens to come are not given.
# So let something cheap guess them, and let the model check all guesses at once. V3 has that something cheap on board: the
# MTP module, made for training, is kept as the drafter (§5.4.3).
#
# The model here is `tiny-v3`, which comes with the course: a small DeepSeek-V3 with a chain of two MTP modules. The
# prompts are beginnings of texts that were kept out of its training.

# %%
def prompts_of(domain, count=1, length=32):
    rows = texts.validation_batches(domain, 1, 8)[0].input_ids
    return rows[:count, :length].to(session.device)


def run(prompt, drafts=None, temperature=0.0, tokens=LENGTH, **other):
    """The rounds of one run, without the prompt's own, and their counts."""
    seeded = torch.Generator(session.device).manual_seed(SEED)
    request = Request.of(model, prompt, tokens, temperature, stop_tokens=(), generator=seeded)
    counts = SpeculationStatistics()
    return list(speculate(model, request, drafts, counts, **other)), counts

# %%
predict(
    "spec.p1",
    "The chain drafts two tokens a round, and one pass of the model checks both. How many "
    "passes does it take to write 64 tokens of Python code?",
    options=["64", "about 50", "about 30", "22"],
)

# %% tags=["claim:lossless"]
prompt = prompts_of("code")
rounds, counts = run(prompt)
text = [token for one in rounds for token in one.tokens[0]]
plain = model.generate(prompt, LENGTH, stop_tokens=())[0, prompt.shape[1] :].tolist()
same = text == plain
measured(f"{counts.passes} passes for {counts.tokens} tokens; equal to plain decoding: {same}")
assert same and counts.passes < 0.75 * LENGTH
because = f"{counts.passes}: a pass yields {counts.tokens_per_pass:.2f} tokens on average."
reveal("spec.p1", "about 30", because=because, varies=True)

# %% [markdown]
# **The text is the same, token for token; only the number of passes is not** <!-- claim: lossless -->. Here are the rounds.

# %%
style.show(*figures.rounds_of_a_text(rounds[1:], lambda i: texts.tokenizer.decode([i])))

# %% [markdown]
# Count with your finger: each row gives the drafts that stood *and* one token more. That one is the model's own: the pass
# that checks the drafts knows what comes after the last good one anyway. So a round is never empty.
#
# ## The letters

# %%
symbols(
    "D", "V",
    ("m", "draft_tokens", "", "drafts a round; V3 has one module and drafts one token"),
    ("p", "p", "[V]", "the model's distribution of the next token"),
    ("q", "q", "[V]", "the drafter's distribution, from which the draft was drawn"),
    ("a", "acceptance", "", "share of drafts that stand"),
)  # fmt: skip

# %% [markdown]
# ## The rule
#
# Where the likeliest token is taken, a draft stands if it *is* the likeliest. But text is usually sampled, from a
# distribution $p$. The draft was drawn too, from the drafter's $q$. When may it stand? Suppose the drafter likes a token
# twice as much as the model does: it will propose it twice too often, so it may stand half of the times. And what it proposes
# too rarely must come from somewhere: from the token that is drawn when a draft has fallen.

# %%
exercise("spec.1")

# %%
def judge(p, q):
    ...


judge = check("spec.1", judge)

# %% [markdown]
# Does it give $p$? A token is written if it was drafted and stood, or if the draft fell and it was drawn from the rest. Both
# can be added up without drawing anything. <!-- claim: exact -->

# %% tags=["claim:exact"]
def written(p, q, rule):
    stands, rest = rule(p, q)
    kept = q * stands
    return kept + (1 - kept.sum()) * rest


worst = 0.0
for _ in range(200):
    p, q = torch.softmax(3 * torch.randn(2, 50, generator=draw, dtype=torch.float64), -1)
    worst = max(worst, float((written(p, q, judge) - p).abs().max()))
print(f"largest difference from p over 200 pairs of distributions: {worst:.0e}")
assert worst < 1e-12

# %% [markdown]
# **Exactly p, for a drafter that knows nothing of p** <!-- claim: exact -->. A bad drafter costs passes and never quality.
#
# ## The real thing
#
# The library judges all rows and all drafts of a round at once
# ([speculative.py](../dsv3lib/inference/speculative.py)). Give it a hundred thousand rounds with the same two distributions
# and count what it writes. The measure is $\chi^2$: squared differences from what is expected, over what is expected. It
# should be near its number of degrees of freedom, seven, and beyond 24 only once in a thousand times. <!-- claim: library -->

# %% tags=["claim:library"]
def chi_squared(verifier, n=100_000):
    p, q = torch.softmax(torch.randn(2, 8, generator=torch.Generator().manual_seed(SEED)), -1)
    sampler = Sampler(temperature=1.0, generator=torch.Generator().manual_seed(SEED))
    drafts = torch.multinomial(q, n, replacement=True, generator=sampler.generator)[:, None]
    scores, ones = p.log().expand(n, 2, 8), torch.ones(n, dtype=torch.long)
    stood, own = verifier(drafts, q.expand(n, 1, 8), scores, ones, sampler)
    first = torch.where(stood > 0, drafts[:, 0], own)
    return float(((torch.bincount(first, minlength=8) - n * p).square() / (n * p)).sum())


right = chi_squared(verify)
print(f"χ² of the library's rule: {right:.1f}")
assert right < 24

# %% [markdown]
# ## Break it
#
# ### Verify with the draft's own distribution
#
# Hand the drafter's distribution to the rule in the model's place. Every draft stands, passes are saved, the text looks fine:

# %%
def with_the_drafts(drafts, q, logits, sizes, sampler):
    scores = torch.cat([q.log(), logits[:, -1:]], 1)
    return verify(drafts, q, scores, sizes, sampler)


def residual_forgotten(drafts, q, logits, sizes, sampler):
    stood, own = verify(drafts, q, logits, sizes, sampler)
    p_next = logits.softmax(-1)[torch.arange(len(own)), stood]
    return stood, torch.where(stood < sizes, sampler.draw(p_next), own)


# %% tags=["claim:wrong"]
rules = {"right": verify, "q for p": with_the_drafts, "no residual": residual_forgotten}
found = {name: chi_squared(rule) for name, rule in rules.items()}
rows = [[name, f"{x:,.0f}"] for name, x in found.items()]
table(["rule", "χ², 24 is suspicious"], rows, varies=True)
assert found["right"] < 24 < min(found["q for p"], found["no residual"])

# %% [markdown]
# **Both mistakes write another distribution than the model's, and no error tells** <!-- claim: wrong -->. A test of speculation
# must count many samples; reading the text shows nothing.
#
# ### Forget the rollback
#
# A pass over drafts leaves a latent of each in the cache. Those of fallen drafts are of tokens that are not in the text.

# %%
exercise("spec.3")

# %%
def kept(cached, drafts, accepted):
    ...


kept = check("spec.3", kept)

# %%
from dsv3lib.layers.cache import LatentCache


@torch.no_grad()
def next_scores(crop):
    cache, ids = LatentCache(model.config), prompt[:, :20]
    model(ids, cache=cache)
    newest, wrong = prompt[:, 20:21], torch.tensor([[7, 8]])
    model(torch.cat([newest, wrong], 1), cache=cache)  # one pass over the newest and two drafts
    if crop:
        cache.crop(kept(20, 2, 0))  # both fell
    return model(prompt[:, 21:22], cache=cache).logits[0, -1]

# %% tags=["claim:rollback"]
clean = model(prompt[:, :22]).logits[0, -1].detach()
off = {name: float((next_scores(crop) - clean).norm() / clean.norm())
       for name, crop in (("rolled back", True), ("not rolled back", False))}  # fmt: skip
rows = [[name, f"{100 * x:.2f}"] for name, x in off.items()]
table(["cache", "scores differ by (%)"], rows, varies=True)
assert off["rolled back"] < 1e-4 and off["not rolled back"] > 0.01

# %% [markdown]
# **With the rollback nothing is left of drafts that fell; without it they go on speaking** <!-- claim: rollback -->. And once more
# no error tells.
#
# ## How many tokens does a pass yield?
#
# If every draft stands with probability $a$, whatever the others did:

# %%
exercise("spec.2")

# %%
def tokens_of_a_pass(acceptance, drafts):
    ...


tokens_of_a_pass = check("spec.2", tokens_of_a_pass)

# %%
predict(
    "spec.p2",
    "tiny-v3 reads held-out text. Where does its first draft agree most often with "
    "what the model says itself?",
    options=["Python code", "German messages", "generated word problems with numbers"],
)

# %%
import json

from dsv3lib.course import data_folder

card = json.loads((data_folder() / "checkpoints/tiny-v3/results.json").read_text())

# %% tags=["claim:easy"]
drafts = {n: (one["entropy"], one["agreement"][0]) for n, one in card["drafts"].items()}
rows = [[n, f"{bits:.2f}", f"{100 * same:.0f}"] for n, (bits, same) in drafts.items()]
table(["held-out text", "entropy (bits a token)", "first draft agrees (%)"], rows)
least = min(drafts, key=lambda n: drafts[n][0])
assert least == max(drafts, key=lambda n: drafts[n][1]) == "arithmetic"
because = "The word problems come from a few patterns: there the next token is easy to tell."
reveal("spec.p2", "generated word problems with numbers", because=because)

# %% [markdown]
# **The text that is easiest to tell has the most drafts that stand** <!-- claim: easy -->. Among the other texts entropy
# does not settle the order: how well the module has learned a text counts too. The table was measured when `tiny-v3` was made:
# the model reads the text, and at every place its own likeliest token is held against the module's.
#
# These modules were trained twice. Pre-training asks a module for the *text's* next token; but a draft stands where it is what
# the *model* says, right or wrong. So the finished model was frozen, and its modules alone went on to learn its predictions, on
# the same text and on what it writes itself. That is self-distillation (V3's report does not do it):

# %% tags=["claim:distilled"]
before = {n: one["agreement"][0] for n, one in card["distillation"]["before"].items()}
after = {n: one["agreement"][0] for n, one in card["drafts"].items()}
rows = [[n, f"{100 * before[n]:.0f}", f"{100 * after[n]:.0f}"] for n in after]
table(["held-out text", "first draft agreed before (%)", "and after (%)"], rows)
assert all(after[n] > before[n] for n in after)

# %% [markdown]
# **In every kind of text more first drafts agree** <!-- claim: distilled -->, and the model says what it said before.
#
# When a model writes by itself, it reads what it wrote, and a small greedy model falls into loops. Look at the last column:

# %%
def repeated(tokens, n=8):
    runs = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(runs)) / len(runs)


names, by_domain, loops = ["code", "docs", "german", "arithmetic"], {}, {}
for name in names:
    total, again = SpeculationStatistics(), []
    for row in prompts_of(name, 2 if FAST else 6):
        rounds, _ = run(row[None])
        again.append(repeated([i for one in rounds for i in one.tokens[0]]))
        for one in rounds[1:]:
            total.add(one)
    by_domain[name], loops[name] = total, sum(again) / len(again)

# %%
points = {n: (one.acceptance_by_depth[0], one.tokens_per_pass) for n, one in by_domain.items()}
style.show(*figures.tokens_per_pass(points, (1, 2, 3), of=2))

# %% tags=["claim:depth"]
rows = [[n, *(f"{100 * a:.0f}" for a in one.acceptance_by_depth), f"{one.tokens_per_pass:.2f}",
         f"{tokens_of_a_pass(one.acceptance_by_depth[0], 2):.2f}", f"{100 * loops[n]:.0f}"]
        for n, one in by_domain.items()]  # fmt: skip
head = ["text", "first stands (%)", "both (%)", "tokens per pass", "your formula",
        "repeated (%)"]  # fmt: skip
table(head, rows, varies=True)
stood = [sum(one.accepted[k] for one in by_domain.values()) for k in (0, 1)]
assert stood[1] < stood[0]

# %% [markdown]
# **The second draft stands less often than the first** <!-- claim: depth -->: it needs the first, and it looks further.
# DeepSeek reports 85 to 90 percent for V3's second token (§5.4.3), of a model that has read a million times as much.
#
# *Repeated* is the share of runs of eight tokens that the same text held before. Be careful with acceptance as a mark of
# quality: where text is easy drafts stand, and a model that repeats itself is easy to draft for. `tiny-v3` is a weak model (a table of counts beats it, see its [card](../data/checkpoints/tiny-v3/README.md)), so
# these figures say how speculation works, and not how well it would do for a good one.
#
# ## Temperature
#
# A draft is now drawn from the module's distribution, and it stands by the ratio of the two. How often, depends on how
# much they overlap at that temperature. Move both sliders; the runs behind them were made before.

# %%
from dsv3lib.course import bar

settings = [(m, t) for m in (1, 2, 3, 4) for t in (0.0, 0.5, 1.0)]
piece = texts.tokenizer.decode
sampled = {}
with bar("writing", total=len(settings)) as step:
    for m, t in settings:
        sampled[m, t] = run(prompts_of("docs"), m, t, tokens=16 if FAST else 48)
        step()


def draw_rounds(drafts, temperature):
    chosen_run, _ = sampled[drafts, temperature]
    return figures.rounds_of_a_text(chosen_run[1:], lambda i: piece([i]), most=10)

# %%

live(draw_rounds, drafts=[1, 2, 3, 4], temperature=[0.0, 0.5, 1.0],
     start={"drafts": 2, "temperature": 0.0}, labels={"drafts": "drafts a round"})  # fmt: skip

# %% [markdown]
# With three and four drafts the last module is used again: it goes on from its own output.
#
# ## On trial: "a second token is free"
#
# The argument says: all weights are read anyway. In a model of experts they are not. A token reads the experts that it visits,
# and a second token visits others.

# %%
predict(
    "spec.p3",
    "In tiny-v3 a token visits 2 of 16 experts in a layer. How many different experts does a "
    "pass over 3 tokens read?",
    number=(2.0, 6.0, "experts"),
)

# %%
ids = torch.cat([prompts_of(name, 4, 64) for name in names])
with torch.no_grad():
    chosen = model(ids).expert_indices
c = model.config
layers = c.num_hidden_layers - c.first_k_dense_replace
visits = torch.stack([one.view(len(ids), 64, -1) for one in list(chosen)[:layers]])


def different(n):
    groups = visits[:, :, : 64 // n * n].reshape(-1, n * visits.shape[-1])
    return sum(len(set(row)) for row in groups.tolist()) / len(groups)


# %% tags=["claim:free"]
read = {n: different(n) for n in (1, 2, 3, 4, 8)}
style.show(*figures.experts_read(read, c.num_experts_per_tok, c.n_routed_experts))
assert read[1] == 2 and read[2] > 1.3 * read[1] and read[3] > 1.6 * read[1]
because = "Neighbours share some."
reveal("spec.p3", read[3], unit="experts", close=0.15, because=because, varies=True)

# %% [markdown]
# Refuted, for a single user: **a pass over two tokens must read many more experts than a pass over one** <!-- claim: free -->. With hundreds of
# users in a batch the experts are all read anyway, but then a pass is no longer bound by reading.
#
# ## Does it pay?
#
# A round costs one wide pass and $m$ drafts, and yields the tokens that you computed:
#
# $$\text{speed-up} = \frac{1 + a + \dots + a^m}{\text{wide pass} + m \cdot \text{draft}}$$
#
# both measured in passes over one token. Find a setting where it pays, and one where it never does:

# %%
def draw_speedup(acceptance, draft_cost, wider):
    return figures.speedup(acceptance / 100, draft_cost / 100, wider / 100)


live(draw_speedup, acceptance=[40, 60, 75, 85, 95], draft_cost=[1, 5, 10, 20, 40],
     wider=[0, 5, 10, 25, 50, 100],
     start={"acceptance": 85, "draft_cost": 5, "wider": 5},
     labels={"acceptance": "drafts that stand (%)", "draft_cost": "a draft costs (% of a pass)",
             "wider": "each token more (% of a pass)"})  # fmt: skip

# %% [markdown]
# And this machine? Measure both ways of writing the same text.

# %%
import time


def seconds(work, times=3):
    taken = []
    for _ in range(times):
        begun = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begun)
    return min(taken)


plain_run = {"max_new_tokens": LENGTH, "stop_tokens": ()}
plainly = seconds(lambda: model.generate(prompt, **plain_run))
drafting = seconds(lambda: model.generate(prompt, speculative=True, **plain_run))
# %%
rows = [["plain", f"{LENGTH / plainly:.0f}"], ["two drafts", f"{LENGTH / drafting:.0f}"]]
table(["decoding", "tokens per second, here"], rows, varies=True)
measured(f"Speed-up on this machine: {plainly / drafting:.2f}")

# %% [markdown]
# How much that is hangs on the processor, and on some it *loses*: in so small a model each further token of a pass, and each
# draft, costs a good part of one. Fewer passes are not less time. The sliders show it on the right: a wide pass.
#
# ## On trial: "it picks the best of several"
#
# Drafts are no candidates that compete. They are one continuation, kept up to its first mistake. Would a draft behind a fallen
# one ever have been right? <!-- claim: best -->

# %% tags=["claim:best"]
def one_round(drafts, said):
    """Greedy: the model's likeliest tokens, one per position, against the drafts."""
    logits = torch.nn.functional.one_hot(torch.tensor([said]), 9).float()
    sizes = torch.tensor([len(drafts)])
    stood, own = verify(torch.tensor([drafts]), None, logits, sizes, Sampler())
    return int(stood), int(own)


assert one_round([4, 5], [4, 5, 6]) == (2, 6)
assert one_round([4, 8], [4, 5, 6]) == (1, 5)
assert one_round([8, 5], [4, 5, 6]) == (0, 4)  # the second draft is right, and falls
print("drafts [8, 5] where the model says 4, 5: kept", one_round([8, 5], [4, 5, 6])[0])

# %% [markdown]
# Refuted: **a draft behind one that fell is thrown away even if it is what the model would say** <!-- claim: best -->, because the
# model was asked what follows *the wrong token*.
#
# **"It changes the output."** <!-- claim: changes --> Greedy you saw it on one text. On more texts, and with more drafts than
# modules:

# %% tags=["claim:changes"]
equal, tried = 0, 0
for name in names:
    for row in prompts_of(name, 1 if FAST else 2):
        for m in (1, 2, 4):
            rounds_of = run(row[None], m, tokens=24)[0]
            ours = [token for one in rounds_of for token in one.tokens[0]]
            theirs = model.generate(row[None], 24, stop_tokens=())[0, row.numel() :].tolist()
            equal, tried = equal + (ours == theirs), tried + 1
measured(f"equal texts: {equal} of {tried}")
assert equal >= tried - 1

# %% [markdown]
# Refuted. (One text is allowed to differ: two tokens may be equally likely up to the last bit, and a pass over three tokens adds
# in another order than a pass over one.)
#
# ## At scale
#
# V3 drafts one token with its one module. DeepSeek reports 85 to 90 percent of second tokens accepted and 1.8 times the tokens
# per second (§5.4.3). Turn your formula round: what did a round cost there? <!-- claim: scale -->

# %% tags=["claim:scale"]
low, high = tokens_of_a_pass(0.85, 1), tokens_of_a_pass(0.90, 1)
print(f"tokens per pass: {low:.2f} to {high:.2f}")
print(f"a round costs {low / 1.8:.2f} to {high / 1.8:.2f} passes without a draft")
assert 1.02 < low / 1.8 < high / 1.8 < 1.06

# %% [markdown]
# A round with a draft costs three to six percent more than a pass without. That is what a module of one layer beside 61 may
# cost when reading the weights takes the time. <!-- claim: scale -->

# %% tags=["folded"]
from dsv3lib.course import at_scale

at_scale("mla_decode sm_90", operations=("mla_decode",))

# %%
from dsv3lib.course import progress

progress()

# %% [markdown]
# ## What can go wrong
#
# - *The text differs from plain decoding after some hundred tokens.* A tie, settled otherwise; compare at temperature zero in FP32
#   before you search for more.
# - *Acceptance is near zero.* The drafter reads the wrong hidden state or the wrong token: module k reads position i and the token
#   after the k-th. Or the checkpoint's MTP weights were left out.
# - *It is slower than plain decoding.* Measure what a wider pass costs. Fewer drafts, or none, is a legitimate answer.
# - *`draft_tokens: 0, expected at least 1`.* Turn speculation off instead.
#
# ## Do you recall?
#
# <details><summary>With which probability does a draft stand?</summary>
# The smaller of one and p / q, of the token that was drafted.</details>
#
# <details><summary>From what is the token drawn when a draft has fallen?</summary>
# From what the model wants more of than the drafter gave: p − q where positive, normalised.</details>
#
# <details><summary>What must happen to the cache after a round?</summary>
# The latents of the drafts that fell are forgotten; those of the newest token and of the standing drafts stay.</details>
#
# <details><summary>Why is a second token not free in a mixture of experts?</summary>
# It visits experts of its own, and their weights must be read too.</details>
#
# ## Where next
#
# `dsv3 generate tiny-v3 --speculative` in a terminal writes with the chain as its drafter and says how many drafts stood.
