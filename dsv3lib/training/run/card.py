"""The model card of a trained checkpoint, written from what was measured: nothing in it is typed by hand.

``measure_run`` makes the record, ``card`` turns a record into Markdown; ``publish.py`` writes both beside the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Record = Mapping[str, Any]

_COLUMNS = (
    ("model", "tiny-v3"),
    ("dense", "dense twin"),
    ("five_gram", "5-gram"),
    ("unigram", "unigram"),
    ("xz", "xz"),
    ("gzip", "gzip"),
)
_SOURCES = {
    "code": "Python's standard library (PSF licence)",
    "docs": "Python's help topics (PSF licence); docstrings of NumPy, PyTorch, NetworkX (BSD) and Matplotlib "
    "(a PSF-like licence)",
    "languages": "JupyterLab's language packs (BSD), Babel's names from Unicode CLDR (Unicode licence), and the "
    "message catalogues of the programs installed on the machine (each under its program's licence, many GPL)",
    "arithmetic": "word problems, generated",
}


def card(record: Record) -> str:
    """The card of a record as Markdown, with the front matter that the Hugging Face hub reads.

    Args:
        record: what ``publish.measure_run`` returned.
    """
    parts = [
        _front_matter(),
        _what(record),
        _bits(record),
        _balance(record),
        _drafts(record),
        _training(record),
        _text(record),
        _limits(record),
        _use(record),
    ]
    return "\n\n".join(parts) + "\n"


def beats_five_gram(record: Record) -> bool:
    """Whether the model spends fewer bits than the 5-gram over all domains together."""
    return record["bits_per_byte"]["all"]["model"] < record["bits_per_byte"]["all"]["five_gram"]


def _front_matter() -> str:
    return "---\nlicense: apache-2.0\nlanguage: [en, zh, de, fr, es]\nlibrary_name: transformers\n---"


def _what(record: Record) -> str:
    model, counts = record["model"], record["parameters"]
    return (
        f"# tiny-v3\n\nA DeepSeek-V3 of {counts['main'] / 1e6:.2f} million parameters "
        f"({counts['active'] / 1e6:.2f} million active per token), with {model['num_nextn_predict_layers']} MTP "
        f"modules ({counts['mtp'] / 1e6:.2f} million more), made to learn from, not to be used: "
        f"{model['num_hidden_layers']} layers of width {model['hidden_size']}, latent attention (rank "
        f"{model['kv_lora_rank']}), {model['n_routed_experts']} routed experts of "
        f"{model['moe_intermediate_size']} in {model['n_group']} groups, {model['num_experts_per_tok']} per token, "
        "balanced by the routing bias. Written by code: `python -m dsv3lib.training.run.publish`."
    )


def _bits(record: Record) -> str:
    rows = record["bits_per_byte"]
    present = [(key, title) for key, title in _COLUMNS if key in rows["all"]]
    lines = [
        "## Validation: bits per byte",
        "Lower is better. All columns are of the same tokens, from documents that training never saw.",
        "| domain | tokens | " + " | ".join(title for _, title in present) + " |",
        "|---|---:|" + "---:|" * len(present),
    ]
    for name, row in rows.items():
        figures = " | ".join(f"{row[key]:.3f}" for key, _ in present)
        lines.append(f"| {name} | {row['tokens']:,} | {figures} |")
    verdict = "beats" if beats_five_gram(record) else "**does not beat**"
    few = [name for name, row in rows.items() if row["tokens"] < record["least_tokens"]]
    lines += [
        "",
        f"Over all domains the model {verdict} the 5-gram. The 5-gram has interpolated modified Kneser-Ney smoothing "
        "(it sums to one) and counted the very tokens that the model was trained on, as the unigram did. "
        + (
            "The dense twin has the same active parameters, recipe and tokens, and no routed experts. "
            if "dense" in rows["all"]
            else "The dense twin has not been trained. "
        )
        + "gzip -9 and xz -9e compress each domain's validation text in one piece and have learnt nothing before.",
    ]
    if few:
        lines.append(f"Fewer than {record['least_tokens']:,} tokens were there for: {', '.join(few)}.")
    return "\n".join(lines[:2]) + "\n\n" + "\n".join(lines[2:])


def _balance(record: Record) -> str:
    balance = record["balance"]
    lines = [
        "## Load of the experts",
        "",
        "Over the whole validation text: MaxVio is the fullest expert's load over the mean, less 1; entropy is "
        "relative to even loads (1).",
        "",
        "| layer | MaxVio | entropy |",
        "|---:|---:|---:|",
    ]
    for layer, violation, entropy in zip(
        balance["layers"], balance["max_violation"], balance["entropy"], strict=True
    ):
        lines.append(f"| {layer} | {violation:.2f} | {entropy:.3f} |")
    return "\n".join(lines)


def _drafts(record: Record) -> str:
    lines = [
        "## What the MTP modules are worth",
        "",
        "How often the module of each depth names the main model's own likeliest token (greedy acceptance, the "
        "tokens before given), and the main model's entropy beside it, which says how easy the text is.",
        "",
        "| domain | entropy (bits per token) | "
        + " | ".join(f"depth {k}" for k in range(1, record["model"]["num_nextn_predict_layers"] + 1))
        + " |",
        "|---|---:|" + "---:|" * record["model"]["num_nextn_predict_layers"],
    ]
    before = record.get("distillation", {}).get("before", {})
    for name, row in record["drafts"].items():
        was = before[name]["agreement"] if before else [None] * len(row["agreement"])
        shares = " | ".join(
            f"{share:.1%}" if old is None else f"{share:.1%} (before {old:.1%})"
            for share, old in zip(row["agreement"], was, strict=True)
        )
        lines.append(f"| {name} | {row['entropy']:.2f} | {shares} |")
    if before:
        lines += ["", _distillation(record["distillation"])]
    return "\n".join(lines)


def _distillation(record: Record) -> str:
    training, divergence = record["training"], record["divergence"]
    depths = ", ".join(
        f"{first:.2f} to {divergence['last'][name]:.2f} at depth {name.removeprefix('mtp_')}"
        for name, first in divergence["first"].items()
    )
    return (
        f"After pre-training the main model was frozen, and the modules alone went on for {record['steps']:,} steps, "
        f"{record['tokens']:,} tokens ({record['seconds'] / 60:.0f} minutes on {training['threads']} thread(s)), "
        f"towards its predictions instead of the text's tokens: {record['own_share']:.0%} of the text is what the "
        f"model itself wrote. The KL divergence fell from {depths} (nats; first step, mean of the last 50). "
        f"AdamW, peak learning rate {training['learning_rate']:g}, seed {training['seed']}: "
        "`python -m dsv3lib.training.run.drafts`."
    )


def _training(record: Record) -> str:
    run, training = record["run"], record["training"]
    return (
        f"## Training\n\n{run['steps']:,} steps, {run['tokens']:,} tokens in sequences of {run['sequence_length']}, "
        f"{run['seconds'] / 60:.0f} minutes on {run['threads']} thread(s) of a CPU; seed {training['seed']}. "
        f"AdamW, peak learning rate {training['learning_rate']:g}, warm-up {training['warmup_steps']} steps, constant "
        f"for {run['constant_share']:.0%} and then by a cosine to zero; λ = {training['mtp_loss_weight']:g}, "
        f"γ = {training['bias_speed']:g}, α = {run['aux_loss_alpha']:g}; fill-in-the-middle on "
        f"{run['fim_rate']:.0%} of the documents, documents packed.\n\nThe same run: `{run['command']}`. The losses "
        "along the way are in `training_log.jsonl`."
    )


def _text(record: Record) -> str:
    lines = [
        "## Text",
        "",
        "Nothing was downloaded for it and none of it is stored here: it is what the machine held.",
        "",
        *(f"- {name}: {source}" for name, source in _SOURCES.items()),
        "",
        "| domain | share | training documents read (passes) | bytes kept | dropped as already there |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, row in record["text"].items():
        endless = row["bytes"] is None
        lines.append(
            f"| {name} | {row['share']:.1%} | {'endless' if endless else format(row['passes'], '.2f')} | "
            f"{'endless' if endless else format(row['bytes'], ',')} | "
            f"{'' if row['redundancy'] is None else format(row['redundancy'], '.1%')} |"
        )
    return "\n".join(lines)


def _limits(record: Record) -> str:
    return (
        "## What it cannot do\n\n"
        f"It has read {record['run']['tokens'] / 1e6:.1f} million tokens; it continues text in the manner of its "
        "domains and knows nothing. It does not answer, follow instructions, translate, or calculate reliably, and "
        f"what it states is not true. It was trained on sequences of {record['run']['sequence_length']} tokens and "
        f"accepts {record['model']['max_position_embeddings']:,}: beyond the trained length it gets worse (YaRN can "
        "be set in its config and trained). Its text may repeat passages of its sources word for word."
    )


def _use(record: Record) -> str:
    copies = (
        "The MTP modules' copies of embedding and head, which released checkpoints store again, are left out "
        "(`save_pretrained(folder, mtp_copies=False)`): they equal `model.embed_tokens` and `lm_head`."
    )
    return (
        '## Use\n\n```python\nfrom dsv3lib import DeepSeekV3\nmodel = DeepSeekV3.from_pretrained("tiny-v3")\n```\n\n'
        "or `dsv3 generate tiny-v3`, or `AutoModelForCausalLM.from_pretrained(folder)` of transformers, which reads "
        f"the same weights without the MTP modules. Weights in BF16, {record['weights_bytes'] / 1e6:.1f} MB. {copies}"
    )
