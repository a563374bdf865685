"""Sources of events other than commands: files, cron, prerequisites, samples."""
