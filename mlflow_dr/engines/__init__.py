"""Where encoding runs: this process and its devices."""
