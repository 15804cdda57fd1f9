"""Experts on many devices: where they lie, and what goes over the wires between them."""
