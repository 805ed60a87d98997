"""What runs: devices, their meshes and memory, several processes. It imports nothing of ours."""
