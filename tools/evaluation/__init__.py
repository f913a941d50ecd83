"""Measuring a detector on labelled pictures: readers, judgement, summary, baselines, report."""
