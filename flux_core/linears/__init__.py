"""Layers that replace the transformer's nn.Linears when weights are loaded, and their contract with fused code."""
