"""How each claim of 02_decoupled_rope is switched off."""

from mutation import Off

CLAIMS = {
    "relative": Off(
        "with a scaling in place of a turn",
        "rotate = lambda x, angles: x * angles.cos().repeat_interleave(2, -1)",
    ),
    "wall": Off("where nothing turns", "speeds = lambda R, theta=1.0: torch.zeros(R // 2, dtype=torch.float64)"),
    "enough": Off("if the models without positions were as good", "runs = {**runs, 0: runs[16]}"),
    "layouts": Off("if nothing moved", "to_split_halves = lambda x: x"),
    "both_latents": Off(
        "if latents were turned too",
        "norm_of = base.model.layers[0].self_attn.kv_a_layernorm\n"
        "patch(norm_of, 'forward', lambda c: c * torch.arange(1.0, 1 + c.shape[1])[:, None])",
    ),
    "decay": Off("with keys that equal their queries", "patch(torch, 'randn', (lambda one: lambda *a, **k: one)("
                 "torch.randn(2000, 64, generator=draw, dtype=torch.float64)))"),
    "lost": Off("if the key did not turn", "at = lambda x, positions: x"),
    "turned": Off("if the position were nowhere", "rotate = lambda x, angles: x"),
    "crop": Off("if the late table counted as it should", "Late = RotaryEmbedding"),
    "per_head": Off("with a single head", "v3 = v3.replace(num_attention_heads=1)"),
}  # fmt: skip
