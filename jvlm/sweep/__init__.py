"""One experiment trained several times with other settings, and the results beside each other."""
