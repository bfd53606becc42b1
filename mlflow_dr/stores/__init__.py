"""How text reaches memory: the token table."""
