"""Where weights come from: the hub's client, its large files in parts, ModelScope, and the places on this disk."""
