"""What a calibration set is like: metrics of its ids, at one token budget.

`ngrams` and `metrics` are pure and know nothing else of calmix; `measuring` draws sets and runs
the model.
"""
