"""Where prompts come from: files, templates, the embedded task. It imports nothing of ours."""
