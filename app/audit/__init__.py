"""The audit log: a line for each prediction, in a chain of hashes."""
