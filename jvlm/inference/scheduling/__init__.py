"""Which sequences run next, in which slots and pages: the engine's scheduler, in Python and numpy alone."""
