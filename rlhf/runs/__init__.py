"""What every run owns: directory, trackers, progress, profiling, process settings."""
