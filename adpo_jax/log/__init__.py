"""Output of a run: metric writers, experiment trackers, progress lines, traces, redaction."""
