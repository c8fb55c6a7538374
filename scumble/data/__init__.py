"""Labelled image sets."""
