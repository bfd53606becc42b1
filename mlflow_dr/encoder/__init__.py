"""The encoder: text to vector. The model, its pooling, its directory layout, tokenising."""
