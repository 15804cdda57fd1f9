"""How the claims of 00_start_here are switched off."""

from mutation import Off

CLAIMS = {
    "size": Off(
        "with a router that sends every token to every expert",
        "from dsv3lib import ModelConfig\nmake = ModelConfig.preset\n"
        "patch(ModelConfig, 'preset', staticmethod(\n"
        "    lambda name: make(name).replace(num_experts_per_tok=256, topk_group=8)))",
    ),
    "looking-back": Off(
        "with a context of 4,096 tokens",
        "far_of = model_map.parts\npatch(model_map, 'parts', lambda c, context: far_of(c, 4096))",
    ),
    "learns": Off(
        "with a model that knows what is common and nothing of order",
        "loss_of = lambda shuffled: rival",
        given="rival = 7.3\nloss_of = lambda shuffled: 7.1 if shuffled else 6.2",
    ),
    "longer": Off(
        "with a dense twin that needs fewer bits",
        "import json\n"
        "read = json.loads\n"
        "def better(text, **how):\n"
        "    card = read(text, **how)\n"
        "    if 'bits_per_byte' in card:\n"
        "        bits = card['bits_per_byte']['all']\n"
        "        bits['dense'] = 0.9 * bits['model']\n"
        "    return card\n"
        "patch(json, 'loads', better)",
    ),
    "same": Off(
        "with a small model whose queries have no latent",
        "model = DeepSeekV3(tiny.replace(q_lora_rank=None))",
    ),
    "each": Off(
        "with every expert at work",
        "v3 = v3.replace(num_experts_per_tok=256, topk_group=8)",
    ),
    "download": Off("without the module that predicts one token further", "counts = counts | {'mtp': 0}"),
}
