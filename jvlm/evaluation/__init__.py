"""Asking a model the questions of examples whose answers are known."""
