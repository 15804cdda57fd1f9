"""Figures and widgets: one palette, one grammar (``style``), one way to step a figure (``live``)."""
