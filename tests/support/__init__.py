"""What several test files share: scripts run in this process, input files by hand, stand-ins for the real servers."""
