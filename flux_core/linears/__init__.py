"""What may stand behind an nn.Linear of the transformer, put in place when weights are loaded."""
