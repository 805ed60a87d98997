"""Devices, their meshes and memory, several processes. This folder imports nothing of ours."""
