"""Data as one HTML page: numbers of each source, what is rejected and why, and examples as the model gets them."""
