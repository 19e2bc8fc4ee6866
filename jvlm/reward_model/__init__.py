"""Reward models: trained on pairs of answers, checked before use, and put on a scale from 0 to 1."""
