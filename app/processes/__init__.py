"""The supervisor, its workers, and how connections reach them."""
