"""The commands, a module each. Commands do not import each other."""
