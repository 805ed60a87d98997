"""Where numbers go: metric writers, experiment trackers, progress lines, traces, redaction."""
