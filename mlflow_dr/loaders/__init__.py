"""How documents reach the model: what supplying them takes, measured cell by cell."""
