"""What several test files share: scripts run in this process, input files by hand, servers that stand for the real ones."""
