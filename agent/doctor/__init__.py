"""Trying everything that the agent needs, and saying what to do about each failure."""
