"""Pictures in and out of files: opening them, their metadata, and writing them whole."""
