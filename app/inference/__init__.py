"""From encoded images to defended probabilities."""
