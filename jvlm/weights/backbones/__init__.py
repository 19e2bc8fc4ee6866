"""Vision towers and language models on their own: Hugging Face folders that become the encoder or decoder of a new VLM.

One file per family; each offers ``BACKBONE``, so adding one adds a file.
"""
