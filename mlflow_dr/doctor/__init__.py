"""What would fail on this machine, found out before it fails."""
