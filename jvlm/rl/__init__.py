"""Reinforcement learning on answers that the model samples itself: advantages, losses."""
