"""The workshop: trains victims, quantizes them, writes bundles. Needs the `train` extra."""
