"""Metrics of published tasks as their authors compute them, from an answer's text to a number from 0 to 1.

Where the code of the authors has oddities that published scores depend on, so has this, and says so. What is known to
be wrong in other harnesses (guesses tried against the reference, letters found in prose, `eval` of a model's text) is
not repeated.
"""
