"""Adapters: small trainable matrices beside frozen ones (LoRA and its relatives)."""
