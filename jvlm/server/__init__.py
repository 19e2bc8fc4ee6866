"""The HTTP server: OpenAI's API over the engine. Imports no jax; the engine is given to it."""
