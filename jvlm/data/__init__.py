"""Examples of conversations to packed batches: everything that happens on the host."""
