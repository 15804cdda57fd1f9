"""How each claim of 08_long_context is switched off."""

from mutation import Off

CLAIMS = {
    "two": Off("with the temperature once", "softmax_scale = lambda width, s: (0.1 * math.log(s) + 1) / width**0.5"),
    "ramp": Off("with every pair slowed", "yarn_speeds = lambda speeds, low, high, s: speeds / s"),
    "angles": Off("if interpolation were called YaRN", "speeds = {**speeds, 'YaRN': speeds['interpolation']}"),
    "square": Off("with a factor of 1", "times = 1.0"),
    "zero": Off("with no change at all", "speeds = {**speeds, 'YaRN': speeds['as trained']}"),
    "found": Off("with nothing stretched", "way = lambda method, when: lambda run: run['methods']['none'][when]"),
    "lookup": Off(
        "for a model that answers whatever the keys are",
        "by_key = found\nfound = lambda of, key='map', length='1024': by_key(of, 'map', length)",
    ),
    "extended": Off("with nothing stretched", "after_yarn = way('none', 'before')"),
    "ports": Off("if the map found every mistake", "needles = {name: [0.5] * len(study) for name in needles}"),
    "free": Off(
        "with the model as it was trained", "way = lambda method, when: lambda run: run['methods']['none']['before']"
    ),
    "needle": Off(
        "if interpolation read as well as YaRN", "as_it_is = way\nway = lambda method, when: as_it_is('yarn', when)"
    ),
    "quadratic": Off(
        "with a window of 4,096 tokens",
        "import dsv3lib.model.costs as costs_of\n"
        "whole = costs_of.forward_flops\n"
        "patch(costs_of, 'forward_flops', lambda config, context: whole(config, min(context, 2048)))",
    ),
}
