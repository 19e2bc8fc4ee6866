"""Where the work on many examples is done: in this process, or by the machines of a cluster."""
