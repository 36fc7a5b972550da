"""Layers that run on the operators: nn.Module with what each needs stored beside it."""
