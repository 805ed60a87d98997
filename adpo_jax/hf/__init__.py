"""Hugging Face folders: configs, weights and tensors, in and out."""
