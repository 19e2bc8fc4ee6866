"""Parameters to and from Hugging Face checkpoints."""
