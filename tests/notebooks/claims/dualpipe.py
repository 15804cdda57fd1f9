"""How each bold claim of 06_dualpipe is switched off."""

from mutation import Off

UNSPLIT = "from dsv3lib.pipeline.schedules.dualpipe import dualpipe; "

CLAIMS = {
    "alone": Off("with a full pipeline", "one = schedule; schedule = lambda name, **k: one(name, 8, 20)"),
    "same": Off("with the split schedule", "pair_of = schedule; schedule = lambda key: pair_of('zb1p')"
                " if key == '1f1b' else pair_of(key)"),
    "zb1p": Off("with every W right after its I", "split = split_backward; "
                "split_backward = lambda row, wait: split(row, 0)"),
    "real": Off("with the directions exchanged", "near = warm_up; warm_up = lambda rank, n: near(n - 1 - rank, n)"),
    "moves": Off("with whole backward passes", UNSPLIT +
                 "runs = {**runs, 'DualPipe': simulate(dualpipe(8, 20, False))}"),
    "plus_one": Off("with 1F1B", "made = schedule('1f1b', 8, 20)"),
    "derived": Off("with whole backward passes", UNSPLIT + "made = dualpipe(8, 20, False)"),
    "limits": Off("with W as long as F", "Real = Costs; Costs = lambda *a, **k: Real()"),
    "processes": Off("with the rows of two ranks exchanged", "from dataclasses import replace; "
                     "run = replace(run, spans=run.spans[::-1])"),
    "forgotten": Off("with nothing forgotten", "import dsv3lib.pipeline.runtime.trial as t; one = t.rehearse; "
                     "patch(t, 'rehearse', lambda *a, links=None: one(*a))"),
    "deadlock": Off("with nothing swapped", "patch(type(made), 'swapped', lambda self, **k: self)"),
    "whole": Off("with the split kept", "runs = {**runs, 'DualPipe': simulate(schedule('gpipe', 8, 20))}"),
    "t_bubbles": Off("with costs of nothing", "one = simulate; simulate = lambda s: one(s, F=0, B=0, W=0, FB=0)"),
    "t_memory": Off("with one copy", "import dsv3lib.pipeline.planner as p; one = p.plan; "
                    "patch(p, 'plan', lambda c, name, **k: one(c, 'zb1p', **k))"),
    "t_hidden": Off("with nothing to send", "two = LayerTimes.of_model(v3, 0.0); "
                    "patch(LayerTimes, 'of_model', classmethod(lambda cls, c, r: two))"),
    "t_always": Off("with nothing to send", "two = LayerTimes.of_model(v3, 0.0); "
                    "patch(LayerTimes, 'of_model', classmethod(lambda cls, c, r: two))"),
    "hidden": Off("with pairs that hide nothing", "tune = lambda times, layers: "
                  "(20, {20: layers * (3 + 2 * (times.dispatch + times.combine))})"),
    "plan": Off("with pairs that hide nothing", "import dsv3lib.pipeline.planner as p; "
                "patch(p, '_pair_time', lambda times, layers: 6 * (times.attention + times.mlp + times.dispatch"
                " + times.combine) * layers)"),
}  # fmt: skip
