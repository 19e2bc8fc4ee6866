"""Encoders, connectors, decoders, and their assembly."""
