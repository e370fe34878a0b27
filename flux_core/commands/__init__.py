"""One request in, files out: each module is what one command does. Commands do not import each other."""
