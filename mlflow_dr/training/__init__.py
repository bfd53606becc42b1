"""Contrastive training on Hugging Face's Trainer, and publishing without stopping it."""
