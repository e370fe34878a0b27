"""Picture files: reading, converting and writing them, and their metadata."""
