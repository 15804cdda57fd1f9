"""Recorded experiments: each a command that anybody can repeat, too long for a notebook's cell.

    python -m dsv3lib.studies.rotary_dims --out data/studies/rotary_dims.json
    python -m dsv3lib.studies.needle_study
    python -m dsv3lib.studies.context_cost
"""
