"""Where encoding runs: this process, or several processes, each with a device."""
