"""Trains networks, quantizes them and writes bundles. Needs the `train` extra."""
