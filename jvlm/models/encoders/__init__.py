"""One file per encoder; each registers itself."""
