"""Quantised kernels: number formats, frozen bases in them, and checkpoints that hold them."""
