"""A training run: its folder, log, save points and the dsv3 train command."""
