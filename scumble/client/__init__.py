"""The HTTP client of the service, and `scumble predict`."""
