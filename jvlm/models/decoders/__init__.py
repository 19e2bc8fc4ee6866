"""One file per decoder; each registers itself."""
