"""Bringing records to their endpoints, and nothing else to nobody else."""
