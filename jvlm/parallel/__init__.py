"""Meshes, the rules that lay arrays out on them, and what a model does when it is split."""
