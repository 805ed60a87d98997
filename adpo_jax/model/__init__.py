"""The decoder: parameters, layers, attention and its kernels, adapters, the head."""
