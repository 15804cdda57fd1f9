"""For each lesson, by its short name: how each bold claim's mechanism is switched off (``CLAIMS``)."""
