"""One attention call, several implementations behind it."""
