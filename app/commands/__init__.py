"""Commands of `scumble` that serve, check and administer a service."""
