"""Run directory, trackers, progress display, profiling, diagnostics and process settings."""
