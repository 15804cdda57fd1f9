"""How the claims of 07_speculative_decoding are switched off."""

from mutation import Off

CLAIMS = {
    "lossless": Off(
        "drafts that are kept unread",
        "whole = run\n"
        "def keep_all(drafts, q, logits, sizes, sampler):\n"
        "    return sizes, logits[torch.arange(len(sizes)), sizes].argmax(-1)\n"
        "run = lambda prompt: whole(prompt, verifier=keep_all)",
    ),
    "exact": Off("the residual forgotten", "plain = judge\njudge = lambda p, q: (plain(p, q)[0], p)"),
    "library": Off(
        "every draft kept",
        "verify = lambda drafts, q, logits, sizes, sampler: (sizes, drafts[:, 0])",
    ),
    "wrong": Off("the rule in every place", "with_the_drafts = residual_forgotten = verify"),
    "rollback": Off("nothing rolled back", "kept = lambda cached, drafts, accepted: cached + 1 + drafts"),
    "easy": Off(
        "a module that drafts for every text alike",
        "from copy import deepcopy\ncard = deepcopy(card)\n"
        "for one in card['drafts'].values():\n    one['agreement'][0] = 0.6",
    ),
    "distilled": Off("nothing learned since", "card = card | {'distillation': {'before': card['drafts']}}"),
    "depth": Off(
        "a second draft that stands whenever the first does",
        "for one in by_domain.values():\n    one.accepted[1], one.drafted[1] = one.accepted[0], one.drafted[0]",
    ),
    "free": Off("tokens that all visit the same experts", "different = lambda n: 2.0"),
    "best": Off(
        "drafts that are judged one by one",
        "def verify(drafts, q, logits, sizes, sampler):\n"
        "    said = logits.argmax(-1)\n"
        "    stood = (said[:, :-1] == drafts).sum(-1)\n"
        "    return stood, said[torch.arange(len(stood)), stood]",
    ),
    "changes": Off(
        "drafts that are kept unread",
        "whole = run\n"
        "def keep_all(drafts, q, logits, sizes, sampler):\n"
        "    return sizes, logits[torch.arange(len(sizes)), sizes].argmax(-1)\n"
        "run = lambda prompt, m, tokens: whole(prompt, m, tokens=tokens, verifier=keep_all)",
    ),
    "scale": Off("an acceptance that counts every draft", "tokens_of_a_pass = lambda a, m: m + 1"),
}
