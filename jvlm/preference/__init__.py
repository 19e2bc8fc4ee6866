"""Training on preferences: pairs of a chosen and a rejected answer, or answers that are good or bad."""
