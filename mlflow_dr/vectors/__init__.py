"""Vectors of passages and queries: encoded into files, searched, indexed."""
