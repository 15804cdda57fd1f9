"""Exercises of 04_mtp_chain: what a depth sees and predicts, one link of the chain, its loss, documents' borders."""

from __future__ import annotations

from dsv3lib.course.exercises.mtp import alignment, link

EXERCISES = (*alignment.FIRST, *link.EXERCISES, *alignment.LATER)
