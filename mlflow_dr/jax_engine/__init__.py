"""Training by JAX, on TPUs: the encoder, the loss and the step. The rest is shared with torch."""
