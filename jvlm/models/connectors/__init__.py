"""One file per connector; each registers itself."""
