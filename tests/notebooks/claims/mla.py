"""How each bold claim of 01_mla_latent_cache is switched off."""

from mutation import Off

CLAIMS = {
    "bytes": Off("a latent twice as wide", "v3 = v3.replace(kv_lora_rank=1024)"),
    "absorb": Off("each head's key matrix on another head's query", "W_UK = W_UK.flip(0)"),
    "same": Off("position keys that are forgotten", "k_rope = 0 * k_rope"),
    "smallest": Off("a latent narrower than one shared pair", "v3 = v3.replace(kv_lora_rank=64)"),
    "flops": Off(
        "unpacking that costs nothing",
        "import dsv3lib.model.costs as costs\n"
        "patch(costs, 'attention_flops_per_cached_token', lambda config, form: 278528)",
    ),
    "shipped": Off(
        "a model that training did not change",
        "import dsv3lib.studies.shipped_model as place\n"
        "whole = place.open_shipped\n"
        "def fresh(seed):\n"
        "    model, text = whole(seed=seed)\n"
        "    return type(model)(model.config), text\n"
        "patch(place, 'open_shipped', fresh)",
    ),
    "directions": Off("a model that training did not change", "wide = small.reader(64, SEED)"),
    "width": Off(
        "losses that rise as the latent narrows",
        "from dsv3lib.studies import log as logs\n"
        "recorded = logs.read('latent_width')\n"
        "patch(logs, 'read', lambda name: [row | {'loss': 1 / row['rank']} for row in recorded])",
    ),
    "no_rope": Off("keys that are not turned", "apply_rope = lambda x, angles: x"),
    "turned": Off("a turn that does nothing", "apply_rope = lambda x, angles: x"),
    "order": Off("position keys that carry no position", "apply_rope = lambda x, angles: x"),
    "unturned": Off(
        "a latent that depends on the place in the text",
        "plain = cached_of\n"
        "def cached_of(h, at):\n"
        "    c, k = plain(h, at)\n"
        "    return c * (1 + at.imag.sum(-1, keepdim=True)), k\n",
    ),
    "two": Off("values that are not made from the latent", "W_UV = 0 * W_UV"),
    "merged": Off("a latent of queries no wider than the other", "v3 = v3.replace(q_lora_rank=512)"),
    "bottleneck": Off("a latent as wide as the hidden state", "tight = wide"),
    "intensity": Off(
        "heads that share one query", "attention_flops_per_cached_token = lambda config, form: 2 * 1088"
    ),
}
