"""Comparisons of runs: what is run, the tables and the pictures of the results."""
