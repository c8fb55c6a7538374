"""What the service needs of Python and the operating system."""
