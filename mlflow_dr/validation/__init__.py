"""One checkpoint to one report; and the watcher that does it for every checkpoint of a run."""
