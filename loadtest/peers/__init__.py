"""Scumble beside other model servers: same weights, images, cores and load."""
