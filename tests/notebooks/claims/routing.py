"""How each bold claim of 03_bias_based_routing is switched off."""

from mutation import Off

RECORDED = "study = [row | {change} if row['way'] in {ways} else row for row in study]\nways = small.summary(study)"


def recorded(what: str, change: str, ways: str = "('none', 'bias', 'sequence', 'batch')") -> Off:
    """The recorded study as it would be if the claim were false."""
    return Off(what, RECORDED.format(change=change, ways=ways))


CLAIMS = {
    "collapse": Off(
        "a router that stays level by itself",
        "from dsv3lib.studies import log as logs\n"
        "rows = logs.read('balance_ways')\n"
        "patch(logs, 'read', lambda name: [r | {'tail_global_violation': [0.1, 0.1]} for r in rows])",
    ),
    "balanced": recorded("a bias that does not balance", "{'tail_global_violation': [3.0, 3.0]}", "('bias',)"),
    "no_gradient": Off("a bias that the update does not move", "update = lambda b, load, gamma: b"),
    "nodes": Off("no limit of nodes", "v3 = v3.replace(topk_group=8)"),
    "same": Off("groups that are never closed", "close_groups = lambda steered, groups, kept: steered"),
    "drift": Off("biases that move up and down in pairs",
                 "balanced = [row | {'bias': [[[0.01, -0.01] * 4] * 2]} for row in balanced]"),
    "centred": Off("a bias that multiplies the affinity",
                   "added = route\nroute = lambda s, b, config: added(s * b, 0 * b, config)"),
    "mask": Off(
        "a mask whose value makes no difference",
        "import dsv3lib.studies.frozen_router as frozen\n"
        "right = frozen.forbidden_visits\n"
        "patch(frozen, 'forbidden_visits', lambda fill, *others: right(-torch.inf, *others))",
    ),
    "leak": Off("a bias of zero", "find_bias = lambda *given, **named: (torch.zeros(8), None)"),
    "gamma": Off("every step balances alike", "find_bias = lambda s, c, gamma, n: (None, torch.ones(n))"),
    "sigmoid": Off("a bias that does nothing",
                   "plain = find_bias\nfind_bias = lambda s, c, gamma, n: plain(s, c, 0.0, n)"),
    "losses": recorded("a loss that does not balance", "{'frozen_violation': [3.0, 3.0]}"),
    "reach": Off(
        "an auxiliary gradient that reaches nothing",
        "import dsv3lib.studies.interference as steps\n"
        "whole = steps.interference\n"
        "patch(steps, 'interference', lambda *a, **k: whole(*a, **k) | {'reach': torch.zeros(2)})",
    ),
    "study": recorded("experts that know nothing of the text", "{'bits': [0.0, 0.0]}"),
    "undecided": recorded("one loss for all ways", "{'settled_validation_loss': 5.8}"),
    "texts": Off("no more pattern than chance makes",
                 "balanced = [row | {'bits': row['bits_by_chance']} for row in balanced]"),
    "p_value": Off(
        "a p-value that leaves the real order out",
        "import dataclasses\n"
        "import dsv3lib.training.loop.specialisation as tests\n"
        "whole = tests.specialisation_test\n"
        "patch(tests, 'specialisation_test',\n"
        "      lambda *a: dataclasses.replace(whole(*a), p_value=torch.zeros(2)))",
    ),
    "shipped": Off(
        "domains' names that are shuffled",
        "whole = small.document_loads\n"
        "def shuffled(*a):\n"
        "    loads, domain = whole(*a)\n"
        "    return loads, domain[torch.randperm(len(domain))]\n"
        "patch(small, 'document_loads', shuffled)",
    ),
    "bound": Off("a token that goes to two nodes", "v3 = v3.replace(topk_group=2)"),
}  # fmt: skip
