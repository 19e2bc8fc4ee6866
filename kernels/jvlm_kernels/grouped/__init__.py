"""Grouped matrix multiplication (mixture of experts), several implementations behind one call."""
