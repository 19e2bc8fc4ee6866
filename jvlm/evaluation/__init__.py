"""Asking a model the questions of rows whose answers are known."""
