"""The service: a black box that answers images with defended probabilities."""
