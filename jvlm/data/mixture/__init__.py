"""Mixtures of data sources: what is configured, which example each draw gives, and how a run shows it."""
