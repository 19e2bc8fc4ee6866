"""One file per family of checkpoints; each defines ARCHITECTURE."""
