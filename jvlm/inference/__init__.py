"""Generation: sampling, the compiled engine, files of prompts, and chat."""
