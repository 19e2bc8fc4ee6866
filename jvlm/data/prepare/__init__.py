"""Preparing data before training: duplicates, contamination, filters, rendered examples and PDF pages."""
