"""How each claim of 04_mtp_chain is switched off."""

from mutation import Off

CLAIMS = {
    "sees": Off("with a module that is shown its target", "from dsv3lib.layers.mtp import MTPModule\n"
                "right = MTPModule.advance\n"
                "patch(MTPModule, 'advance', lambda s, h, e, t: right(s, h, e.roll(-1, 1), t))"),
    "same": Off("with the halves the other way round", "plain = join\n"
                "join = lambda h, e, gh, ge, M: plain(h, e, gh, ge, M.roll(len(M), 1))"),
    "sequential": Off("with independent heads", "plain = depth_logits\n"
                      "depth_logits = lambda model, rows, kind: plain(model, rows, 'heads')"),
    "chain": Off("if the chain saw no further token either",
                 "import dsv3lib.studies.log as log, json\nrows = log.read('mtp_ways')\n"
                 "heads = {r['seed']: r for r in rows if r['kind'] == 'heads'}\n"
                 "patch(log, 'read', lambda name: [dict(heads[r['seed']], kind=r['kind']) for r in rows])"),
    "norm": Off("if the wrong state were costly", "study = [dict(r) for r in study]\n"
                "for r in study: r['handed_wrongly'] = {'sampled': [0.1, 0.1]}"),
    "halves": Off("with a module that adds another vector for each half", "plain = join\n"
                  "join = lambda h, e, gh, ge, M: plain(h, e, gh, ge, M) * (1 if ge is first.enorm.weight else 2)"),
    "plan": Off("with MTP's states as those without", "against = {q: dict(k) for q, k in against.items()}\n"
                "against['two places ahead']['chain'] = [0.0] * 5"),
    "costs": Off("if the time bought nothing", "questions = {**questions, 'loss on text': lambda r: 2.0}"),
    "border": Off("with targets over the border", "plain = targets_within\n"
                  "targets_within = lambda d, k: plain(d * 0, k)"),
    "peek": Off("if what copies in training served in use", "plain = by_depth\n"
                "by_depth = lambda model, kind: plain(model, 'own_target')",
                given="losses['chain'] = [2.0, 2.0, 2.0]\ntrained = lambda kind: kind\n"
                "by_depth = lambda model, kind: [2.0, 0.5, 0.5] if kind == 'own_target' else [2.0, 4.0, 4.0]"),
    "shift": Off("with no shift", "import dsv3lib.layers.mtp as mtp\nwhose_move = lambda changed: grid"),
    "adapts": Off("if a longer text had more", "plain = logits_of\n"
                  "logits_of = lambda ids: plain(ids)[: 2 + ids.shape[1] // 12]"),
    "dropped": Off("if the main model leant on them", "plain = logits_of\n"
                   "logits_of = lambda ids: [x + 1 for x in plain(ids)]"),
}  # fmt: skip
