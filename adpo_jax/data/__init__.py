"""Sources of prompts: files, templates, the embedded task. This folder imports nothing of ours."""
