"""Benchmarks: scripts, each with the JSON it wrote. None is a test."""
