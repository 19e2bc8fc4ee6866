"""Cross-entropy of hidden states against a vocabulary matrix."""
