"""How each claim of 05_fp8_tile_quantization is switched off."""

from mutation import Off

CLAIMS = {
    "values": Off("with every other value", "kept = formats.values(formats.E4M3)[::2]\n"
                  "patch(formats, 'values', lambda format: kept)"),
    "tile": Off("with one scale for all three", "maps = figures.maps_of(activation)\n"
                "patch(figures, 'maps_of', lambda x: dict.fromkeys(maps, maps['one scale per tensor']))"),
    "outlier": Off("if an outlier hurt at once", "curves = {n: [90.0] * len(c) for n, c in curves.items()}"),
    "promotion": Off("without promotion", "plain = worst\n"
                     "worst = lambda k, bits=14, promote_every=None, n=8: plain(k, bits, None, n)"),
    "bits": Off("if further bits changed nothing", "plain = worst\n"
                "worst = lambda k, bits=14, promote_every=None, n=8: plain(k, 14, promote_every, n)"),
    "three": Off("with the products in high precision", "from dsv3lib.linear import PLAIN\nplain = count_products\n"
                 "count_products = lambda recipe: plain(PLAIN)"),
    "study": Off("if the loss had moved by a per cent",
                 "study = json.loads(json.dumps(study))\n"
                 "for row in study['weights']: row['effects']['tile']['loss_error'] = 0.01"),
    "planted": Off("if a scale for the tensor did not mind",
                   "study = json.loads(json.dumps(study))\n"
                   "for row in study['outliers']: row['effects']['tensor'] = row['effects']['tile']"),
    "runs": Off("if the runs had moved by a per cent",
                "study = json.loads(json.dumps(study))\n"
                "study['runs']['summary']['tile']['verdict'] = 'beyond'"),
    "bytes": Off("with everything kept as it is", "from dsv3lib.linear import PLAIN\n"
                 "patch(Recipe, 'named', lambda name: PLAIN)"),
    "underflow": Off("with powers of two for both", "plain = along_rows\n"
                     "along_rows = lambda x, power_of_two=True: plain(x, power_of_two=True)\nboth = along_columns\n"
                     "along_columns = lambda x, power_of_two=True: both(x, power_of_two=True)"),
    "halves": Off("if the loss moved as a value does", "worst_loss = {**worst_loss, 'tile': 0.03}"),
    "everything": Off("if nothing stayed out", "patch(Recipe, 'at', lambda self, name: self)"),
    "fp32": Off("with exact sums throughout", "plain = worst\nworst = lambda k, bits=14: plain(k, 34)"),
    "e5m2": Off("with three bits of mantissa in both", "from dataclasses import replace\n"
                "patch(formats, 'E5M2', replace(formats.E4M3, name='E5M2'))"),
}  # fmt: skip
