"""Measures Fathom beside transformers' own classes on the same weights: who runs, what is timed, on which machine."""
