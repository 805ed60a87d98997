"""The kernels of `stream_mosaic`, and what they are made of."""
