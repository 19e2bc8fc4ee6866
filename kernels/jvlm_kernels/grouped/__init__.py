"""Products of groups of rows with a matrix each, several implementations behind one call."""
